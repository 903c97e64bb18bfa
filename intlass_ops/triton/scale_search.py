"""The search over the scales of FP4 blocks (../scale_search.py, `grid_search`) as a Triton kernel.

In float64 like the search in PyTorch, and with its answer for every block: a tile of blocks stays
in registers while the grid is walked down and up from the scale of the largest magnitude, and is
encoded then and there, since launches cost more than all of this. Integer codes:
integer_search.py. Under a Hessian: hessian_search.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of the tile of one warp: twice as many spill registers on sm_90.
_TILE = 128


@triton.jit
def _halves(y):
    """2·e2m1(y), ties to even, for y >= 0 in float64."""
    y = tl.minimum(y, 6.0)
    step = tl.where(y < 2.0, 1.0, tl.where(y < 4.0, 2.0, 4.0)).to(tl.float64)
    per_step = tl.where(y < 2.0, 2.0, tl.where(y < 4.0, 1.0, 0.5)).to(tl.float64)
    # 1.5·2^52: adding it leaves no room for a fraction, so the sum is rounded half to even
    return ((y * per_step + 6755399441055744.0) - 6755399441055744.0) * step


@triton.jit
def _error(a, w, s):
    """Σ w·(a - s·Q(a/s))² of each block: a >= 0 and w [G, R], s [R]."""
    # The product with 1/s may fall on the other side of a tie, where both codes err equally.
    r = a - (0.5 * s)[None, :] * _halves(a * (1.0 / s)[None, :])
    return tl.sum(w * r * r, 0)


@triton.jit(do_not_specialize=["count"])
def _grid_kernel(
    x_ptr, w_ptr, by_ptr, grid_ptr, scale_ptr, codes_ptr, count, last,
    G: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Best scales and codes of ROWS blocks of x·by. The walk goes on each way only as far as the
    error that is certain (clipped elements going down, dead ones going up) is within the best.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < count
    at = row[None, :] * G + tl.arange(0, G)[:, None]
    x = tl.load(x_ptr + at, mask=inside[None, :], other=0.0)
    a = tl.abs(x).to(tl.float64) * tl.load(by_ptr)
    amax = tl.max(tl.where(a < float("inf"), a, 0.0), 0)
    finite = tl.min((a < float("inf")).to(tl.int32), 0) > 0
    usable = finite & (amax > 0)
    a = tl.where(usable[None, :], a, 0.0)
    w = tl.full((G, ROWS), 1.0, tl.float64)
    if WEIGHTED:
        w = tl.load(w_ptr + at, mask=inside[None, :], other=0.0)

    # The last scale that does not clip, by bisection; where to begin does not decide where to end.
    start = tl.zeros((ROWS,), tl.int32)
    above = start + last + 1
    for _ in tl.static_range(STEPS):
        middle = (start + above) // 2
        fits = tl.load(grid_ptr + middle) * 6.0 <= amax
        start = tl.where(fits, middle, start)
        above = tl.where(fits, above, middle)
    best = start
    best_error = _error(a, w, tl.load(grid_ptr + start))

    index = start - 1
    going = usable & (index >= 0)
    while tl.max(going.to(tl.int32), 0) > 0:
        s = tl.load(grid_ptr + tl.maximum(index, 0))
        over = tl.maximum(a - 6.0 * s[None, :], 0.0)
        going = going & (tl.sum(w * over * over, 0) <= best_error)
        error = _error(a, w, s)
        better = going & (error <= best_error)
        best = tl.where(better, index, best)
        best_error = tl.where(better, error, best_error)
        index -= 1
        going = going & (index >= 0)

    index = start + 1
    going = usable & (index <= last)
    while tl.max(going.to(tl.int32), 0) > 0:
        s = tl.load(grid_ptr + tl.minimum(index, last))
        dead = tl.where(a < 0.25 * s[None, :], a, 0.0)
        going = going & (tl.sum(w * dead * dead, 0) <= best_error)
        error = _error(a, w, s)
        better = going & (error < best_error)
        best = tl.where(better, index, best)
        best_error = tl.where(better, error, best_error)
        index += 1
        going = going & (index <= last)

    s = tl.load(grid_ptr + best)
    unusable = tl.where(finite, 1.0, float("nan"))
    tl.store(scale_ptr + row, tl.where(usable, s, unusable).to(tl.float32), mask=inside)
    q = _halves(a / tl.broadcast_to(s[None, :], a.shape)).to(tl.int32)
    code = tl.where(q <= 4, q, tl.where(q <= 8, q // 2 + 2, 7))
    negative = x.to(tl.int32, bitcast=True) < 0
    # A block of zeros keeps their signs; one that is not finite gets codes 0.
    code = tl.where(usable[None, :] | (x == 0), tl.where(negative, code + 8, code), 0)
    tl.store(codes_ptr + at, code.to(tl.int8), mask=inside[None, :])


def grid_search(
    x: Tensor, by: float, grid: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scales [B] float32, e2m1 codes [B, g] int8) of least error for the blocks of x·by.

    x [B, g] float32, g a power of two; grid, ascending, and weights [B, g] float64. A block of
    zeros has scale 1, one that is not finite NaN.
    """
    count, g = x.shape
    scales = torch.empty(count, device=x.device)
    codes = torch.empty_like(x, dtype=torch.int8)
    rows = max(1, _TILE // g)
    kernel: Any = _grid_kernel
    if count:
        kernel[(triton.cdiv(count, rows),)](
            x.contiguous(),
            x if weights is None else weights.contiguous(),
            torch.full((1,), by, dtype=torch.float64, device=x.device),
            grid,
            scales,
            codes,
            count,
            grid.numel() - 1,
            G=g,
            ROWS=rows,
            WEIGHTED=weights is not None,
            STEPS=grid.numel().bit_length(),
            num_warps=1,
        )
    return scales, codes
