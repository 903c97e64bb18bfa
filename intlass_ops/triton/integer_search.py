"""The search over all scales of integer codes (../scale_search.py, `sweep`) as a Triton kernel.

With q the codes nearest to x/s within their range, N = Σ w·x·q and D = Σ w·q², the error is
E(s) = X - s·h(s), X = Σ w·x² and h(s) = 2N - s·D. No other codes of the range do better, so h is a
maximum of straight lines: convex. Between two scales it lies below its chord, and E above

    s·((1-λ)·E(a)/a + λ·E(b)/b) - λ(1-λ)·X·(b-a)²/(ab),   s = (1-λ)·a + λ·b.

A walk from the largest scale to the smallest goes in steps as long as this bound admits no error
below the best known: fifty for INT4 in groups of 128 and two hundred for INT8, each the work of one
error, where a sweep sorts 7 or 127 breakpoints for each element. Each scale on the way offers the
best one for its codes, s + Σ w·q·r / D, too.

Errors are sums of squares in float32, exact to about 1e-6; of two scales whose errors agree so far
either may win. What is found is made the best for its codes in float64, and taken where it is then
better than the scale that the search began with. Blocks are multiplied by a power of two first, so
that squares neither overflow nor vanish.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: of one block, or of short ones together. What is beyond the largest is read
# again for every scale.
_TILE = 64
_LARGEST_TILE = 4096
# Two errors that agree so far count as equal.
_TOLERANCE: tl.constexpr = tl.constexpr(2e-6)
# What differences of sums may be wrong by, of the sums.
_ROUNDING: tl.constexpr = tl.constexpr(3e-7)
# Makes up for the rounding of what is multiplied by it.
_NEARLY_ONE: tl.constexpr = tl.constexpr(1 - 1e-6)
# Of X: an error so small is rounding.
_NOTHING: tl.constexpr = tl.constexpr(1e-13)


@triton.jit
def _load(x_ptr, w_ptr, row, inside, unit, first, g, G: tl.constexpr, WEIGHTED: tl.constexpr):
    """Elements first ... first + G - 1 of each block, [G, R], and their weights."""
    i = first + tl.arange(0, G)
    at = row[None, :] * g + i[:, None]
    mask = (i < g)[:, None] & inside[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0) * unit[None, :]
    if WEIGHTED:
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
    else:
        w = tl.where(mask, 1.0, 0.0)
    return x, w


@triton.jit
def _partial_sums(x, w, t, s, low, high, WEIGHTED: tl.constexpr):
    # 1.5·2^23: adding it leaves no room for a fraction, so the sum is rounded half to even
    q = (x * t[None, :] + 12582912.0) - 12582912.0
    q = tl.minimum(tl.maximum(q, low[None, :]), high[None, :])
    r = x - s[None, :] * q
    p = r
    u = q
    if WEIGHTED:
        p = w * r
        u = w * q
    return tl.sum(p * r, 0), tl.sum(u * r, 0), tl.sum(u * q, 0)


@triton.jit
def _sums(x, w, x_ptr, w_ptr, row, inside, unit, g, t, s, low, high,
    G: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """Σ w·r², Σ w·q·r, Σ w·q² of each block at scale s = 1/t."""
    error, slope, den = _partial_sums(x, w, t, s, low, high, WEIGHTED)
    for first in range(G, g, G):
        x, w = _load(x_ptr, w_ptr, row, inside, unit, first, g, G, WEIGHTED)
        e, c, d = _partial_sums(x, w, t, s, low, high, WEIGHTED)
        error += e
        slope += c
        den += d
    return error, slope, den


@triton.jit
def _partial_strongest(x, w, low, high):
    a = tl.abs(x)
    limit = tl.where(x >= 0, high[None, :], -low[None, :])
    energy = tl.where(limit > 0, w * a * a, 0.0)
    most = tl.max(energy, 0)
    s = tl.where((energy == most[None, :]) & (energy > 0), a / limit, 0.0)
    return most, tl.max(s, 0)


@triton.jit
def _strongest(x, w, x_ptr, w_ptr, row, inside, unit, g, low, high,
    G: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """The scale at which the element of most w·x² has its last code, 0 if there is none.

    There the error is at most X·(1 - 1/g), however the weights lie.
    """
    most, scale = _partial_strongest(x, w, low, high)
    for first in range(G, g, G):
        x, w = _load(x_ptr, w_ptr, row, inside, unit, first, g, G, WEIGHTED)
        more, s = _partial_strongest(x, w, low, high)
        scale = tl.where(more > most, s, scale)
        most = tl.maximum(more, most)
    return scale


@triton.jit
def _partial_reach(x, w, root, low, high):
    a = tl.abs(x)
    limit = tl.where(x >= 0, high[None, :], -low[None, :])
    allowed = root[None, :] * tl.where(w > 0, tl.rsqrt(w), float("inf"))
    excess = tl.maximum(a * _NEARLY_ONE - allowed, 0.0)
    clipped = tl.max(tl.where(excess > 0, excess / limit, 0.0), 0)
    return clipped, tl.sum(w * limit * limit, 0), tl.max(tl.where(limit > 0, a, 0.0), 0)


@triton.jit
def _reach(x, w, x_ptr, w_ptr, row, inside, unit, g, norm, best, low, high,
    G: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """(s, s): scales below the one or above the other are no better than ``best``."""
    root = tl.sqrt(best)
    clipped, largest, top = _partial_reach(x, w, root, low, high)
    for first in range(G, g, G):
        x, w = _load(x_ptr, w_ptr, row, inside, unit, first, g, G, WEIGHTED)
        c, d, a = _partial_reach(x, w, root, low, high)
        clipped = tl.maximum(clipped, c)
        largest += d
        top = tl.maximum(top, a)
    short = (tl.sqrt(norm) * _NEARLY_ONE - root) / tl.sqrt(tl.maximum(largest, 1e-30))
    return tl.maximum(clipped, short) * 0.99999, 2.0 * top


@triton.jit
def _with_best_scale(error, slope, den, s, best, found):
    """(best, found), or the better ones that the codes at scale s have at s + slope/den."""
    shift = tl.where(den > 0, slope / tl.where(den > 0, den, 1.0), 0.0)
    # An overestimate: the same codes are met again nearer to their best scale.
    least = tl.maximum(error - shift * slope, 0.0) + error * _ROUNDING
    better = (error < float("inf")) & (least < best)
    return tl.where(better, least, best), tl.where(better, s + shift, found), better


@triton.jit
def _partial_fit(x, w, s, low, high):
    q = tl.div_rn(x, tl.broadcast_to(s[None, :], x.shape))
    q = tl.minimum(tl.maximum((q + 12582912.0) - 12582912.0, low[None, :]), high[None, :])
    q = q.to(tl.float64)
    x = x.to(tl.float64)
    w = w.to(tl.float64)
    r = x - s.to(tl.float64)[None, :] * q
    return tl.sum(w * r * r, 0), tl.sum(w * x * q, 0), tl.sum(w * q * q, 0)


@triton.jit
def _fit(x, w, x_ptr, w_ptr, row, inside, unit, g, s, low, high,
    G: tl.constexpr, WEIGHTED: tl.constexpr):  # fmt: skip
    """In float64, the error at scale s and the best scale for its codes."""
    error, num, den = _partial_fit(x, w, s, low, high)
    for first in range(G, g, G):
        x, w = _load(x_ptr, w_ptr, row, inside, unit, first, g, G, WEIGHTED)
        e, n, d = _partial_fit(x, w, s, low, high)
        error += e
        num += n
        den += d
    return error, tl.where(den > 0, num / tl.where(den > 0, den, 1.0), 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _walk_kernel(
    x_ptr, w_ptr, unit_ptr, scale_ptr, zero_ptr, count, g, qmax,
    G: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Improves the scale, and the zero where there are ZEROS of them, of ROWS blocks in place."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < count
    unit = tl.load(unit_ptr + row, mask=inside, other=1.0)
    x, w = _load(x_ptr, w_ptr, row, inside, unit, 0, g, G, WEIGHTED)
    given = tl.load(scale_ptr + row, mask=inside, other=1.0)
    start = given * unit
    usable = inside & (start > 0) & (start < float("inf"))
    start = tl.where(usable, start, 1.0)
    start_zero = tl.zeros((ROWS,), tl.float32)
    low, high = start_zero - qmax, start_zero + qmax
    if ZEROS > 0:
        start_zero = tl.load(zero_ptr + row, mask=inside, other=0).to(tl.float32)
        low, high = -start_zero, qmax - start_zero

    zeros = tl.zeros((ROWS,), tl.float32)
    norm, _, _ = _sums(x, w, x_ptr, w_ptr, row, inside, unit, g, zeros, zeros, low, high,
        G, WEIGHTED)  # fmt: skip
    best, _, _ = _sums(x, w, x_ptr, w_ptr, row, inside, unit, g, 1.0 / start, start, low, high,
        G, WEIGHTED)  # fmt: skip
    best = tl.minimum(best, norm)
    found, found_zero = start, start_zero
    usable = usable & (norm > 0)

    for j in range(max(ZEROS, 1)):
        zero = start_zero
        if ZEROS > 0:
            # the zeros nearest to the given one first
            zero += tl.where(j % 2 == 1, (j + 1) // 2, -(j // 2)).to(tl.float32)
            zero = tl.where(zero < 0, zero + ZEROS, zero)
            zero = tl.where(zero >= ZEROS, zero - ZEROS, zero)
            low, high = -zero, qmax - zero
        if WEIGHTED:
            s = _strongest(x, w, x_ptr, w_ptr, row, inside, unit, g, low, high, G, WEIGHTED)
            t = tl.where(s > 0, 1.0 / tl.where(s > 0, s, 1.0), 0.0)
            e, slope, den = _sums(x, w, x_ptr, w_ptr, row, inside, unit, g, t, s, low, high,
                G, WEIGHTED)  # fmt: skip
            best, found, better = _with_best_scale(e, slope, den, s, best, found)
            found_zero = tl.where(better, zero, found_zero)
        bottom, top = _reach(x, w, x_ptr, w_ptr, row, inside, unit, g, norm, best, low, high,
            G, WEIGHTED)  # fmt: skip
        bottom = tl.maximum(bottom, top * 1e-9)
        going = usable & (bottom < top) & (best > norm * _NOTHING)
        t = tl.where(going, 1.0 / tl.where(going, top, 1.0), 1.0)
        end = tl.where(going, 1.0 / tl.where(going, bottom, 1.0), 1.0)
        error = norm  # so large a scale sends all to zero
        step = t
        while tl.max(going.to(tl.int32), 0) > 0:
            ahead = tl.where(going, tl.minimum(t + step, end), t)
            s = 1.0 / ahead
            e, slope, den = _sums(x, w, x_ptr, w_ptr, row, inside, unit, g, ahead, s, low, high,
                G, WEIGHTED)  # fmt: skip
            best, found, better = _with_best_scale(e, slope, den, s, best, found)
            found_zero = tl.where(better, zero, found_zero)

            # the least of the bound on the interval, a quadratic in λ
            d = (ahead - t) / t
            ratio = error / (1.0 + d)
            chord = norm * d * (d / (1.0 + d))
            a2 = chord + d * (ratio - e)
            a1 = (ratio - e) + d * e - chord
            share = tl.minimum(tl.maximum(-0.5 * a1 / tl.where(a2 > 0, a2, 1.0), 0.0), 1.0)
            ends = tl.minimum(e, error)
            bound = tl.where(a2 > 0, e + share * (a1 + share * a2), ends)
            bound -= _ROUNDING * (chord + e + error)
            passed = (bound >= best * (1 - _TOLERANCE)) | (d < 1e-6)
            # The bound falls short of the ends by about norm·d²/4.
            near = tl.sqrt(tl.maximum(ends - best, 0.0) / tl.maximum(ends - bound, 1e-30)) * 0.9
            near = tl.minimum(tl.maximum(near, 0.25), 0.75)
            far = 1.8 * tl.sqrt(tl.maximum(e - best, best * 0.005) / norm)
            far = tl.maximum(far, 1e-6)  # of which float32 can tell
            step = tl.where(passed, ahead * far, (ahead - t) * near)
            t = tl.where(passed, ahead, t)
            error = tl.where(passed, e, error)
            going = going & (t < end) & (best > norm * _NOTHING)

    if ZEROS > 0:
        low, high = -start_zero, qmax - start_zero
    best64, _ = _fit(x, w, x_ptr, w_ptr, row, inside, unit, g, start, low, high, G, WEIGHTED)
    if ZEROS > 0:
        low, high = -found_zero, qmax - found_zero
    whole = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), unit)
    chosen, chosen_zero = start, start_zero
    for _ in range(2):
        # the float32 scale that will be stored, which is not 2^n times ``found`` if subnormal
        found = found * whole * unit
        e, refined = _fit(x, w, x_ptr, w_ptr, row, inside, unit, g, found, low, high, G, WEIGHTED)
        better = (found > 0) & (e < best64)
        best64 = tl.where(better, e, best64)
        chosen = tl.where(better, found, chosen)
        chosen_zero = tl.where(better, found_zero, chosen_zero)
        found = tl.where(refined > 0, refined, found)
    tl.store(scale_ptr + row, chosen * whole, mask=usable)
    if ZEROS > 0:
        tl.store(zero_ptr + row, chosen_zero.to(tl.int32), mask=usable)


def power_of_two_units(x: Tensor) -> Tensor:
    """2^-e for each block [B, g], e the exponent of its largest magnitude: exact to multiply by."""
    exponent = torch.frexp(x.abs().amax(-1)).exponent.clamp(-125, 125)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)


def improve(
    x: Tensor, scale: Tensor, zero: Tensor | None, qmax: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The best (scale, zero) [B, 1] of blocks x [B, g] float32, or those given if none is better.

    Codes lie in [-qmax, qmax] or, with zeros, in [0, qmax]; the zeros are integers among them.
    Blocks of zeros and blocks whose scale is not finite keep it.
    """
    count, g = x.shape
    scale, zero = scale.clone(), None if zero is None else zero.clone()
    tile = min(max(triton.next_power_of_2(g), 16), _LARGEST_TILE)
    rows = max(1, _TILE // tile)
    if weights is not None:
        weights = (weights * power_of_two_units(weights)[:, None]).float().contiguous()
    kernel: Any = _walk_kernel
    if count:
        kernel[(triton.cdiv(count, rows),)](
            x.contiguous(),
            x if weights is None else weights,
            power_of_two_units(x),
            scale,
            scale if zero is None else zero,
            count,
            g,
            float(qmax),
            G=tile,
            ROWS=rows,
            WEIGHTED=weights is not None,
            ZEROS=0 if zero is None else qmax + 1,
            num_warps=max(1, tile // 512),
        )
    return scale, zero
