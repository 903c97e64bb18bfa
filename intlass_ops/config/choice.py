"""Which kernel family a problem gets, and why."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .fp4 import Fp4
from .gemm import Gemm, pick_gemm
from .hopper import Hopper, TokenSums, pick_hopper, why_not_hopper
from .problem import BITS, Device, Shape
from .quantize import Quantize
from .skinny import Skinny, pick_skinny, why_not_skinny
from .skinny_ring import SkinnyRing, pick_ring


def _pick_skinny(device: Device, shape: Shape) -> Skinny | SkinnyRing:
    """Rows by the thousand stream through a ring; else every block loads its rows at once.

    Where decoding costs nothing, loading at once is as fast (W8A8, W4A8, W8A16 on an H200).
    """
    w4a16 = BITS[shape.w_kind] == 4 and BITS[shape.x_kind] == 16
    masked = shape.group_size < 512 // BITS[shape.w_kind] and shape.group_size < shape.k
    spills = shape.m > 8 and shape.has_zeros and masked  # by a few bytes, on sm_100
    if w4a16 and shape.n >= 128 * device.sm_count and not spills:
        ring = pick_ring(device, shape)
        if ring is not None:
            return ring
    return pick_skinny(device, shape)


Config = Gemm | Skinny | SkinnyRing | Hopper | TokenSums | Quantize | Fp4


_BATCH_INVARIANT_M = 64  # the tokens that the one kernel of batch_invariant() is picked for


@lru_cache(maxsize=65536)
def pick(device: Device, shape: Shape) -> Gemm | Skinny | SkinnyRing | Hopper:
    """The configuration for a problem: the kernel family by M and device, its tile by shape."""
    if shape.batch_invariant:  # one tile for every M, so one binary: no order that could differ
        return replace(pick_gemm(device, replace(shape, m=_BATCH_INVARIANT_M)), split_k=1)
    if why_not_skinny(shape) is None:
        return _pick_skinny(device, shape)
    if why_not_hopper(device, shape) is None:
        return pick_hopper(device, shape)
    return pick_gemm(device, shape)


def reason(device: Device, shape: Shape) -> str:
    """Why `pick` chose the kernel family it chose."""
    if shape.batch_invariant:
        return "batch_invariant(): one kernel for every M"
    not_skinny = why_not_skinny(shape)
    if not_skinny is None:
        return f"M={shape.m} is bound by reading W once"
    not_hopper = why_not_hopper(device, shape)
    return not_skinny if not_hopper is None else f"{not_skinny}; {not_hopper}"
