"""Who takes part in `intlass bench gemm` and `pipeline`: our ops, PyTorch's own, sglang's CUTLASS.

Every contender gets the same numbers: INT4 codes with a scale for each group of 128 or for each
row, INT8 codes with a scale for each row, activations in the dense dtype, and their INT8 codes with
a scale for each token. Its result is compared with the float64 product of what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops import (
    matmul_int4_bf16_tn,
    matmul_int8_bf16_tn,
    pack_int4,
    quantize_int4,
    quantize_int8,
)

GROUP = 128


class Layer:
    """The numbers of one layer [N, K], drawn on its device."""

    def __init__(self, n: int, k: int, device: str, dtype: torch.dtype) -> None:
        self.n, self.k, self.device, self.dtype = n, k, device, dtype
        torch.manual_seed(n + k)
        self.codes4 = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
        self.codes8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        self.group_scales = self._positive(n, k // GROUP).to(torch.bfloat16)
        self.row_scales = self._positive(n)

    def _positive(self, *shape: int) -> Tensor:
        return 1e-3 * (0.5 + torch.rand(*shape, device=self.device))

    def tokens(self, m: int) -> Tokens:
        x = torch.randn(m, self.k, device=self.device).to(self.dtype)
        codes, scales, _ = quantize_int8(x, granularity="token")
        return Tokens(x, codes, scales.view(m, 1))

    def weight(self, bits: int, groups: bool) -> Tensor:
        """The dequantised weight, float64."""
        if bits == 8:
            return self.codes8.double() * self.row_scales.double()[:, None]
        if not groups:
            return self.codes4.double() * self.row_scales.double()[:, None]
        scales = self.group_scales.double().repeat_interleave(GROUP, 1)
        return self.codes4.double() * scales


@dataclass(frozen=True)
class Tokens:
    x: Tensor
    codes: Tensor  # int8
    scales: Tensor  # float32 [M, 1]

    def dequantised(self) -> Tensor:
        return self.codes.double() * self.scales.double()


Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """``weights(layer)`` are copied to be cold; ``call(layer, tokens, weights)`` is timed."""

    name: str
    bits: int
    weights: Callable[[Layer], Weights]
    call: Callable[[Layer, Tokens, Weights], Tensor]
    groups: bool = False
    quantised: bool = False  # whether it is given INT8 activations
    ours: bool = False
    # beyond the rounding of its output, relative to |x| @ |w|: for what it rounds or quantises
    # itself. None where what comes out is no product that could be compared.
    tolerance: float | None = 0.0
    can: Callable[[Layer, int], bool] = field(default=lambda layer, m: True)

    def expected(self, layer: Layer, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The float64 product and |x| @ |w| of the first tokens."""
        x = (tokens.dequantised() if self.quantised else tokens.x.double())[:16]
        w = layer.weight(self.bits, self.groups)
        return x @ w.T, x.abs() @ w.abs().T


def _int4(layer: Layer) -> Weights:
    return pack_int4(layer.codes4), layer.group_scales


def _int4_rows(layer: Layer) -> Weights:
    return pack_int4(layer.codes4), layer.row_scales


def _int8(layer: Layer) -> Weights:
    return (layer.codes8,)


def _dense(layer: Layer) -> Weights:
    return (layer.weight(8, False).to(layer.dtype),)


def gemms() -> Iterator[Contender]:
    """One product; what is quantised was quantised before."""
    yield Contender(
        "dense", 8, _dense, lambda layer, t, w: t.x @ w[0].T, tolerance=2**-8
    )  # its weight is rounded
    yield Contender(
        "w4a16",
        4,
        _int4,
        lambda layer, t, w: matmul_int4_bf16_tn(t.x, *w, out_dtype=layer.dtype),
        groups=True,
        ours=True,
    )
    yield Contender(
        "w8a16",
        8,
        _int8,
        lambda layer, t, w: matmul_int8_bf16_tn(
            t.x, w[0], None, layer.row_scales, out_dtype=layer.dtype
        ),
        ours=True,
    )
    yield Contender(
        "w8a8",
        8,
        _int8,
        lambda layer, t, w: matmul_int8_bf16_tn(
            t.codes, w[0], t.scales, layer.row_scales, out_dtype=layer.dtype
        ),
        quantised=True,
        ours=True,
    )
    for name, weights, groups in (("w4a8", _int4, True), ("w4a8 rows", _int4_rows, False)):
        yield Contender(
            name,
            4,
            weights,
            lambda layer, t, w: matmul_int4_bf16_tn(
                t.codes, *w, a_scale=t.scales, out_dtype=layer.dtype
            ),
            groups=groups,
            quantised=True,
            ours=True,
        )
    yield Contender(
        "torch _weight_int4pack_mm",
        4,
        _tinygemm_weights,
        lambda layer, t, w: torch.ops.aten._weight_int4pack_mm(t.x, w[0], GROUP, w[1]),
        groups=True,
        tolerance=2**-7,  # rounds weights and sums to bf16
        can=lambda layer, m: layer.device != "cpu" and m <= 256,
    )
    yield Contender(
        "torch _int_mm, no scales",
        8,
        _int8,
        lambda layer, t, w: torch._int_mm(t.codes, w[0].T),
        quantised=True,
        tolerance=None,
        can=lambda layer, m: layer.device != "cpu" and m > 16,
    )
    if hasattr(torch.ops.sgl_kernel, "int8_scaled_mm"):
        yield Contender(
            "sglang int8_scaled_mm",
            8,
            _int8,
            lambda layer, t, w: torch.ops.sgl_kernel.int8_scaled_mm(
                t.codes, w[0].T, t.scales, layer.row_scales[:, None], layer.dtype, None
            ),
            quantised=True,
        )


def pipelines() -> Iterator[Contender]:
    """From activations in the dense dtype: whoever needs integers makes them."""
    yield next(gemms())

    def w8a8(layer: Layer, t: Tokens, w: Weights) -> Tensor:
        codes, scales, _ = quantize_int8(t.x, granularity="token")
        return matmul_int8_bf16_tn(codes, w[0], scales, layer.row_scales, out_dtype=layer.dtype)

    def w4a8(layer: Layer, t: Tokens, w: Weights) -> Tensor:
        codes, scales, _ = quantize_int8(t.x, granularity="token")
        return matmul_int4_bf16_tn(codes, *w, a_scale=scales, out_dtype=layer.dtype)

    def w4a4(layer: Layer, t: Tokens, w: Weights) -> Tensor:
        codes, scales, _ = quantize_int4(t.x, granularity="token")
        return matmul_int4_bf16_tn(codes, *w, a_scale=scales, out_dtype=layer.dtype)

    yield Contender("w8a8", 8, _int8, w8a8, ours=True, tolerance=2**-7)
    yield Contender("w4a8", 4, _int4, w4a8, groups=True, ours=True, tolerance=2**-7)
    yield Contender("w4a4", 4, _int4, w4a4, groups=True, ours=True, tolerance=2**-4)
    compiled: Any = torch.compile(_inductor_w8a8, dynamic=False, fullgraph=True)
    yield Contender(
        "inductor int8",
        8,
        _int8,
        lambda layer, t, w: compiled(t.x, w[0], layer.row_scales),
        tolerance=2**-7,
        can=lambda layer, m: layer.device == "cpu" or m > 16,
    )


def _inductor_w8a8(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    codes = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
    return (torch._int_mm(codes, w.T).float() * scale * w_scale).to(x.dtype)


def _tinygemm_weights(layer: Layer) -> Weights:
    codes = (layer.codes4 + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    zeros = torch.zeros_like(layer.group_scales)
    scales = torch.stack([layer.group_scales, zeros], -1).transpose(0, 1).contiguous()
    return packed, scales
