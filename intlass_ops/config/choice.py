"""Which configuration a problem gets, and why: measured if a table has it, else predicted."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from . import tuned
from .experts import ExpertTiles
from .fp4 import DecodeFp4, MxRange
from .gemm import Gemm
from .gemm_tiles import gemm_candidates, pick_gemm
from .hopper import Hopper, TokenSums, why_not_hopper
from .hopper_tiles import hopper_candidates, pick_hopper
from .problem import (
    BITS,
    LUT4,
    Device,
    Grouping,
    Shape,
    groups_of_chunk,
    groups_spread,
    scales_are_split,
    weights_take_scales,
    widens,
    without_wgmma,
)
from .quantize import Quantize
from .rotate_hopper import RotateHopper
from .rotate_quantize import RotateQuantize
from .skinny import Skinny, pick_skinny, skinny_candidates, why_not_skinny
from .skinny_held import SkinnyHeld, held_candidates, pick_held, why_not_held
from .skinny_mx import SkinnyMx
from .skinny_ring import SkinnyRing, pick_ring, ring_candidates, why_not_ring
from .store_rows import StoreRows
from .transposed import Transposed
from .transposed_wgmma import TransposedWgmma
from .widen import Widen

Matmul = Gemm | Skinny | SkinnyRing | SkinnyHeld | SkinnyMx | Hopper
Rewriting = DecodeFp4 | MxRange | Widen | StoreRows
Tools = TokenSums | ExpertTiles | Quantize | RotateQuantize | RotateHopper | Rewriting
Config = Matmul | Transposed | TransposedWgmma | Tools

_BATCH_INVARIANT_M = 64  # the tokens that the one kernel of batch_invariant() is picked for


def pick(device: Device, shape: Shape) -> Matmul:
    """The configuration for a problem: the kernel family by M and device, its tile by shape."""
    return _choose(device, shape)[0]


def reason(device: Device, shape: Shape) -> str:
    """Why `pick` chose what it chose."""
    return _choose(device, shape)[1]


def predicted(device: Device, shape: Shape) -> Matmul:
    """The configuration without any table."""
    shape = shape.on(device)
    if why_not_skinny(shape) is None and not _few_tokens_for_hopper(device, shape):
        by_groups = groups_spread(shape) and BITS[shape.x_kind] == 16
        if shape.w_kind in LUT4 and shape.n > 64 * device.sm_count:
            by_groups = False
        held = None if by_groups else pick_held(device, shape)
        if held is not None:
            return held
        ring = pick_ring(device, shape) if _streams(device, shape) and not by_groups else None
        if ring is not None:
            return ring
        # INT8 times INT4 of many rows, where nothing is held: the H200's tuner took gemm.cu
        kinds = BITS[shape.x_kind], BITS[shape.w_kind]
        if kinds == (8, 4) and shape.m > 8 and shape.n >= 128 * device.sm_count:
            return pick_gemm(device, shape)
        return pick_skinny(device, shape)
    if why_not_hopper(device, shape) is None:
        return pick_hopper(device, shape)
    return pick_gemm(device, shape)


def _few_tokens_for_hopper(device: Device, shape: Shape) -> bool:
    """Whether hopper.cu beats the kernels for few tokens: INT8 weights, which need no decoding.

    With INT8 activations by 0, 3, 9 and 20 % at 1, 4, 8 and 16 tokens, under 16-bit ones by 6 % at
    16 (beside the pick without wgmma, on 17 to 19 layers of benchmarks/results/h200-layers.json).
    And large INT4 ones that take their scales by one FMA, at 16 tokens by 2 to 33 % on eight
    layers (five are there, three the tuned table's); on smaller ones what is predicted is up to
    13 % slower than skinny_held.cu. And INT4 ones with one scale a row under INT8 activations, at
    16 tokens by 1 to 25 % on the six layers of the tuned table. And large ones whose groups lie
    within a chunk, where they take scales, and INT8 ones in groups of 16 (two layers, kernels.md).
    And NF4 at 16 tokens, by 5 to 8 % on three of four layers (kernels.md).
    """
    if why_not_hopper(device, shape) is not None:
        return False
    kinds = BITS[shape.x_kind], BITS[shape.w_kind]
    if kinds == (8, 4) and shape.group_size >= shape.k:
        return shape.m > 8 and shape.n * shape.k >= 127_000 * device.sm_count
    if BITS[shape.w_kind] == 8:  # in groups of 16 each token has four columns of skinny.cu
        return BITS[shape.x_kind] == 8 or shape.m > (4 if groups_of_chunk(shape) > 2 else 8)
    much = shape.n * shape.k >= 490_000 * device.sm_count
    if shape.w_kind in LUT4:
        enough = shape.n * shape.k >= 200_000 * device.sm_count
        return shape.m > 8 and (much or (enough and (groups_spread(shape) or shape.k > 8192)))
    if groups_spread(shape) and weights_take_scales(shape):
        return shape.m > 8 and shape.n > 32 * device.sm_count
    one_fma = weights_take_scales(shape) and not scales_are_split(shape)
    one_fma = one_fma and (shape.x_kind, shape.w_kind) == ("bf16", "s4")
    return shape.m > 8 and one_fma and not shape.has_zeros and shape.group_size % 128 == 0 and much


def _streams(device: Device, shape: Shape) -> bool:
    """Whether W goes through a ring: much of it for an SM. Else every block loads its rows at once.

    Few tokens of 21 layers (benchmarks/results/h200-layers.json): with one a ring is faster from
    about 3584x3584 on, with four to sixteen where there are more than 8000 rows.
    """
    if why_not_ring(shape) is not None:
        return False
    few = 1 if shape.w_kind in LUT4 else 2
    fewest_tokens = shape.m <= few and shape.n * shape.k >= 80_000 * device.sm_count
    return fewest_tokens or shape.n >= 64 * device.sm_count


def of_int4(c: Matmul, k: int) -> Matmul | None:
    """The same tile for INT4 activations that are INT8 to the GPU's tensor cores.

    None: they have to be INT8 in memory. Sums of K products are 256 times too large in between, and
    must not exceed an int32.
    """
    few_tokens = isinstance(c, Skinny | SkinnyHeld)
    return replace(c, x_kind="s4") if few_tokens and k < 1 << 17 else None


def in_lane_order(c: Matmul, k: int, aligned: bool) -> Matmul:
    """The same tile for activations as lanes (packing.py), if rows are whole vectors."""
    whole = aligned and k % 32 == 0
    return replace(c, lane_order=True) if isinstance(c, Hopper) and whole else c


def takes_lanes(device: Device, shape: Shape) -> bool:
    """Whether what is picked is faster with INT8 activations as lanes.

    With one scale a row it is up to 256 tokens, from 1024 on it is not (docs/notes/hopper.md).
    """
    in_groups = shape.group_size < shape.k
    if (shape.x_kind, BITS[shape.w_kind]) != ("s8", 4) or not (in_groups or shape.m <= 256):
        return False
    c = in_lane_order(pick(device, shape), shape.k, shape.aligned)
    return isinstance(c, Hopper) and c.lane_order


@lru_cache(maxsize=4096)
def pick_mx_integers(device: Device, shape: Shape) -> Hopper | None:
    """What multiplies MXFP4 by MXFP4 as INT8, where that is faster if it is exact.

    It is where the scales of each row lie within a factor of 8 (mx_codes.cu). INT32 holds sums of
    2^17 such products.
    """
    mxfp4 = (shape.x_kind, shape.scale_type) == ("e2m1", "e8m0")
    m, n, k = shape.m, shape.n, shape.k
    # Microseconds of an H200: what twice the rate gains, and what codes cost, some of it in vain
    gain, cost = 1.5e-9 * m * n * k, 12 + 5e-7 * (m + n) * k
    if not mxfp4 or gain < 2 * cost or not 0 < k <= 1 << 17 or k % 128:
        return None
    return tile_of_integers(device, shape)


def tile_of_integers(device: Device, shape: Shape) -> Hopper | None:
    """What multiplies MXFP4 by MXFP4 as INT8, however small the product is."""
    of_rows = replace(shape, scale_type="float", group_size=shape.k, blocked=False)
    c = pick(device, replace(of_rows, x_kind="s8", w_kind="s8"))
    return replace(c, only_if=0) if isinstance(c, Hopper) else None


def candidates(device: Device, shape: Shape) -> list[Matmul]:
    """All that the tuner measures and that a table may ask for, the predicted one first."""
    shape = shape.on(device)
    found: list[Matmul] = [predicted(device, shape), pick_gemm(device, shape)]
    if why_not_skinny(shape) is None:
        found += skinny_candidates(device, shape)
        found += ring_candidates(device, shape) if why_not_ring(shape) is None else ()
        found += held_candidates(device, shape) if why_not_held(shape) is None else ()
    else:
        found += gemm_candidates(device, shape, measured=True)
    if why_not_hopper(device, shape) is None:
        found += [c for c, _ in hopper_candidates(device, shape)]
    return list(dict.fromkeys(found))


@lru_cache(maxsize=65536)
def _choose(device: Device, shape: Shape) -> tuple[Matmul, str]:
    if widens(device, shape.x_kind):
        c, why = _choose(device, shape.on(device))
        return c, f"activations widened to INT8 first; {why}"
    if shape.batch_invariant:  # one tile for every M, so one binary: no order that could differ
        c = replace(pick_gemm(device, replace(shape, m=_BATCH_INVARIANT_M)), split_k=1)
        return c, "batch_invariant(): one kernel for every M"
    best = _measured(device, shape)
    if best is not None:
        return best
    not_skinny, not_hopper = why_not_skinny(shape), why_not_hopper(device, shape)
    if not_skinny is None:
        why = f"M={shape.m} is bound by reading W once"
    else:
        why = not_skinny if not_hopper is None else f"{not_skinny}; {not_hopper}"
    return predicted(device, shape), why


def _measured(device: Device, shape: Shape) -> tuple[Matmul, str] | None:
    """The best configuration of the nearest M that was measured, if it fits this problem."""
    entries = tuned.nearest(device, shape)
    few_tokens = why_not_skinny(shape) is None and not _few_tokens_for_hopper(device, shape)
    if not entries and few_tokens:  # what wgmma has no part in
        entries = tuned.nearest(without_wgmma(device), shape)
    if not entries:
        return None
    legal = {(c.entry, tuned.tile_of(c)): c for c in reversed(candidates(device, shape))}
    for entry in entries:
        c = legal.get((entry.kernel, entry.tile))
        if c is not None and not _takes_split_scales(c):
            return c, f"tuned: the fastest at M={entry.m}"
    return None


def _takes_split_scales(c: Matmul) -> bool:
    """Whether tables, which know no types of scales, were measured without what this tile does."""
    scaled = isinstance(c, Hopper) and c.grouping == Grouping.SCALED_WEIGHTS
    return scaled and scales_are_split(c)
