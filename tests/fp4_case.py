"""FP4 operands and weights, what they are exactly, and the ops that multiply them.

Not here: tests (test_block_scaled.py, test_block_scaled_tiles.py, test_triton_gemm.py,
test_fp4_linear.py), checkpoints (tiny_checkpoints.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import intlass_ops as ia
from intlass_ops import fp4, fused_quantize, packing
from intlass_ops.rotation import hadamard_matrix

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Fp4Weight:
    """w[n, k] = e2m1(q[n, k])·scale[n, g]·global_scale; MXFP4 where g = k // 32, else NVFP4."""

    q: Tensor  # [N, K]
    s: Tensor  # [N, G] the bytes of e8m0 (MXFP4) or e4m3 (NVFP4)
    global_scale: float = 1.0  # as float32 has it

    @property
    def is_mx(self) -> bool:
        return 32 * self.s.shape[1] == self.q.shape[1]

    def packed(self) -> Tensor:
        return (self.q[:, ::2] | self.q[:, 1::2] << 4).to(torch.uint8)

    def exact(self) -> Tensor:
        """In float64, from the formats' definitions alone."""
        values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)[self.q]
        bits = self.s.double()
        if self.is_mx:
            scales = 2 ** (bits - 127)
        else:
            exponent, fraction = (bits % 128 / 8).floor(), bits % 8 / 8
            size = torch.where(exponent == 0, fraction, 1 + fraction)  # 0: subnormal
            sign = torch.where(bits < 128, 1, -1)
            scales = sign * size * 2 ** (exponent.clamp(min=1) - 7)
        group = values.shape[1] // scales.shape[1]
        return values * scales.repeat_interleave(group, 1) * self.global_scale

    def dense(self) -> Tensor:
        return self.exact().float()


def draw_fp4(n: int, k: int, seed: int, *, group: int, global_scale: float = 1.0) -> Fp4Weight:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), generator=rng)
    low, high = (121, 125) if group == 32 else (0x28, 0x40)
    s = torch.randint(low, high, (n, k // group), generator=rng).to(torch.uint8)
    if group == 16:
        s[::7, 0] = torch.arange(len(s[::7])) % 8  # zero and the subnormal ones
    return Fp4Weight(q, s, torch.tensor(global_scale).item())


def quantized(format_: str, rows: int, k: int, method: str, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and plain scales of randn·25, as QuTLASS tests with."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 25
    h = hadamard_matrix(16)
    if format_ == "mx":
        codes, scales = fused_quantize.fused_quantize_mx(x, h, method=method)
    else:
        codes, scales = fused_quantize.fused_quantize_nv(x, h, 3.0, method=method)
    return codes, scales


def exact(codes: Tensor, scales: Tensor) -> Tensor:
    k = codes.shape[-1] * 2
    values = fp4.decode_e2m1(packing.unpack(codes, k, signed=False), torch.float64)
    s = fp4.scale_values(scales, torch.float64)
    return values * s.repeat_interleave(k // s.shape[-1], -1)


def op_of(format_: str, blocked: bool) -> Callable[..., Tensor]:
    if format_ == "mx":
        return ia.matmul_mxf4_bf16_tn if blocked else ia.matmul_ada_mxf4_bf16_tn

    def nv(*args: Any, **options: Any) -> Tensor:
        return ia.matmul_nvf4_bf16_tn(*args, blocked=blocked, **options)

    return nv


def ordered(scales: Tensor, blocked: bool) -> Tensor:
    return fp4.to_blocked(scales) if blocked else scales
