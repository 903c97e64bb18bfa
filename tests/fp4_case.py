"""FP4 operands, what they are exactly, and the ops that multiply them.

Not here: tests (test_block_scaled.py, test_block_scaled_tiles.py, test_triton_gemm.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import intlass_ops as ia
from intlass_ops import fp4, fused_quantize, packing
from intlass_ops.rotation import hadamard_matrix


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
