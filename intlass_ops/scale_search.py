"""Exact searches for the scale of one block: the mathematics behind scales/.

For a block x[g] and codes q = Q(x/s), minimise over s one of

    Σ (x - s·q)²        plain
    Σ w·(x - s·q)²      weighted, w >= 0 (a diagonal Hessian)
    rᵀ H r, r = x - s·q    H [g, g], positive semidefinite

either over a finite grid of scales (FP4: `grid_search`) or over all s > 0 (integers: `sweep`,
`sweep_hessian`). Everything here is float64 on [B, g] blocks that are finite; scales/ shapes,
chunks, and treats zero and non-finite blocks.

What can be ruled out without trying it. Let some scale reach error E0, so that a better one has
Σ w·r² <= budget, with budget = E0, or E0/λmin(H) under a Hessian because rᵀHr >= λmin·Σr².
Writing Qmax for the largest code and d0 for half the smallest step:
    clipping   every element has √w·(|x| - Qmax·s) <= √budget, a lower bound on s;
    dead zone  s·d0 > |x| sends x to zero and costs w·x²: with |x| ascending and k the number of
               prefix sums of w·x² within the budget, s <= |x|[k] / d0 (no bound when k = g).
Both are as in the qwantize method, with its Hessian budget made exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Bounds are widened by this much, so that rounding in them never excludes the optimum.
_SLACK = 1e-9
_FLOAT32_STEP = 2.0**-23


def block_error(r: Tensor, weights: Tensor | None = None, hessian: Tensor | None = None) -> Tensor:
    """Error [B] of residuals r [B, g]: weights broadcast to r, hessian [g, g] or [J, g, g], where
    block i belongs to the (i % J)th."""
    if hessian is not None:
        if hessian.ndim == 2:
            return ((r @ hessian) * r).sum(-1)
        columns: Tensor = r.unflatten(0, (-1, hessian.shape[0])).movedim(1, 0)
        return ((columns @ hessian) * columns).sum(-1).T.flatten()
    return (r * r if weights is None else weights * r * r).sum(-1)


def smallest_eigenvalue(hessian: Tensor) -> float:
    """A lower bound on λmin(H) >= 0 that allows for the eigensolver's rounding."""
    # On the host: a decomposition of this size costs less there than its launches on a GPU.
    eigenvalues = torch.linalg.eigvalsh(hessian.cpu())
    rounding = 1e-14 * hessian.shape[-1] * float(eigenvalues.abs().max())
    return max(float(eigenvalues.min()) - rounding, 0.0)


def residual_budget(error: Tensor, hessian: Tensor | None) -> Tensor:
    """Largest Σ w·r² that a scale at least as good as ``error`` can have."""
    if hessian is None:
        return error
    floor = smallest_eigenvalue(hessian)
    return error / floor if floor > 0 else torch.full_like(error, torch.inf)


def scale_bounds(
    x: Tensor, budget: Tensor, qmax: Tensor | float, d0: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(low, high) [B]: no scale outside leaves Σ w·r² within ``budget`` [B]; qmax broadcasts."""
    a = x.abs()
    w = torch.ones_like(a) if weights is None else weights.expand_as(a)
    allowed = torch.where(w > 0, (budget[:, None] / w.clamp(min=1e-300)).sqrt(), torch.inf)
    # An element that has no code at all (qmax 0) bounds nothing when it may be dropped entirely.
    excess = (a - allowed).clamp(min=0) / qmax
    low = torch.where(excess.isnan(), 0.0, excess).amax(-1)
    ascending, order = a.sort(-1)
    prefix = (w.gather(-1, order) * ascending * ascending).cumsum(-1)
    k = (prefix <= budget[:, None] * (1 + _SLACK)).sum(-1)
    first = ascending.gather(-1, k.clamp(max=x.shape[-1] - 1)[:, None]).squeeze(-1)
    high = torch.where(k < x.shape[-1], first / d0, torch.inf)
    return low * (1 - _SLACK), high * (1 + _SLACK)


def _reach(x: Tensor, error: Tensor, hessian: Tensor, qmax: float) -> Tensor:
    """Scales [B] below which no codes come within ``error`` [B], however singular H is.

    |s·q| <= s·qmax for each element, so √(rᵀHr) >= √(xᵀHx) - s·qmax·√(g·λmax).
    """
    largest = torch.linalg.eigvalsh(hessian)[-1].clamp(min=1e-300)
    missing = block_error(x, None, hessian).clamp(min=0).sqrt() - error.clamp(min=0).sqrt()
    slope: Tensor = qmax * (x.shape[-1] * largest).sqrt()
    return missing.clamp(min=0) / slope * (1 - 1e-6)


def grid_search(
    x: Tensor,
    start: Tensor,
    grid: Tensor,
    quantize: Callable[[Tensor], Tensor],
    qmax: float,
    d0: float,
    *,
    weights: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Tensor:
    """Index [B] of the best scale in ``grid`` [C] (ascending); of equally good ones, the smallest.

    start [B] is the index of any reasonable scale: its error is the budget.
    """

    def error_of(index: Tensor, rows: Tensor) -> Tensor:
        s = grid[index][:, None]
        part = x[rows]
        w = weights[rows] if weights is not None and weights.shape[0] > 1 else weights
        return block_error(part - s * quantize(part / s), w, hessian)

    everything = torch.arange(x.shape[0], device=x.device)
    best = start.clone()
    best_error = error_of(start, everything)
    budget = residual_budget(best_error, hessian)
    s_low, s_high = scale_bounds(x, budget, qmax, d0, weights)
    if hessian is not None:
        s_low = torch.maximum(s_low, _reach(x, best_error, hessian, qmax))
    low = torch.searchsorted(grid, s_low).clamp(max=grid.numel() - 1)
    high = torch.searchsorted(grid, s_high, right=True) - 1
    # The first scale that sends all to zero stands for those above it.
    high = torch.minimum(high, torch.searchsorted(grid, x.abs().amax(-1) / d0))
    for step in range(int((high - low).max()) + 1 if x.shape[0] else 0):
        rows = (low + step <= high).nonzero().squeeze(-1)
        index = low[rows] + step
        error = error_of(index, rows)
        better = (error < best_error[rows]) | ((error == best_error[rows]) & (index < best[rows]))
        rows, index, error = rows[better], index[better], error[better]
        best[rows], best_error[rows] = index, error
    return best


def _breakpoints(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where codes change as s falls from infinity: (s, element, k) [B, g·levels], s descending.

    |q| of an element goes from k to k + 1 at s = |x| / (k + ½).
    """
    steps = torch.arange(levels, device=x.device)
    unsorted = (x.abs()[:, :, None] / (steps + 0.5)).flatten(1)
    order = _descending(unsorted)
    # Small tables are read faster than integers are divided.
    element = torch.arange(x.shape[1], device=x.device).repeat_interleave(levels)[order]
    return unsorted.gather(-1, order), element, steps.repeat(x.shape[1])[order]


def _descending(s: Tensor) -> Tensor:
    """Indices [B, n] that sort each row downwards: NumPy does it several times faster on a CPU."""
    if s.device.type != "cpu":
        return s.argsort(-1, descending=True)
    return torch.from_numpy(np.argsort(-s.numpy(), -1))


def sweep(
    x: Tensor, limits: list[tuple[int, int]], budget: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Best scale [B, len(limits)] for integer codes within each (qmin, qmax), qmin <= 0 <= qmax.

    Between two breakpoints the codes are constant and Σ w(x - sq)² has its minimum at
    s = Σwxq / Σwq², where it is Σwx² - (Σwxq)²/Σwq². Both sums are running sums over the sorted
    breakpoints. Whether that s lies in its interval need not be checked: rounding to nearest at
    that s only does better, and the best s overall is the minimum of its own interval.
    NaN where no scale keeps within ``budget`` (see `residual_budget`).
    """
    w = torch.ones_like(x) if weights is None else weights.expand_as(x)
    s, element, k = _breakpoints(x, max(max(-qmin, qmax) for qmin, qmax in limits))
    gain, cost = (w * x.abs()).gather(-1, element), w.gather(-1, element) * (2 * k + 1)
    positive = (x >= 0).gather(-1, element)
    result = x.new_full((x.shape[0], len(limits)), torch.nan)
    for column, (qmin, qmax) in enumerate(limits):
        low, high = scale_bounds(x, budget, torch.where(x >= 0, qmax, -qmin), 0.5, weights)
        rows = (low <= high).nonzero().squeeze(-1)
        if not rows.numel():
            continue
        # The optimum's interval begins at a breakpoint above the lower bound.
        n = int((s[rows] >= low[rows, None]).sum(-1).max())
        num, den = gain[rows, :n], cost[rows, :n]
        if -qmin != qmax:
            allowed = k[rows, :n] < torch.where(positive[rows, :n], qmax, -qmin)
            num, den = num * allowed, den * allowed
        num, den = num.cumsum(-1), den.cumsum(-1)
        at = torch.where(den > 0, num * num / den, 0.0).argmax(-1, keepdim=True)
        result[rows, column] = (num.gather(-1, at) / den.gather(-1, at)).squeeze(-1)
    return result


def sweep_hessian(
    x: Tensor, limits: tuple[int, int], hessian: Tensor, budget: Tensor | None = None
) -> Tensor:
    """Best scale [B] for integer codes within (qmin, qmax) under rᵀHr.

    Rounding to nearest is not optimal for a Hessian, so here each interval's minimum is clamped to
    the interval. q changes by one element at a breakpoint: xᵀHq, qᵀHq and Hq are updated, not
    recomputed. ``budget`` (see `residual_budget`) skips the breakpoints that cannot matter.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    levels = max(-limits[0], limits[1])
    s, element, k = _breakpoints(x, levels)
    limit = torch.where(x >= 0, limits[1], -limits[0]).to(x.dtype)
    allowed = k < limit.gather(-1, element)
    hx = x @ hessian
    xhx = (hx * x).sum(-1)
    low = torch.zeros_like(xhx)
    if budget is not None:
        low, _ = scale_bounds(x, budget, limit, 0.5)
    hq = torch.zeros_like(x)
    xhq, qhq = torch.zeros_like(xhx), torch.zeros_like(xhx)
    best_s, best_error = s[:, 0].clone(), xhx.clone()
    for step in range(int((s >= low[:, None]).sum(-1).max()) if x.numel() else 0):
        i = element[:, step]
        sign = torch.where(allowed[:, step], torch.where(x[rows, i] >= 0, 1.0, -1.0), 0.0)
        xhq += sign * hx[rows, i]
        qhq += sign * (2 * hq[rows, i] + sign * hessian[i, i])
        hq += sign[:, None] * hessian[i]
        upper = s[:, step]
        lower = s[:, step + 1] if step + 1 < s.shape[1] else torch.zeros_like(upper)
        at = torch.where(qhq > 0, xhq / qhq, upper)
        at = torch.minimum(torch.maximum(at, lower), upper)
        error = xhx - 2 * at * xhq + at * at * qhq
        # Of breakpoints that coincide only the last leaves codes that some float32 scale has.
        apart = upper - lower > _FLOAT32_STEP * upper
        better = (error < best_error) & (at > 0) & apart
        best_s = torch.where(better, at, best_s)
        best_error = torch.where(better, error, best_error)
    return best_s
