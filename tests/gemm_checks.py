"""One GEMM call against the oracle: bit for bit, or by the tolerance rule.

Which calls: strategies.py. What they must give: oracle.py.
"""

from __future__ import annotations

import oracle
import torch
from gemm_case import Case, build, float32_is_exact
from strategies import BF16
from tolerance import assert_close, assert_identical

from intlass_ops import matmul_int4_bf16_tn, matmul_int8_bf16_tn


def check_exact(case: Case, device: str) -> None:
    """Bit-equal, but that a result that is infinite or NaN may be either."""
    call = build(case, device)
    assert float32_is_exact(call), "the test's own numbers are too large"
    y, exact = call.run(), call.expected().y
    ill = ~exact.isfinite()
    assert not y[ill].isfinite().any()
    assert_identical(y[~ill], oracle.round_to(exact, case.out_dtype)[~ill])
    assert y.shape == exact.shape


def check_bounded(case: Case, device: str) -> None:
    call = build(case, device, numbers="random")
    y = call.run()
    assert y.dtype == case.out_dtype
    assert_close(y, *call.expected())


def check_large_sum(w: str, m: int, n: int, device: str) -> None:
    """2^t + 2^(t-8) + 1: as a float32 it loses the 1, which decides how bf16 rounds the rest."""
    k, code, top = {"s4": (1 << 16, 7, 25), "s8": (4096, 127, 25)}[w]
    target = 2**top + 2 ** (top - 8) + 1
    codes = torch.full((1, k), code, dtype=torch.int8)
    codes[0, -1] = 1
    a = torch.zeros(k, dtype=torch.int64)
    steps, a[-1] = target // code, target % code
    a[:-1] = steps // (k - 1)
    a[: steps % (k - 1)] += 1
    assert int(a.max()) <= 127
    assert int(a @ codes[0].long()) == target
    activations = a.to(torch.int8).to(device).expand(m, k)
    scale = torch.ones((), device=device)
    if w == "s8":
        y = matmul_int8_bf16_tn(activations, codes.to(device).expand(n, k), None, scale)
    else:
        packed = oracle.pack(codes).to(device)
        y = matmul_int4_bf16_tn(activations, packed.expand(n, packed.shape[1]), scale)
    assert y.dtype == BF16
    assert (y == 2**top + 2 ** (top - 7)).all(), f"{y.unique().tolist()} for {target}"
