"""The searches of ../scale_search.py without a Hessian, as Triton kernels for CUDA tensors.

Same results to float32 rounding: of two scales whose errors agree to about 1e-6 either may win.
Blocks are multiplied by a power of two first, so that squares neither overflow nor vanish.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program of an integer search holds tiles [_EVENTS, g] in registers.
_EVENTS = 32
_ROWS = 16


@triton.jit
def _fp4_error(a, w, s):
    """Σ w·(a - s·Q(a/s))² over the last axis; a >= 0 [R, G], s [R]. Q: e2m1, ties to even."""
    y = tl.minimum(tl.div_rn(a, tl.broadcast_to(s[:, None], a.shape)), 6.0)
    step = tl.where(y < 2.0, 0.5, tl.where(y < 4.0, 1.0, 2.0))
    per_step = tl.where(y < 2.0, 2.0, tl.where(y < 4.0, 1.0, 0.5))
    # 1.5·2^23: adding it leaves no room for a fraction, so the sum is rounded half to even
    q = ((y * per_step + 12582912.0) - 12582912.0) * step
    r = a - s[:, None] * q
    return tl.sum(w * r * r, 1)


@triton.jit
def _grid_kernel(
    x_ptr, w_ptr, unit_ptr, grid_ptr, start_ptr, out_ptr, count, last,
    G: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Best scale of ROWS blocks: walk the grid down and up from the start, each way only as far as
    the error that is certain (clipped elements going down, dead ones going up) is within the best.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    at = row[:, None] * G + tl.arange(0, G)[None, :]
    unit = tl.load(unit_ptr + row, mask=inside, other=1.0)
    a = tl.abs(tl.load(x_ptr + at, mask=inside[:, None], other=0.0)) * unit[:, None]
    w = tl.full((ROWS, G), 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(w_ptr + at, mask=inside[:, None], other=0.0)
    start = tl.load(start_ptr + row, mask=inside, other=0)
    best = start
    best_error = _fp4_error(a, w, tl.load(grid_ptr + start) * unit)

    index = start - 1
    going = inside & (index >= 0)
    while tl.max(going.to(tl.int32), 0) > 0:
        s = tl.load(grid_ptr + tl.maximum(index, 0)) * unit
        over = tl.maximum(a - 6.0 * s[:, None], 0.0)
        going = going & (tl.sum(w * over * over, 1) <= best_error)
        error = _fp4_error(a, w, s)
        better = going & (error <= best_error)
        best = tl.where(better, index, best)
        best_error = tl.where(better, error, best_error)
        index -= 1
        going = going & (index >= 0)

    index = start + 1
    going = inside & (index <= last)
    while tl.max(going.to(tl.int32), 0) > 0:
        s = tl.load(grid_ptr + tl.minimum(index, last)) * unit
        dead = tl.where(a < 0.25 * s[:, None], a, 0.0)
        going = going & (tl.sum(w * dead * dead, 1) <= best_error)
        error = _fp4_error(a, w, s)
        better = going & (error < best_error)
        best = tl.where(better, index, best)
        best_error = tl.where(better, error, best_error)
        index += 1
        going = going & (index <= last)
    tl.store(out_ptr + row, best, mask=inside)


@triton.jit
def _sweep_kernel(
    x_ptr, w_ptr, unit_ptr, budget_ptr, limit_ptr, out_ptr, columns, g,
    LEVELS: tl.constexpr, G: tl.constexpr, EVENTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Best scale of one block for one range of codes: every breakpoint |x|/(k + ½) is tried.

    Just below a breakpoint the codes are known, and with them the best scale and its error.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    qmin, qmax = tl.load(limit_ptr + 2 * column), tl.load(limit_ptr + 2 * column + 1)
    unit = tl.load(unit_ptr + row)
    i = tl.arange(0, G)
    x = tl.load(x_ptr + row * g + i, mask=i < g, other=0.0)
    limit = tl.where(x >= 0, qmax, -qmin)
    a = tl.abs(x) * unit
    w = tl.full((G,), 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(w_ptr + row * g + i, mask=i < g, other=0.0)
    budget = tl.load(budget_ptr + row)

    # Clipping bounds the scale from below, as in scale_bounds.
    excess = tl.maximum(a - tl.where(w > 0, tl.sqrt(budget / w), float("inf")), 0.0)
    low = tl.max(tl.where(excess > 0, excess / limit, 0.0), 0) * 0.99999
    best_error = tl.full((), float("inf"), tl.float32)
    best_scale = tl.full((), float("nan"), tl.float32)
    for first in range(0, G, EVENTS):
        e = first + tl.arange(0, EVENTS)
        xe = tl.load(x_ptr + row * g + e, mask=e < g, other=0.0)
        event_limit = tl.where(xe >= 0, qmax, -qmin)
        ae = tl.abs(xe) * unit
        top = tl.max(ae, 0)
        for k in range(LEVELS):
            if top >= low * (k + 0.5):
                # a little below the breakpoint, lest rounding decide on which side of it we are
                inverse = tl.where(ae > 0, (k + 0.5) * 1.000001 / ae, 0.0)
                q = tl.minimum(tl.floor(a[None, :] * inverse[:, None] + 0.5), limit[None, :])
                num = tl.sum(w[None, :] * a[None, :] * q, 1)
                den = tl.sum(w[None, :] * q * q, 1)
                valid = (k < event_limit) & (den > 0)
                s = tl.where(valid, num / tl.where(valid, den, 1.0), 0.0)
                r = a[None, :] - s[:, None] * q
                error = tl.where(valid, tl.sum(w[None, :] * r * r, 1), float("inf"))
                least = tl.min(error, 0)
                scale = tl.max(tl.where(error == least, s, 0.0), 0)
                best_scale = tl.where(least < best_error, scale, best_scale)
                best_error = tl.minimum(least, best_error)
    tl.store(out_ptr + row * columns + column, best_scale / unit)


def power_of_two_units(x: Tensor) -> Tensor:
    """2^-e for each block [B, g], e the exponent of its largest magnitude: exact to multiply by."""
    exponent = torch.frexp(x.abs().amax(-1)).exponent.clamp(-125, 125)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)


def grid_search(x: Tensor, start: Tensor, grid: Tensor, weights: Tensor | None = None) -> Tensor:
    """`scale_search.grid_search` for FP4 codes: x [B, g] float32, g a power of two."""
    count, g = x.shape
    out = start.to(torch.int32)
    kernel: Any = _grid_kernel
    if count:
        kernel[(triton.cdiv(count, _ROWS),)](
            x.contiguous(),
            x if weights is None else weights.float().contiguous(),
            power_of_two_units(x),
            grid.float(),
            start.to(torch.int32),
            out,
            count,
            grid.numel() - 1,
            G=g,
            ROWS=_ROWS,
            WEIGHTED=weights is not None,
        )
    return out.long()


def sweep(
    x: Tensor, limits: list[tuple[int, int]], budget: Tensor, weights: Tensor | None = None
) -> Tensor:
    """`scale_search.sweep`: x [B, g] float32, budget [B]; float32 [B, len(limits)]."""
    count, g = x.shape
    out = torch.empty(count, len(limits), device=x.device)
    unit = power_of_two_units(x)
    kernel: Any = _sweep_kernel
    if count:
        kernel[(count, len(limits))](
            x.contiguous(),
            x if weights is None else weights.float().contiguous(),
            unit,
            (budget.double() * unit.double() ** 2).float(),
            torch.tensor(limits, dtype=torch.float32, device=x.device),
            out,
            len(limits),
            g,
            LEVELS=max(max(-low, high) for low, high in limits),
            G=triton.next_power_of_2(g),
            EVENTS=min(_EVENTS, triton.next_power_of_2(g)),
            WEIGHTED=weights is not None,
        )
    return out
