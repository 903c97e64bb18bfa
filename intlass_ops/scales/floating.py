"""Block scales of NVFP4 and MXFP4; the contract is in the package's __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import block_quantize as bq
from .. import fp4
from .goal import expand, hessian_goal


def nvfp4_global_scale(w: Tensor) -> float:
    """448·6 / amax(w), which maps the largest block scale to the largest e4m3."""
    amax = float(w.detach().abs().amax()) if w.numel() else 0.0
    return fp4.E4M3_MAX * fp4.E2M1_MAX / amax if 0 < amax < float("inf") else 1.0


def nvfp4_dequantize(
    scales: Tensor, codes: Tensor, dim: int = -1, *, global_scale: float = 1.0
) -> Tensor:
    """decode(codes) · scales / global_scale, float32.

    >>> s = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    >>> nvfp4_dequantize(s, torch.tensor([[1, 7]], dtype=torch.uint8), global_scale=4.0)
    tensor([[0.2500, 3.0000]])
    """
    values = expand("nvfp4_dequantize", "scales", scales, codes, dim)
    return values * fp4.decode_e2m1(codes) / global_scale


def mxfp4_dequantize(scales: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """decode(codes) · scales, float32.

    >>> s = torch.tensor([[2.0]]).to(torch.float8_e8m0fnu)
    >>> mxfp4_dequantize(s, torch.tensor([[1, 7]], dtype=torch.uint8))
    tensor([[ 1., 12.]])
    """
    return expand("mxfp4_dequantize", "scales", scales, codes, dim) * fp4.decode_e2m1(codes)


def nvfp4_naive(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    group_size: int = 16,
    global_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Block scale e4m3(amax·global_scale / 6).

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = nvfp4_naive(w, group_size=4)
    >>> nvfp4_dequantize(s, q)
    tensor([[ 6.7500, -3.3750,  0.5625,  1.1250]])
    """
    return _nvfp4("nvfp4_naive", w, dim, return_dequant, group_size, global_scale, bq.NAIVE)


def nvfp4_optimal(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    group_size: int = 16,
    global_scale: float = 1.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Least Σ weights·(w - ŵ)² over the 126 positive e4m3 scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = nvfp4_optimal(w, group_size=4)
    >>> nvfp4_dequantize(s, q)
    tensor([[ 6.7500, -3.3750,  0.5625,  1.1250]])
    """
    return _nvfp4(
        "nvfp4_optimal", w, dim, return_dequant, group_size, global_scale, bq.Goal(weights=weights)
    )


def nvfp4_optimal_hessian(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    X: Tensor | None = None,
    hessian: Tensor | None = None,
    group_size: int = 16,
    global_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Least rᵀ H_j r over the 126 positive e4m3 scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> h = torch.eye(4).expand(1, 4, 4)  # of inputs that are not correlated
    >>> s, q = nvfp4_optimal_hessian(w, hessian=h, group_size=4)
    >>> nvfp4_dequantize(s, q)
    tensor([[ 6.7500, -3.3750,  0.5625,  1.1250]])
    """
    goal = hessian_goal("nvfp4_optimal_hessian", w, dim, group_size, X, hessian)
    return _nvfp4("nvfp4_optimal_hessian", w, dim, return_dequant, group_size, global_scale, goal)


def mxfp4_naive(
    w: Tensor, dim: int = -1, return_dequant: bool = False, *, group_size: int = 32
) -> tuple[Tensor, ...]:
    """Block scale 2^(floor(log2 amax) - 2), as OCP MX v1.0 has it; the top may saturate.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = mxfp4_naive(w, group_size=4)
    >>> mxfp4_dequantize(s, q)
    tensor([[ 6.0000, -3.0000,  0.5000,  1.0000]])
    """
    return _mxfp4("mxfp4_naive", w, dim, return_dequant, group_size, bq.NAIVE)


def mxfp4_optimal(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    group_size: int = 32,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Least Σ weights·(w - ŵ)² over the 255 e8m0 scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = mxfp4_optimal(w, group_size=4)
    >>> mxfp4_dequantize(s, q)
    tensor([[ 6.0000, -3.0000,  0.5000,  1.0000]])
    """
    return _mxfp4("mxfp4_optimal", w, dim, return_dequant, group_size, bq.Goal(weights=weights))


def mxfp4_optimal_hessian(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    X: Tensor | None = None,
    hessian: Tensor | None = None,
    group_size: int = 32,
) -> tuple[Tensor, ...]:
    """Least rᵀ H_j r over the 255 e8m0 scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> h = torch.eye(4).expand(1, 4, 4)  # of inputs that are not correlated
    >>> s, q = mxfp4_optimal_hessian(w, hessian=h, group_size=4)
    >>> mxfp4_dequantize(s, q)
    tensor([[ 6.0000, -3.0000,  0.5000,  1.0000]])
    """
    goal = hessian_goal("mxfp4_optimal_hessian", w, dim, group_size, X, hessian)
    return _mxfp4("mxfp4_optimal_hessian", w, dim, return_dequant, group_size, goal)


def _nvfp4(
    op: str,
    w: Tensor,
    dim: int,
    return_dequant: bool,
    group_size: int,
    global_scale: float,
    goal: bq.Goal,
) -> tuple[Tensor, ...]:
    solver = bq.nvfp4_solver(op, w.device, global_scale)
    scales, _, codes = bq.in_blocks(op, w, dim, group_size, solver, 1, goal)
    stored, codes = scales.to(torch.float8_e4m3fn), codes.view(torch.uint8)
    if not return_dequant:
        return stored, codes
    return (
        stored,
        codes,
        nvfp4_dequantize(stored, codes, dim, global_scale=global_scale).to(w.dtype),
    )


def _mxfp4(
    op: str, w: Tensor, dim: int, return_dequant: bool, group_size: int, goal: bq.Goal
) -> tuple[Tensor, ...]:
    scales, _, codes = bq.in_blocks(op, w, dim, group_size, bq.mxfp4_solver(w.device), 1, goal)
    # The scales are powers of two or NaN: the exponent of the float32 is the byte of e8m0.
    stored = (scales.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)
    codes = codes.view(torch.uint8)
    if not return_dequant:
        return stored, codes
    return stored, codes, mxfp4_dequantize(stored, codes, dim).to(w.dtype)
