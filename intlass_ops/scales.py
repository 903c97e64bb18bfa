"""Block scales for weights: round-to-nearest (`*_naive`), least error (`*_optimal`), and least error
of the layer's output (`*_optimal_hessian`), for NVFP4, MXFP4, INT4, INT8 and unsigned INT4.

Every quantiser takes ``w`` (float, any shape), cuts ``dim`` into blocks of ``group_size`` and returns

    (scales, codes)        scales [..., K/group_size], codes like w, unpacked
    (scales, zeros, codes) for uint4_*, the asymmetric form, zeros int32 in [0, 15]

with the dequantised tensor (w's dtype) appended where return_dequant is set.

    format   codes                     scales           ŵ
    nvfp4    e2m1 in uint8, 0 … 15     float8_e4m3fn    decode(codes) · scales / global_scale
    mxfp4    e2m1 in uint8, 0 … 15     float8_e8m0fnu   decode(codes) · scales
    int4     int8 in [-7, 7]           float32          codes · scales
    int8     int8 in [-127, 127]       float32          codes · scales
    uint4    int8 in [0, 15]           float32          (codes - zeros) · scales

`*_optimal` minimises Σ (w - ŵ)² of each block, or Σ weights·(w - ŵ)² with ``weights`` >= 0 that
broadcast to w (a diagonal Hessian). `*_optimal_hessian` minimises rᵀ H_j r over the residuals r of
block j, with H_j = X_jᵀ X_j the block of the Gram matrix of the layer's inputs ``X`` [..., K], or given
as ``hessian`` [K/group_size, group_size, group_size]. Both are exact (integer scales: to float32
resolution), rounding is to nearest even, and no block is ever worse than under `*_naive`.
A block of zeros gets scale 1. A block with an infinity or a NaN gets a scale that is not finite and
codes 0, so that it cannot pass for a number. How the searches work: scale_search.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import fp4, reference
from . import scale_search as search

# float64 elements that one chunk of a search may hold at a time (about 0.5 GB with temporaries).
_CHUNK_ELEMENTS = 1 << 23


class _Goal(NamedTuple):
    """What to minimise for the blocks at hand: at most one of the two is given."""

    weights: Tensor | None = None  # [B, g]
    hessian: Tensor | None = None  # [g, g]


# blocks [B, g] float32, goal (None: naive) -> scales [B], zeros [B] or None, codes [B, g]
_Solver = Callable[[Tensor, "_Goal | None"], tuple[Tensor, Tensor | None, Tensor]]


def block_hessians(x: Tensor, group_size: int) -> Tensor:
    """H_j = X_jᵀ X_j, float64 [K/g, g, g], of activations ``x`` [..., K]."""
    k = x.shape[-1]
    if k % group_size:
        raise ValueError(f"block_hessians: K={k} is not a multiple of group_size={group_size}")
    columns = x.reshape(-1, k // group_size, group_size).movedim(1, 0).double()
    return columns.mT @ columns


def _quantize(
    op: str,
    w: Tensor,
    dim: int,
    group_size: int | None,
    solve: _Solver,
    expansion: int,
    goal: str,
    weights: Tensor | None = None,
    x: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Cut ``w`` into blocks, run ``solve`` on chunks of them, put the results back in place."""
    if not w.is_floating_point():
        raise TypeError(f"{op}: w is {w.dtype}; expected a floating-point tensor")
    if w.ndim == 0:
        raise ValueError(f"{op}: w is a scalar; expected at least one dimension")
    rows = w.detach().movedim(dim, -1)
    k = rows.shape[-1]
    g = k if group_size is None else group_size
    if g < 1 or k % g:
        raise ValueError(f"{op}: dimension {dim} of size {k} is not a multiple of group_size={g}")
    blocks = rows.float().reshape(-1, k // g, g)
    n, j = blocks.shape[:2]
    if goal == "hessian":
        if (x is None) == (hessian is None):
            raise ValueError(f"{op}: give either X or hessian")
        h = block_hessians(x, g) if x is not None else hessian
        assert h is not None
        if h.shape != (j, g, g):
            raise ValueError(f"{op}: hessian is {tuple(h.shape)}; expected {(j, g, g)}")
        h = h.to(w.device, torch.float64)
    if weights is not None:
        if bool((weights < 0).any()):
            raise ValueError(f"{op}: weights must not be negative, got {float(weights.min())}")
        weights = weights.expand(w.shape).movedim(dim, -1).reshape(-1, j, g).double()

    # A Hessian belongs to one column of blocks; otherwise all blocks are alike.
    columns = range(j) if goal == "hessian" else [slice(None)]
    step = max(1, _CHUNK_ELEMENTS // (expansion * g * (1 if goal == "hessian" else max(j, 1))))
    scales, zeros = w.new_empty(n, j, dtype=torch.float32), w.new_empty(n, j, dtype=torch.int32)
    codes = w.new_empty(n, j, g, dtype=torch.int8)
    asymmetric = False
    for column in columns:
        for start in range(0, n, step):
            part = (slice(start, start + step), column)
            of = None if goal == "naive" else _Goal(
                weights[part].reshape(-1, g) if weights is not None else None,
                h[column] if goal == "hessian" else None,
            )
            s, z, q = solve(blocks[part].reshape(-1, g), of)
            scales[part] = s.view(scales[part].shape)
            codes[part] = q.view(codes[part].shape)
            if z is not None:
                asymmetric = True
                zeros[part] = z.view(zeros[part].shape)
    shape = (*rows.shape[:-1], j)

    def back(t: Tensor) -> Tensor:
        return t.view(shape).movedim(-1, dim)

    q = codes.view(rows.shape).movedim(-1, dim)
    return back(scales), back(zeros) if asymmetric else None, q
