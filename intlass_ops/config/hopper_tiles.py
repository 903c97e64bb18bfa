"""Which tile of hopper.cu a problem gets: those that fit it, and the one with the least time.

Not here: what a configuration is, and which problems hopper.cu takes at all (hopper.py), which
tiles there are and how fast they are (hopper_rates.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from .hopper import HALF_SM, HOPPER_BLOCK_K, Hopper
from .hopper_rates import Tile, hopper_time, tiles_of
from .problem import (
    BITS,
    LUT4,
    TYPE_BYTES,
    Device,
    Grouping,
    Shape,
    scales_are_split,
    weights_take_scales,
)

_MOST_STAGES = 16
_SUMS_MAX_M = 128  # tokens


def hopper_candidates(device: Device, shape: Shape) -> Iterator[tuple[Hopper, float]]:
    """The tiles that fit a problem, with as deep a ring as fits, and their predicted times."""
    scaled = weights_take_scales(shape)
    yield from _candidates(device, shape, scaled)
    # Sums that take scales are fewer instructions than two products a pair of weights, where few
    # tokens meet them.
    split = scaled and scales_are_split(shape) and not shape.has_zeros
    if split and shape.group_size % HOPPER_BLOCK_K == 0:
        of_sums = _candidates(device, shape, scaled=False)
        yield from ((c, us) for c, us in of_sums if c.block_m <= _SUMS_MAX_M)


class _Way(NamedTuple):
    """How blocks share tiles, or clusters of blocks what they load."""

    stream_k: bool = False
    split_k: int = 1
    share_x: int = 1
    share_w: int = 1


class _Candidate(NamedTuple):
    """For any M: a tile, and its rings in all of an SM's shared memory and in half of it."""

    tile: Tile
    whole_sm: Hopper | None
    half_sm: Hopper | None


def _candidates(device: Device, shape: Shape, scaled: bool) -> Iterator[tuple[Hopper, float]]:
    for tile, whole_sm, half_sm in _of_any_m(replace(shape, m=0), scaled, device.smem_per_block):
        c = whole_sm or half_sm
        if c is None or _is_of_fewer(c, shape.m):
            continue
        room = _room_for(c, tile.how, device, shape)
        fits = whole_sm if room == device.smem_per_block else half_sm if room else None
        if fits is not None:
            yield fits, hopper_time(fits, tile.rate, device, shape)


@lru_cache(maxsize=1024)
def _of_any_m(shape: Shape, scaled: bool, smem_per_block: int) -> tuple[_Candidate, ...]:
    """Most of the work, done once a layer: each new M asks for a pick."""
    found = []
    whole = shape.group_size >= shape.k and not shape.has_zeros and shape.w_kind != "e2m1"
    for tile, way in itertools.product(tiles_of(shape, scaled, whole), _ways(shape, scaled, whole)):
        if not _goes_together(tile, way):
            continue
        c = _config(shape, scaled, whole, tile, way)
        if _cannot_be(c, shape) or _is_never_best(c, shape) or _spills(c, shape):
            continue
        rings = (_deepest_ring(c, room - c.static_smem) for room in (smem_per_block, HALF_SM))
        found.append(_Candidate(tile, *rings))
    return tuple(found)


def _ways(shape: Shape, scaled: bool, whole: bool) -> list[_Way]:
    ways = [_Way(), _Way(stream_k=True), _Way(split_k=2), _Way(stream_k=True, split_k=2)]
    if shape.x_kind == "s8" and whole:  # others are not bound by reading
        ways += [_Way(share_x=4), _Way(share_x=2), _Way(share_w=2)]
    elif scaled:
        ways.append(_Way(share_x=2))
    return ways


def _goes_together(tile: Tile, way: _Way) -> bool:
    if tile.how == "several":
        return way.stream_k and way.split_k == min(2, tile.block_m // 16)
    if tile.how == "rest":
        return way == _Way()
    if tile.how == "by_stages":
        return not way.stream_k and way.share_x * way.share_w == 1
    if tile.how == "in_turns":  # a cluster has one tile; the others are never the fastest
        return way.split_k == 1 and way.share_x <= 2 and way.share_w == 1
    return not (way.stream_k and way.split_k > 1)


def _config(shape: Shape, scaled: bool, whole: bool, tile: Tile, way: _Way) -> Hopper:
    """With a ring of one stage."""
    one_group = shape.group_size >= shape.k or shape.w_kind == "e2m1"
    groups_per_tile = 1 if one_group else max(1, tile.block_k // shape.group_size)
    if whole:
        grouping = Grouping.CHANNEL
    elif scaled:
        grouping = Grouping.SCALED_WEIGHTS
    else:
        grouping = Grouping.SPAN if groups_per_tile > 1 else Grouping.TILE
    of_int8_sums = shape.x_kind == "s8" and BITS[shape.w_kind] == 4 and not (whole or scaled)
    return Hopper(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        block_m=tile.block_m,
        tiles_n=tile.tiles_n,
        block_k=tile.block_k,
        consumers=tile.consumers,
        in_turns=tile.how == "in_turns",
        by_stages=tile.how == "by_stages",
        num_stages=1,
        rest_by_k=tile.how == "rest",
        stream_k=way.stream_k,
        split_k=way.split_k,
        share_x=way.share_x,
        share_w=way.share_w,
        parts=4 if of_int8_sums and tile.block_m == 256 else 1,
        raster=4096 // tile.block_m if tile.how == "in_turns" else 8,
        slab=math.gcd(64, tile.block_m // way.split_k),
        grouping=grouping,
        groups_per_tile=groups_per_tile,
        has_zeros=shape.has_zeros,
        blocked=shape.blocked,
        half_tiles=shape.w_kind == "e2m1" and shape.k % HOPPER_BLOCK_K != 0,
    )


def _has_small_groups(c: Hopper) -> bool:
    """Of fewer k than HOPPER_BLOCK_K."""
    return c.groups_per_tile * HOPPER_BLOCK_K > c.block_k


def _is_of_fewer(c: Hopper, m: int) -> bool:
    """Whether a tile is for no more tokens than it has."""
    long = c.w_kind == "e2m1" and c.block_k > HOPPER_BLOCK_K and not c.by_stages
    return m > c.block_m and (c.block_m == 16 or long)


def _cannot_be(c: Hopper, shape: Shape) -> bool:
    """Whether a tile and a layer do not fit."""
    if c.block_m == 16 and c.split_k > 1:
        return True  # half of 16 tokens is less than what is staged at a time
    if c.w_kind == "e2m1":
        # a stage would have scales of another row
        return shape.k % (HOPPER_BLOCK_K // 2 if c.block_k == HOPPER_BLOCK_K else c.block_k) != 0
    if shape.group_size < shape.k and shape.group_size % c.block_k and c.block_k % shape.group_size:
        return True  # a stage would have parts of groups
    # A stage has the rows left over where others have sums of x.
    return c.rest_by_k and c.needs_token_sums


def _is_never_best(c: Hopper, shape: Shape) -> bool:
    """Whether others were faster wherever it was measured, or it was not measured at all."""
    scaled, whole = (c.grouping == g for g in (Grouping.SCALED_WEIGHTS, Grouping.CHANNEL))
    if c.block_k < HOPPER_BLOCK_K:
        if c.split_k > 1 and (whole or c.by_stages):
            return True
        if c.by_stages and TYPE_BYTES[shape.scale_type] > 2:
            return True  # or by 2 %
    if c.block_k > HOPPER_BLOCK_K and (
        _has_small_groups(c) or c.needs_token_sums or c.consumers == c.split_k == 1
    ):
        return True
    if scaled and c.share_x > 1 and (c.block_m < 256 or c.block_k < HOPPER_BLOCK_K):
        return True
    if c.consumers > 2 and not c.by_stages and c.cluster > 1:
        return True
    return c.parts > 1 and c.split_k > 1


def _spills(c: Hopper, shape: Shape) -> bool:
    """Whether its threads have too few registers."""
    scaled, whole = (c.grouping == g for g in (Grouping.SCALED_WEIGHTS, Grouping.CHANNEL))
    if c.consumers == 4 and ((_has_small_groups(c) and not scaled) or c.needs_token_sums):
        return True  # 112 a thread
    if c.rest_by_k and c.block_m == 128 and c.groups_per_tile > 1:
        return True
    if c.rest_by_k and c.w_kind in LUT4 and c.groups_per_tile > 4:
        return True
    if whole or c.block_k < HOPPER_BLOCK_K:
        return False
    if scaled:
        most = 1 if c.stream_k else 2
        if c.block_m * c.tiles_n == 256 and c.has_zeros and c.groups_per_tile > most:
            return True
        return c.w_kind != "e2m1" and _scales_spill(c, shape)
    extra = c.stream_k + c.has_zeros + (c.groups_per_tile > 1)
    limit = 160 if c.stream_k or c.has_zeros or c.x_kind != "s8" else 256
    return c.block_m * c.tiles_n + 32 * extra > limit or extra == 3


def _room_for(c: Hopper, how: str, device: Device, shape: Shape) -> int:
    """Bytes of shared memory of a block; 0 where blocks and tiles do not match."""
    if how == "several" and c.clusters_of_tile(shape.m, shape.n, device.sm_count) == 1:
        return 0  # a helper would have pieces of several tiles to leave
    if c.rest_by_k and not c.leaves_a_rest(shape.m, shape.n, device.sm_count):
        return 0
    if c.share_w > 1 and shape.m <= c.block_m:
        return 0  # nobody to share with
    blocks = c.tiles(shape.m, shape.n) * c.split_k
    places = device.sm_count * (2 if c.consumers == 1 else 1)
    if (c.split_k > 1 or c.by_stages) and blocks > places:
        return 0  # a tile a block
    if c.in_turns and blocks <= device.sm_count:
        return 0  # a tile a block: nobody to take turns with
    if c.consumers > 1:
        return device.smem_per_block
    if (c.x_kind, c.w_kind, c.grouping) == ("s8", "s8", Grouping.CHANNEL):
        if c.share_x > 1:
            return 0
        if blocks <= device.sm_count:
            return device.smem_per_block
    return HALF_SM


def _scales_spill(c: Hopper, shape: Shape) -> bool:
    """Whether registers are too few for scales that weights take: the warps that bring them hold
    those of a tile of K or more."""
    wide = TYPE_BYTES[c.scale_type] > 2
    if c.groups_per_tile > 4:
        return c.tiles_n * c.consumers > 2 or (c.block_m == 256 and c.stream_k)
    if not c.has_zeros:
        large = c.groups_per_tile > 2 and c.block_m * c.tiles_n == 256
        return wide and c.stream_k and large
    if TYPE_BYTES[c.zero_type] == 1:
        return wide and (c.consumers == 4 or (c.split_k > 1 and c.tiles_n > 1))
    if c.groups_per_tile > 1 and not scales_are_split(shape):
        return c.consumers > 2 or (c.tiles_n == 2 and c.stream_k)
    return c.consumers == 4 and c.groups_per_tile > 1


def _deepest_ring(c: Hopper, room: int) -> Hopper | None:
    """As many stages as fit, of two at least; a third is worth staging fewer tokens at a time, and
    so is each short one."""
    most = _MOST_STAGES if room > HALF_SM and c.consumers == 1 else 8
    least = 2 * c.consumers if c.by_stages else 0

    def ring(slab: int, limit: int) -> Hopper:
        one = replace(c, num_stages=1, slab=slab)
        stages = min(limit, 1 + (room - one.smem_bytes) // one.stage_bytes)
        stages -= stages % (c.consumers if c.by_stages else 1)  # one is always the same consumer's
        return replace(one, num_stages=stages)

    if c.block_k < HOPPER_BLOCK_K:
        deepest = max((ring(slab, most) for slab in (c.slab, 32, 16)), key=lambda r: r.num_stages)
        return deepest if deepest.num_stages >= max(3, least) else None
    rings = ((ring(c.slab, most), 3), (ring(16, 3), 3), (ring(c.slab, 2), 2))
    return next((r for r, enough in rings if r.num_stages >= (least or enough)), None)


def pick_hopper(device: Device, shape: Shape) -> Hopper:
    """The tile with the least predicted time."""
    return min(hopper_candidates(device, shape), key=lambda candidate: candidate[1])[0]
