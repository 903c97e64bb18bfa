"""The searches of ../scale_search.py under a Hessian, as Triton kernels for CUDA tensors.

With H = L Lᵀ the error rᵀ H r is |rL|², a sum of squares that float32 holds well even where H is
nearly singular. Same results to float32 rounding, as in scale_search.py beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integer_search import power_of_two_units

_ROWS = 16
# Breakpoints that one program of an integer search tries at a time.
_EVENTS = 32


@triton.jit
def _fp4_error(a, sign, factor, s):
    """|(x - s·Q(x/s)) L|² over the last axis; x = sign·a [R, G], s [R]. Q: e2m1, ties to even."""
    y = tl.minimum(tl.div_rn(a, tl.broadcast_to(s[:, None], a.shape)), 6.0)
    step = tl.where(y < 2.0, 0.5, tl.where(y < 4.0, 1.0, 2.0))
    per_step = tl.where(y < 2.0, 2.0, tl.where(y < 4.0, 1.0, 0.5))
    # 1.5·2^23: adding it leaves no room for a fraction, so the sum is rounded half to even
    q = ((y * per_step + 12582912.0) - 12582912.0) * step
    u = tl.dot(sign * (a - s[:, None] * q), factor, input_precision="ieee")
    return tl.sum(u * u, 1)


@triton.jit
def _grid_kernel(
    x_ptr, factor_ptr, per_floor_ptr, whole_ptr, unit_ptr, grid_ptr, start_ptr, out_ptr,
    count, last, columns, g, slope,
    G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Best scale of ROWS blocks of a column: walk the grid down and up from the start, each way
    only as far as the error that is certain is within the best. ``per_floor`` is 1/λmin, so that
    Σ r² is within best·per_floor; |xL| - s·``slope`` <= √best bounds s from below whatever λmin is.
    """
    column = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)) * columns + column
    inside = row < count
    i = tl.arange(0, G)
    factor = tl.load(factor_ptr + (column * G + i[:, None]) * G + i[None, :])
    per_floor = tl.load(per_floor_ptr + column)
    unit = tl.load(unit_ptr + row, mask=inside, other=1.0)
    at = row[:, None] * g + i[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None] & (i < g)[None, :], other=0.0) * unit[:, None]
    a, sign = tl.abs(x), tl.where(x < 0, -1.0, 1.0)
    whole = tl.load(whole_ptr + row, mask=inside, other=0.0)
    amax = tl.max(a, 1)
    start = tl.load(start_ptr + row, mask=inside, other=0)
    best = start
    best_error = _fp4_error(a, sign, factor, tl.load(grid_ptr + start) * unit)

    index = start - 1
    going = inside & (index >= 0)
    while tl.max(going.to(tl.int32), 0) > 0:
        s = tl.load(grid_ptr + tl.maximum(index, 0)) * unit
        over = tl.maximum(a - 6.0 * s[:, None], 0.0)
        going = going & (tl.sum(over * over, 1) <= best_error * per_floor)
        going = going & (whole - s * slope <= tl.sqrt(best_error) * 1.00001)
        error = _fp4_error(a, sign, factor, s)
        better = going & (error <= best_error)
        best = tl.where(better, index, best)
        best_error = tl.where(better, error, best_error)
        index -= 1
        going = going & (index >= 0)

    # The first scale that sends all to zero stands for those above it.
    index = start + 1
    going = inside & (index <= last) & (tl.load(grid_ptr + start) * unit * 0.25 < amax)
    while tl.max(going.to(tl.int32), 0) > 0:
        s = tl.load(grid_ptr + tl.minimum(index, last)) * unit
        dead = tl.where(a < 0.25 * s[:, None], a, 0.0)
        going = going & (tl.sum(dead * dead, 1) <= best_error * per_floor)
        error = _fp4_error(a, sign, factor, s)
        better = going & (error < best_error)
        best = tl.where(better, index, best)
        best_error = tl.where(better, error, best_error)
        index += 1
        going = going & (index <= last) & (s * 0.25 < amax)
    tl.store(out_ptr + row, best, mask=inside)


@triton.jit
def _sweep_kernel(
    x_ptr, turned_ptr, factor_ptr, unit_ptr, budget_ptr, limit_ptr, out_ptr, columns, ranges, g,
    LEVELS: tl.constexpr, G: tl.constexpr, EVENTS: tl.constexpr,
):  # fmt: skip
    """Best scale of one block for one range of codes: every breakpoint |x|/(k + ½) is tried.

    Just below a breakpoint the codes q are known; with u = qL and v = xL (``turned``) the best
    scale is uv/uu, held between that breakpoint and the next, and the error |v - s·u|².
    """
    row = tl.program_id(0).to(tl.int64)
    codes = tl.program_id(1)
    qmin, qmax = tl.load(limit_ptr + 2 * codes), tl.load(limit_ptr + 2 * codes + 1)
    unit = tl.load(unit_ptr + row)
    i = tl.arange(0, G)
    factor = tl.load(factor_ptr + (row % columns * G + i[:, None]) * G + i[None, :])
    x = tl.load(x_ptr + row * g + i, mask=i < g, other=0.0)
    v = tl.load(turned_ptr + row * G + i)
    limit = tl.where(x >= 0, qmax, -qmin)
    a, sign = tl.abs(x) * unit, tl.where(x < 0, -1.0, 1.0)
    excess = tl.maximum(a - tl.sqrt(tl.load(budget_ptr + row)), 0.0)
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
                upper = ae / ((k + 0.5) * 1.000001)
                inverse = tl.where(ae > 0, 1.0 / tl.where(ae > 0, upper, 1.0), 0.0)
                q = tl.minimum(tl.floor(a[None, :] * inverse[:, None] + 0.5), limit[None, :])
                following = tl.where(q < limit[None, :], a[None, :] / (q + 0.5), 0.0)
                lower = tl.minimum(tl.max(following, 1), upper)
                u = tl.dot(q * sign[None, :], factor, input_precision="tf32x3")
                den = tl.sum(u * u, 1)
                valid = (k < event_limit) & (ae > 0) & (den > 0)
                s = tl.sum(u * v[None, :], 1) / tl.where(valid, den, 1.0)
                s = tl.minimum(tl.maximum(s, lower), upper)
                r = v[None, :] - s[:, None] * u
                valid = valid & (s > 0)
                error = tl.where(valid, tl.sum(r * r, 1), float("inf"))
                least = tl.min(error, 0)
                scale = tl.max(tl.where(error == least, s, 0.0), 0)
                best_scale = tl.where(least < best_error, scale, best_scale)
                best_error = tl.minimum(least, best_error)
    tl.store(out_ptr + row * ranges + codes, best_scale / unit)


def _factors(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each H [J, g, g]: L [J, G, G] float64 with L Lᵀ = H / λmax, zero padded to a power of two
    from 16; λmin / λmax [J], or a bound below it where the eigensolver's rounding hides it; λmax.
    """
    g, width = hessian.shape[-1], _width(hessian.shape[-1])
    values, vectors = torch.linalg.eigh(hessian.double())
    # Of inputs that are all zero nothing is left: any scale will do.
    largest = values[:, -1].clamp(min=1e-300)
    values = values.clamp(min=0) / largest[:, None]
    factors = values.new_zeros(hessian.shape[0], width, width)
    factors[:, :g, :g] = vectors * values.sqrt()[:, None]
    return factors, (values[:, 0] - 1e-14 * g).clamp(min=0), largest


def _width(g: int) -> int:
    return max(int(triton.next_power_of_2(g)), 16)


def _turned(x: Tensor, unit: Tensor, factors: Tensor) -> Tensor:
    """(x·unit) L of each block, [B, G] float64."""
    columns, g = factors.shape[0], x.shape[1]
    scaled = (x.double() * unit[:, None]).view(-1, columns, g).movedim(1, 0)
    return (scaled @ factors[:, :g]).movedim(0, 1).reshape(x.shape[0], -1)


def grid_search(x: Tensor, start: Tensor, grid: Tensor, hessian: Tensor) -> Tensor:
    """`scale_search.grid_search` for FP4 codes: x [B, g], start [B]; hessian [J, g, g], where block
    i belongs to H[i % J]."""
    count, g = x.shape
    columns = hessian.shape[0]
    out = start.to(torch.int32)
    if not count:
        return out.long()
    factors, floors, _ = _factors(hessian)
    unit = power_of_two_units(x)
    kernel: Any = _grid_kernel
    kernel[(triton.cdiv(count // columns, _ROWS), columns)](
        x.float().contiguous(),
        factors.float(),
        (1.0001 / floors.clamp(min=1e-30)).float(),
        _turned(x, unit, factors).norm(dim=-1).float(),
        unit,
        grid.float(),
        start.to(torch.int32),
        out,
        count,
        grid.numel() - 1,
        columns,
        g,
        6.0 * g**0.5 * 1.00001,
        G=_width(g),
        ROWS=_ROWS,
    )
    return out.long()


def sweep(x: Tensor, limits: list[tuple[int, int]], hessian: Tensor, error: Tensor) -> Tensor:
    """`scale_search.sweep_hessian` for each of the limits: x [B, g]; hessian [J, g, g], where block
    i belongs to H[i % J]; error [B] that some scale reaches. float32 [B, len(limits)]."""
    count, g = x.shape
    columns = hessian.shape[0]
    out = torch.empty(count, len(limits), device=x.device)
    if not count:
        return out
    factors, floors, largest = _factors(hessian)
    unit = power_of_two_units(x)
    # Of Σ r², since rᵀHr >= λmin·Σ r²; where λmin is 0 nothing is ruled out.
    least = floors * largest
    budget = torch.where(least > 0, error.double().view(-1, columns) / least, torch.inf)
    kernel: Any = _sweep_kernel
    kernel[(count, len(limits))](
        x.float().contiguous(),
        _turned(x, unit, factors).float(),
        factors.float(),
        unit,
        (budget.flatten() * unit.double() ** 2).float(),
        torch.tensor(limits, dtype=torch.float32, device=x.device),
        out,
        columns,
        len(limits),
        g,
        LEVELS=max(max(-low, high) for low, high in limits),
        G=_width(g),
        EVENTS=min(_EVENTS, _width(g)),
        num_warps=8 if g > 64 else 4,
    )
    return out
