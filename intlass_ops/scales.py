"""Block scales for weights in NVFP4, MXFP4, INT4, INT8 and unsigned INT4: from the largest
magnitude (`*_naive`), of least error (`*_optimal`), of least output error (`*_optimal_hessian`).

Each takes ``w`` (float, any shape), cuts ``dim`` into blocks of ``group_size`` and returns

    (scales, codes)         scales [..., K/group_size], codes like w, unpacked
    (scales, zeros, codes)  from uint4_*, the asymmetric form; zeros int32 in [0, 15]

with the dequantised tensor (w's dtype) appended where return_dequant is set.

    format   codes                     scales           ŵ
    nvfp4    e2m1 in uint8, 0 … 15     float8_e4m3fn    decode(codes) · scales / global_scale
    mxfp4    e2m1 in uint8, 0 … 15     float8_e8m0fnu   decode(codes) · scales
    int4     int8 in [-7, 7]           float32          codes · scales
    int8     int8 in [-127, 127]       float32          codes · scales
    uint4    uint8 in [0, 15]          float32          (codes - zeros) · scales

`*_optimal` minimises Σ (w - ŵ)² of each block, or Σ weights·(w - ŵ)² with ``weights`` >= 0 that
broadcast to w (a diagonal Hessian). `*_optimal_hessian` minimises rᵀ H_j r over the residuals r of
block j, with H_j = X_jᵀ X_j the block of the Gram matrix of the layer's inputs ``X`` [..., K], or
given as ``hessian`` [K/group_size, group_size, group_size]. Both find the best scale there is
(integer scales: to float32 resolution; e8m0: up to 2^125, above which a code may decode beyond
float32), rounding is to nearest even, and no block is ever worse than under `*_naive`.
A block of zeros gets scale 1. A block with an infinity or a NaN gets a scale that is not finite, so
that it cannot pass for numbers. How the searches work: scale_search.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import block_quantize as bq
from . import fp4


def block_hessians(x: Tensor, group_size: int) -> Tensor:
    """H_j = X_jᵀ X_j, float64 [K/group_size, group_size, group_size], of activations [..., K]."""
    k = x.shape[-1]
    if group_size < 1 or k % group_size:
        raise ValueError(f"block_hessians: K={k} is not a multiple of group_size={group_size}")
    columns = x.reshape(-1, k // group_size, group_size).movedim(1, 0).double()
    return columns.mT @ columns


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
    return _expand(scales, codes, dim) * fp4.decode_e2m1(codes) / global_scale


def mxfp4_dequantize(scales: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """decode(codes) · scales, float32.

    >>> s = torch.tensor([[2.0]]).to(torch.float8_e8m0fnu)
    >>> mxfp4_dequantize(s, torch.tensor([[1, 7]], dtype=torch.uint8))
    tensor([[ 1., 12.]])
    """
    return _expand(scales, codes, dim) * fp4.decode_e2m1(codes)


def int4_dequantize(scales: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """codes · scales, float32.

    >>> int4_dequantize(torch.tensor([[0.5]]), torch.tensor([[7, -2]]))
    tensor([[ 3.5000, -1.0000]])
    """
    return _expand(scales, codes, dim) * codes


def int8_dequantize(scales: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """codes · scales, float32.

    >>> int8_dequantize(torch.tensor([[0.5, 2.0]]), torch.tensor([[100, -3]]))
    tensor([[50., -6.]])
    """
    return _expand(scales, codes, dim) * codes


def uint4_dequantize(scales: Tensor, zeros: Tensor, codes: Tensor, dim: int = -1) -> Tensor:
    """(codes - zeros) · scales, float32.

    >>> uint4_dequantize(torch.tensor([[0.5]]), torch.tensor([[8]]), torch.tensor([[15, 0]]))
    tensor([[ 3.5000, -4.0000]])
    """
    return _expand(scales, codes, dim) * (codes.float() - _expand(zeros, codes, dim))


def _expand(per_block: Tensor, codes: Tensor, dim: int) -> Tensor:
    """One float32 value for each code."""
    values = fp4.scale_values(per_block)
    if not values.shape[dim] or codes.shape[dim] % values.shape[dim]:
        raise ValueError(
            f"dequantize: {values.shape[dim]} blocks do not divide size {codes.shape[dim]} "
            f"of dim={dim}"
        )
    return values.repeat_interleave(codes.shape[dim] // values.shape[dim], dim)


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
    stored, codes = scales.to(torch.float8_e4m3fn), codes.to(torch.uint8)
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
    # The scales are powers of two: this stores them exactly.
    stored, codes = fp4.encode_e8m0_floor(scales), codes.to(torch.uint8)
    if not return_dequant:
        return stored, codes
    return stored, codes, mxfp4_dequantize(stored, codes, dim).to(w.dtype)


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
    return scales, codes, int4_dequantize(scales, codes, dim).to(w.dtype)


def _asymmetric(
    op: str, w: Tensor, dim: int, return_dequant: bool, group_size: int | None, goal: bq.Goal
) -> tuple[Tensor, ...]:
    solver = bq.integer_solver(4, symmetric=False)
    scales, zeros, codes = bq.in_blocks(op, w, dim, group_size, solver, 15, goal)
    codes = codes.to(torch.uint8)
    if not return_dequant:
        return scales, zeros, codes
    return scales, zeros, codes, uint4_dequantize(scales, zeros, codes, dim).to(w.dtype)


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
    goal = _hessian("nvfp4_optimal_hessian", w, dim, group_size, X, hessian)
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
    goal = _hessian("mxfp4_optimal_hessian", w, dim, group_size, X, hessian)
    return _mxfp4("mxfp4_optimal_hessian", w, dim, return_dequant, group_size, goal)


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
    goal = _hessian("int4_optimal_hessian", w, dim, group_size, X, hessian)
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
    goal = _hessian("int8_optimal_hessian", w, dim, group_size, X, hessian)
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
    goal = _hessian("uint4_optimal_hessian", w, dim, group_size, X, hessian)
    return _asymmetric("uint4_optimal_hessian", w, dim, return_dequant, group_size, goal)


def _hessian(
    op: str, w: Tensor, dim: int, group_size: int | None, x: Tensor | None, hessian: Tensor | None
) -> bq.Goal:
    """The goal given by activations or by their Hessian blocks, whichever the caller passed."""
    if (x is None) == (hessian is None):
        raise ValueError(f"{op}: give either X or hessian")
    if x is not None:
        if x.shape[-1] != w.shape[dim]:
            raise ValueError(
                f"{op}: X has {x.shape[-1]} columns, dim={dim} of w has {w.shape[dim]}"
            )
        hessian = block_hessians(x, w.shape[dim] if group_size is None else group_size)
    return bq.Goal(hessian=hessian)
