"""Quantised linears in ways that nobody had thought of when the lowering was written.

Same form as `spelling_zoo.SPELLINGS`: a name to (maker of module and input, what becomes of its
products). Each was once declined without need, or did not compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spelling_zoo import BF16, Case, G, K, N, Spelled, codes8, int4, packed4, per_token, scales
from torch import Tensor
from torch.nn import functional


def _case(
    call: Callable[[Any, Tensor], Tensor],
    x: tuple[int, ...] = (5, K),
    dtype: torch.dtype = BF16,
    **more: Callable[[], Tensor],
) -> Callable[[], Case]:
    """Symmetric INT4 codes p with scales s in groups, INT8 codes w, and what else is asked for."""

    def make() -> Case:
        torch.manual_seed(0)
        buffers = {"p": packed4(N, K), "s": scales(N, K // G, dtype=dtype), "w": codes8(N, K)}
        buffers |= {name: each() for name, each in more.items()}
        return Spelled(call, **buffers), torch.randn(x).to(dtype)

    return make


def _columns() -> Tensor:
    return (torch.rand(K) + 0.5).to(BF16)


def _rows() -> Tensor:
    return scales(N, 1)


def _bytes(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 256, shape).to(torch.uint8)


def _sinq(m: Any, x: Tensor) -> Tensor:
    return torch.matmul(x, (int4(m.p, m.s) * m.c).t())


def _six_bits_in_three_bytes(m: Any, x: Tensor) -> Tensor:
    """The shifts are a constant that the forward makes."""
    parts = m.b.view(N, K // 4, 3).int()
    word = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
    q = ((word.unsqueeze(-1) >> torch.tensor([0, 6, 12, 18])) & 63).flatten(-2)
    return functional.linear(x, (q.to(x.dtype) - 32) * m.r)


def _three_bits_across_words(m: Any, x: Tensor) -> Tensor:
    bits = ((m.b.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).view(N, K, 3)
    q = (bits * torch.tensor([1, 2, 4])).sum(-1)
    return functional.linear(x, (q.to(x.dtype) - 4) * m.r)


def _put_in_order(m: Any, x: Tensor) -> Tensor:
    w = torch.zeros(N, K, dtype=x.dtype).index_copy(1, m.order, int4(m.p, m.s))
    return functional.linear(x, w)


def _shared_exponents(m: Any, x: Tensor) -> Tensor:
    """Scales are the exponents of float32 numbers: most of a byte's are too large for float16."""
    scale = (m.e.to(torch.int32) << 23).view(torch.float32).to(x.dtype)
    return functional.linear(x, int4(m.p, scale))


def _dora(m: Any, x: Tensor) -> Tensor:
    w = int4(m.p, m.s)
    return functional.linear(x, w) * (m.g / w.float().norm(dim=1)).to(x.dtype)


def _both_fake_quantised(m: Any, x: Tensor) -> Tensor:
    x8 = torch.fake_quantize_per_tensor_affine(x.float(), 0.03, 3, -128, 127)
    w8 = torch.fake_quantize_per_tensor_affine(m.f, 0.03, 0, -128, 127)
    return functional.linear(x8, w8).to(x.dtype)


def _stored_row_sums(m: Any, x: Tensor) -> Tensor:
    q = ((x.float() / m.a).round() + 5).clamp(-128, 127).to(torch.int8)
    acc = torch._int_mm(q, m.w.t()) - 5 * m.sums
    return (acc.float() * (m.a * m.c)).to(x.dtype)


def _scaled_columns_of_codes(m: Any, x: Tensor) -> Tensor:
    q, s = per_token(x)
    return functional.linear((q.float() * s).to(x.dtype), m.w.to(x.dtype) * m.r * m.c)


def _sign_in_the_top_bit(m: Any, x: Tensor) -> Tensor:
    q = (m.q & 7).to(x.dtype) * (1 - 2 * (m.q >> 3).to(x.dtype))
    return functional.linear(x, q * m.r)


def _two_halves(m: Any, x: Tensor) -> Tensor:
    return functional.linear(x, ((m.q.to(x.dtype) - 8) * 16 + m.low.to(x.dtype)) * m.r)


def _nibbles() -> Tensor:
    return torch.randint(0, 16, (N, K)).to(torch.uint8)


def _pointwise(dims: int) -> Callable[[Any, Tensor], Tensor]:
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]

    def call(m: Any, x: Tensor) -> Tensor:
        y = convolve(x, int4(m.p, m.s)[(..., *[None] * dims)], m.bias)
        return y if x.stride(1) == 1 else y.view(len(x), -1)  # of the strides that it had

    return call


def _channels_last() -> Case:
    module, x = _case(_pointwise(2), (2, K, 3, 4), bias=lambda: torch.ones(N).to(BF16))()
    return module, x.to(memory_format=torch.channels_last)


SPELLINGS: dict[str, tuple[Callable[[], Case], list[str]]] = {
    "scales of rows and of columns (SINQ)": (_case(_sinq, c=_columns), ["w4a16"]),
    "divided by scales of columns": (
        _case(lambda m, x: functional.linear(x, int4(m.p, m.s) / m.c), (2, 3, K), c=_columns),
        ["w4a16"],
    ),
    "scales of columns in those of groups, weight left": (
        _case(lambda m, x: (m.w.to(x.dtype) * (m.r * m.c[None])) @ x, (K, 5), r=_rows, c=_columns),
        ["w8a16"],
    ),
    "scales of columns of quantised activations": (
        _case(_scaled_columns_of_codes, r=_rows, c=_columns),
        ["w8a16"],
    ),
    "used along its rows": (
        _case(lambda m, x: x @ (m.w.to(x.dtype) * m.r), (5, N), r=_rows),
        ["w8a16"],
    ),
    "scaled by the norm of the weight (DoRA)": (_case(_dora, g=lambda: scales(N)), ["w4a16"]),
    "six bits in three bytes": (
        _case(_six_bits_in_three_bytes, b=_bytes(N, K * 3 // 4), r=_rows),
        ["w8a16"],
    ),
    "three bits across bytes": (
        _case(_three_bits_across_words, b=_bytes(N, K * 3 // 8), r=_rows),
        ["w4a16"],
    ),
    "columns put in order": (_case(_put_in_order, order=lambda: torch.randperm(K)), ["w4a16"]),
    "shared exponents, float16": (
        _case(
            _shared_exponents,
            dtype=torch.float16,
            e=lambda: torch.randint(118, 124, (N, K // G)).to(torch.uint8),
        ),
        ["w4a16"],
    ),
    "both fake_quantized": (_case(_both_fake_quantised, f=lambda: torch.randn(N, K)), ["w8a8"]),
    "int_mm less stored row sums": (
        _case(
            _stored_row_sums,
            (20, K),
            a=lambda: torch.tensor(0.03),
            sums=lambda: torch.randint(-999, 999, (N,)).int(),
            c=lambda: scales(N).float(),
        ),
        ["w8a8"],
    ),
    "sign in the top bit": (_case(_sign_in_the_top_bit, q=_nibbles, r=_rows), ["w4a16"]),
    "eight bits in two halves": (
        _case(_two_halves, q=_nibbles, low=_nibbles, r=_rows),
        ["w8a16"],
    ),
    "floats that are made integers": (
        _case(
            lambda m, x: functional.linear(x, m.q.to(torch.int8).to(x.dtype) * m.r),
            q=lambda: torch.randint(-8, 8, (N, K)).to(BF16),
            r=_rows,
        ),
        ["w4a16"],
    ),
    **{
        f"convolution in {dims} dimensions": (
            _case(
                _pointwise(dims), (2, K, 3, 4, 2)[: 2 + dims], bias=lambda: torch.ones(N).to(BF16)
            ),
            ["w4a16"],
        )
        for dims in (1, 2, 3)
    },
    "convolution, channels last": (_channels_last, ["w4a16"]),
}
