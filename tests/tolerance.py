"""The one tolerance rule of all tests that compare with a float64 result.

    |y - exact| <= C * eps(dtype of y) * magnitude + smallest subnormal

`magnitude` is |alpha * a_scale| * (|x| @ |w|.T) + |bias|: the sum of the absolute values of all
that was added, so the rule holds where terms cancel. In units of eps, the distance from 1 to the
next number of the type, C = 4 covers

    0.5   the rounding to the output type; with a bf16 or fp16 output that is all there is, and
          what else C leaves room for would be a defect that the exact tests look for
    1.5   with a float32 output, its three operations in the epilogue, half an eps each
    2     with a float32 output, the sum: tensor cores add 16 products at a time and cut off less
          than an eps of the partial sum, which for data of random sign is near magnitude/sqrt(K);
          K/16 such errors of one sign make sqrt(K)/16/2 on average: 2 at K = 4096

So data of random sign and, for float32 outputs, K up to 4096 are what the rule is for.
"""

from __future__ import annotations

import torch
from oracle import round_to
from torch import Tensor

C = 4.0


def tolerance(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest |y - exact| allowed for each element; ``magnitude`` is float64."""
    info = torch.finfo(dtype)
    return C * info.eps * magnitude + info.smallest_normal * info.eps


def assert_close(y: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Hold ``y`` to the rule against float64 ``exact``; what is not finite must match in kind.

    A result beyond the largest number of the type may be infinite or, within the rule, finite.
    """
    assert y.shape == exact.shape, f"shape {tuple(y.shape)}, expected {tuple(exact.shape)}"
    allowed = tolerance(magnitude, y.dtype)
    error = (y.double() - exact).abs()
    rounded = round_to(exact, y.dtype)
    bad = ~((error <= allowed) | (y.double() == rounded) | (y.isnan() & exact.isnan()))
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements out of tolerance; the first at {where}: "
            f"{y[where].item()!r}, exact {exact[where].item()!r}, "
            f"error {error[where].item():.3g}, allowed {allowed[where].item():.3g}"
        )


def assert_identical(y: Tensor, expected: Tensor) -> None:
    """Bit for bit, except that any NaN equals any NaN and -0 equals 0."""
    assert y.dtype == expected.dtype, f"{y.dtype}, expected {expected.dtype}"
    assert y.shape == expected.shape, f"shape {tuple(y.shape)}, expected {tuple(expected.shape)}"
    bad = ~((y == expected) | (y.isnan() & expected.isnan()))
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements differ; the first at {where}: "
            f"{y[where].item()!r}, expected {expected[where].item()!r}"
        )
