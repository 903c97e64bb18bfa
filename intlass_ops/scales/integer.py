"""Block scales of INT4, INT8 and unsigned INT4; the contract is in the package's __init__.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import block_quantize as bq
from .goal import expand, hessian_goal


def int4_dequantize(scales: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """codes · scales, float32.

    >>> int4_dequantize(torch.tensor([[0.5]]), torch.tensor([[7, -2]]))
    tensor([[ 3.5000, -1.0000]])
    """
    return expand("int4_dequantize", "scales", scales, codes, dim) * codes


def int8_dequantize(scales: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """codes · scales, float32.

    >>> int8_dequantize(torch.tensor([[0.5, 2.0]]), torch.tensor([[100, -3]]))
    tensor([[50., -6.]])
    """
    return expand("int8_dequantize", "scales", scales, codes, dim) * codes


def uint4_dequantize(scales: Tensor, zeros: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """(codes - zeros) · scales, float32.

    >>> uint4_dequantize(torch.tensor([[0.5]]), torch.tensor([[8]]), torch.tensor([[15, 0]]))
    tensor([[ 3.5000, -4.0000]])
    """
    op = "uint4_dequantize"
    shifted = codes.float() - expand(op, "zeros", zeros, codes, dim)
    return expand(op, "scales", scales, codes, dim) * shifted


def int4_naive(
    w: Tensor, dim: int = -1, return_dequant: bool = False, *, group_size: int | None = None
) -> tuple[Tensor, ...]:
    """scale = amax / 7. group_size None: one block.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = int4_naive(w)
    >>> int4_dequantize(s, q)
    tensor([[ 7., -3.,  0.,  1.]])
    """
    return _symmetric("int4_naive", 4, w, dim, return_dequant, group_size, bq.NAIVE)


def int4_optimal(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    group_size: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Least Σ weights·(w - ŵ)² over all scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = int4_optimal(w)
    >>> int4_dequantize(s, q)
    tensor([[ 7.0712, -3.0305,  0.0000,  1.0102]])
    """
    return _symmetric(
        "int4_optimal", 4, w, dim, return_dequant, group_size, bq.Goal(weights=weights)
    )


def int4_optimal_hessian(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    X: Tensor | None = None,
    hessian: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Least rᵀ H_j r over all scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> h = torch.eye(4).expand(1, 4, 4)  # of inputs that are not correlated
    >>> s, q = int4_optimal_hessian(w, hessian=h, group_size=4)
    >>> int4_dequantize(s, q)
    tensor([[ 7.0712, -3.0305,  0.0000,  1.0102]])
    """
    goal = hessian_goal("int4_optimal_hessian", w, dim, group_size, X, hessian)
    return _symmetric("int4_optimal_hessian", 4, w, dim, return_dequant, group_size, goal)


def int8_naive(
    w: Tensor, dim: int = -1, return_dequant: bool = False, *, group_size: int | None = None
) -> tuple[Tensor, ...]:
    """scale = amax / 127. group_size None: one block.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = int8_naive(w)
    >>> int8_dequantize(s, q)
    tensor([[ 7.0000, -3.1969,  0.3858,  0.9921]])
    """
    return _symmetric("int8_naive", 8, w, dim, return_dequant, group_size, bq.NAIVE)


def int8_optimal(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    group_size: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Least Σ weights·(w - ŵ)² over all scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, q = int8_optimal(w)
    >>> int8_dequantize(s, q)
    tensor([[ 7.0000, -3.2000,  0.4000,  1.0000]])
    """
    return _symmetric(
        "int8_optimal", 8, w, dim, return_dequant, group_size, bq.Goal(weights=weights)
    )


def int8_optimal_hessian(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    X: Tensor | None = None,
    hessian: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Least rᵀ H_j r over all scales.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> h = torch.eye(4).expand(1, 4, 4)  # of inputs that are not correlated
    >>> s, q = int8_optimal_hessian(w, hessian=h, group_size=4)
    >>> int8_dequantize(s, q)
    tensor([[ 7.0000, -3.2000,  0.4000,  1.0000]])
    """
    goal = hessian_goal("int8_optimal_hessian", w, dim, group_size, X, hessian)
    return _symmetric("int8_optimal_hessian", 8, w, dim, return_dequant, group_size, goal)


def uint4_naive(
    w: Tensor, dim: int = -1, return_dequant: bool = False, *, group_size: int | None = None
) -> tuple[Tensor, ...]:
    """scale = (max(w, 0) - min(w, 0)) / 15, zero = round(-min(w, 0) / scale).

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, z, q = uint4_naive(w)
    >>> uint4_dequantize(s, z, q)
    tensor([[ 6.8000, -3.4000,  0.6800,  0.6800]])
    """
    return _asymmetric("uint4_naive", w, dim, return_dequant, group_size, bq.NAIVE)


def uint4_optimal(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    group_size: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Least Σ weights·(w - ŵ)² over all scales and the 16 zeros.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> s, z, q = uint4_optimal(w)
    >>> uint4_dequantize(s, z, q)
    tensor([[ 7.0712, -3.0305,  0.0000,  1.0102]])
    """
    return _asymmetric(
        "uint4_optimal", w, dim, return_dequant, group_size, bq.Goal(weights=weights)
    )


def uint4_optimal_hessian(
    w: Tensor,
    dim: int = -1,
    return_dequant: bool = False,
    *,
    X: Tensor | None = None,
    hessian: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, ...]:
    """Least rᵀ H_j r over all scales and the 16 zeros.

    >>> w = torch.tensor([[7.0, -3.2, 0.4, 1.0]])
    >>> h = torch.eye(4).expand(1, 4, 4)  # of inputs that are not correlated
    >>> s, z, q = uint4_optimal_hessian(w, hessian=h, group_size=4)
    >>> uint4_dequantize(s, z, q)
    tensor([[ 7.0712, -3.0305,  0.0000,  1.0102]])
    """
    goal = hessian_goal("uint4_optimal_hessian", w, dim, group_size, X, hessian)
    return _asymmetric("uint4_optimal_hessian", w, dim, return_dequant, group_size, goal)


def _symmetric(
    op: str,
    bits: int,
    w: Tensor,
    dim: int,
    return_dequant: bool,
    group_size: int | None,
    goal: bq.Goal,
) -> tuple[Tensor, ...]:
    solver, levels = bq.integer_solver(bits, symmetric=True), 2 ** (bits - 1) - 1
    scales, _, codes = bq.in_blocks(op, w, dim, group_size, solver, levels, goal)
    if not return_dequant:
        return scales, codes
    return scales, codes, (expand(op, "scales", scales, codes, dim) * codes).to(w.dtype)


def _asymmetric(
    op: str, w: Tensor, dim: int, return_dequant: bool, group_size: int | None, goal: bq.Goal
) -> tuple[Tensor, ...]:
    solver = bq.integer_solver(4, symmetric=False)
    scales, zeros, codes = bq.in_blocks(op, w, dim, group_size, solver, 15, goal)
    codes = codes.to(torch.uint8)
    if not return_dequant:
        return scales, zeros, codes
    return scales, zeros, codes, uint4_dequantize(scales, zeros, codes, dim).to(w.dtype)
