"""Which tile of hopper.cu a problem gets: the candidates, and the time each would take.

Not here: what a configuration is, and which problems hopper.cu takes at all (hopper.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from .hopper import HALF_SM, HOPPER_BLOCK_K, PIECE, Hopper
from .problem import (
    BITS,
    TYPE_BYTES,
    Device,
    Grouping,
    Shape,
    scales_are_split,
    weights_take_scales,
)

# Tiles of hopper.cu: block_m, tiles_n, consumers, and the TOPS of an H200 full of them, by kinds
# of activations and weights. These and the times below are fits to 204 problems, M = 17..8192 on
# seven layers, with every tile that comes near the best measured on each: picking by them loses
# 0.4 % to the best tile, W8A8 1.2 %. W4A16's have been fitted again since, to 41 problems of six
# layers in groups of 128: 1.1 %, 7 % at most. Sums in groups under bf16 are a fit to eight problems
# of two layers with fp16 scales. FP4 is not among them (256 and 128 tokens from four problems): in
# the proportions of the others.
_HOPPER_TILES = {
    ("bf16", 4, "groups"): (
        (128, 1, 2, 734), (64, 2, 2, 589), (64, 1, 2, 600), (64, 1, 1, 612),
        (32, 2, 2, 372), (32, 1, 1, 366), (64, 1, 4, 631), (32, 1, 4, 407),
    ),
    ("bf16", 4, "channel"): (
        (256, 1, 2, 773), (128, 2, 2, 757), (128, 1, 2, 728), (64, 2, 2, 614), (64, 1, 1, 492),
        (32, 2, 2, 373), (32, 1, 1, 357), (64, 1, 4, 649), (32, 1, 4, 394), (16, 2, 2, 215),
        (16, 1, 4, 220), (128, 1, 3, 750), (64, 1, 3, 540), (32, 1, 3, 350), (16, 1, 3, 245),
    ),
    ("bf16", 4, "fp4"): (
        (256, 1, 2, 735), (128, 2, 2, 540), (128, 1, 2, 555), (64, 2, 2, 400), (64, 1, 1, 350),
        (32, 2, 2, 240), (32, 1, 1, 200), (64, 1, 4, 410), (32, 1, 4, 260),
    ),
    ("bf16", 8, "channel"): (
        (256, 1, 2, 703), (128, 2, 2, 719), (128, 1, 2, 715), (64, 2, 2, 530), (64, 1, 1, 504),
        (32, 2, 2, 309), (32, 1, 1, 321), (64, 1, 4, 530), (32, 1, 4, 331), (128, 1, 3, 750),
        (64, 1, 3, 535), (32, 1, 3, 420),
    ),
    ("s8", 4, "groups"): (
        (256, 1, 2, 1080), (128, 2, 2, 980), (128, 1, 2, 975), (64, 2, 2, 711), (64, 1, 2, 677),
        (64, 1, 1, 680),
        (32, 2, 2, 442), (32, 1, 1, 404), (64, 1, 4, 815), (32, 1, 4, 533), (64, 1, 3, 735),
        (32, 1, 3, 500), (16, 1, 4, 280), (16, 1, 2, 230), (16, 1, 1, 200),
    ),
    ("s8", 4, "channel"): (
        (256, 1, 2, 1575), (128, 2, 2, 1532), (128, 1, 2, 1507), (64, 2, 2, 1092), (64, 1, 1, 981),
        (32, 2, 2, 723), (32, 1, 1, 552), (64, 1, 4, 1131), (32, 1, 4, 841), (128, 1, 3, 1600),
        (64, 1, 3, 1225), (32, 1, 3, 720),
    ),
    ("s8", 8, "channel"): (
        (256, 1, 2, 1602), (128, 2, 2, 1587), (128, 1, 2, 1543), (128, 1, 1, 1404),
        (64, 2, 2, 1262), (64, 1, 2, 1263), (64, 1, 1, 913), (32, 2, 2, 811), (32, 1, 2, 815),
        (32, 1, 1, 484), (128, 1, 3, 1587), (64, 1, 3, 1210), (32, 1, 3, 815),
    ),
}  # fmt: skip
_HOPPER_TILES["bf16", 8, "groups"] = _HOPPER_TILES["bf16", 4, "groups"]
# Weights that become fragments, few tiles of 64 rows: consumers that share out the stages, of 256 k
# where there is room for as many. block_m, k of a stage, consumers, TOPS
_TILES_BY_STAGES = {
    ("bf16", 4, "groups"): ((128, 128, 2, 540), (64, 128, 4, 402), (32, 128, 4, 250)),
    ("bf16", 4, "channel"): (
        (128, 128, 2, 489), (64, 128, 2, 530), (32, 256, 2, 358), (32, 256, 4, 340),
        (32, 256, 1, 440),
    ),
    ("bf16", 4, "fp4"): ((128, 128, 2, 400), (64, 128, 2, 385), (32, 128, 2, 220)),
    ("bf16", 8, "channel"): ((128, 128, 2, 480), (64, 128, 2, 520), (32, 128, 2, 300)),
    ("s8", 4, "groups"): (
        (128, 128, 2, 883), (64, 256, 2, 630), (64, 128, 2, 615), (32, 256, 4, 390),
        (32, 128, 2, 370),
    ),
    ("s8", 4, "channel"): ((128, 128, 2, 1121), (64, 256, 2, 800), (32, 256, 2, 480)),
}  # fmt: skip
_TILES_BY_STAGES["bf16", 8, "groups"] = _TILES_BY_STAGES["bf16", 4, "groups"]
# Under 16-bit activations, stages of 64 k: five have room for 256 tokens by 128 rows, half the
# decoding of 128 tokens, where 128 k have room for two. How, and TOPS in proportion to the tiles
# above, whose rates are not those of small groups: a fit to 86 problems of three layers and nine
# forms, M = 256..8192; picking loses 0.2 % to the best tile, 3.5 % at most.
_SHORT_STAGES_OF_GROUPS = (("", 930), ("by_stages", 960))  # below 128
_SHORT_STAGES_OF_ROWS = (("", 750),)  # INT8
# As many tokens and no more, of layers that are wide or long: stages of 256 k. block_m, consumers,
# how, TOPS
_TILES_OF_LONG_STAGES = {
    ("bf16", 4, "fp4"): (
        (16, 4, "", 200), (32, 4, "", 300), (32, 4, "rest", 300), (64, 3, "", 460),
        (64, 4, "rest", 460),
    ),
}  # fmt: skip
# Few tiles and much of K: by stream_k some clusters share each, by split_k their blocks. Fits to
# 4096x14336, W4A16's to 4096x4096 too.
_TILES_OF_SEVERAL = {
    ("bf16", 4, "channel"): ((128, 1, 2, 970), (64, 1, 2, 620), (32, 1, 2, 387), (16, 1, 2, 189)),
    ("s8", 4, "groups"): ((64, 1, 2, 834), (32, 1, 2, 497)),
}
# Rows that do not fill all SMs alike, few tokens: the last consumer has a share of the K of those
# that are left over. block_m, consumers, TOPS
_TILES_WITH_REST = {
    ("bf16", 4, "channel"): (
        (128, 3, 690), (64, 2, 485), (64, 3, 490), (64, 4, 560), (32, 2, 295), (32, 3, 305),
        (32, 4, 345), (16, 3, 215), (16, 4, 205),
    ),
    ("bf16", 8, "channel"): ((128, 3, 635), (64, 3, 450), (32, 3, 435)),
    ("s8", 4, "groups"): (
        (64, 3, 680), (32, 3, 410), (64, 4, 700), (32, 4, 430), (16, 3, 220), (16, 4, 230),
    ),
    ("s8", 4, "channel"): ((128, 3, 1180), (64, 3, 895), (32, 3, 510)),
}  # fmt: skip
# W8A8 by two consumers in turns: block_m, tiles_n and TOPS. From 64 tiles of K on, writing out is
# so little of the work that larger tiles win; weights that become fragments want larger ones too.
_TILES_IN_TURNS = ((192, 2, 1686), (128, 2, 1614), (256, 1, 1564))
_IN_TURNS_MAX_K = 8192
_MOST_STAGES = 16
_H200_SMS, _H200_BYTES_PER_US = 132, 4.01e6
_LAUNCH_US = 1.2  # until the first product and after the last
# until a block has found what helpers have left, by stream_k; where all of them end together
_SHARED_US, _SHARED_ALIKE_US = 4.5, 2.5
_CLUSTER_US = 1.0  # and of one of its cluster
_EXCHANGED_PER_US = 15200  # sums that a block reads from others
_ALONE = 0.58  # of its rate a block reaches that has no other one on its SM to hide latencies
_NOT_HIDDEN = 0.25  # of the shorter of computing and reading W
_SHARE_X_US, _SHARE_X = 0.4, 0.95  # share_x: until a cluster is there; of a time bound by reading
_SHARING = 1.025  # share_w, or share_x in turns or of 256 tokens: faster by how much, by two
_PLACES_OF_FOUR = 0.9  # of an H200's SMs are found by clusters of four
_DEEP = 0.92  # of its rate a single consumer reaches with all of an SM's shared memory
_TWO_STAGES = 0.8  # of its rate a ring of two reaches; that of INT8 weights was measured with two
# Scales that are split (two layers, six forms): of its rate a tile of few tokens reaches, and where
# the warps that split them have float zero points too, of more than 64 rows
_SPLIT, _SPLIT_WITH_ZEROS, _FEW = 0.9, 0.6, 64
_SUMS_MAX_M = 128  # tokens
# stream_k: slower over many rounds, in which tiles share less of what L2 holds; not by short stages
_STREAMED = 0.06


def _hopper_time(c: Hopper, rate: float, device: Device, shape: Shape) -> float:
    """Microseconds by the measured rates: what candidates are compared by, no promise."""
    tiles = c.tiles(shape.m, shape.n)
    places: float = device.sm_count * c.blocks_per_sm
    k_tiles = math.ceil(shape.k / c.block_k)
    if c.sharing == 4:
        places *= _PLACES_OF_FOUR
    rounds = math.ceil(tiles * c.split_k / places) / c.split_k
    exchange = _CLUSTER_US * (c.split_k > 1)
    if c.rest_by_k:  # the last consumer's share is as long as such a part of a tile
        shares = c.shares(shape.m, shape.n, shape.k, device.sm_count)
        rounds = shares.whole / places + shares.each / k_tiles * c.rest_rows / c.block_n
    if c.stream_k:
        blocks = c.grid(shape.m, shape.n, shape.k, device.sm_count)[0]
        shares = c.shares(shape.m, shape.n, shape.k, blocks)
        rounds = math.ceil(shares.whole / places)
        rounds += 1 - shares.tail / k_tiles if shares.tail else 0
        alike = c.clusters_of_tile(shape.m, shape.n, device.sm_count) > 1
        if alike:
            rounds += PIECE * HOPPER_BLOCK_K / shape.k  # which is not in the tail there
        if c.block_k >= HOPPER_BLOCK_K:
            rounds *= 1 + _STREAMED * max(0.0, 1 - 1 / rounds)
        rounds /= c.split_k
        exchange += _SHARED_ALIKE_US if alike else _SHARED_US
        exchange += max(1.0, places / tiles) * c.values_per_block / _EXCHANGED_PER_US
    blocks = c.grid(shape.m, shape.n, shape.k, device.sm_count)[0]
    speed = 2 * _ALONE if c.blocks_per_sm == 2 and blocks <= device.sm_count else 1.0
    if c.consumers == 1 and c.blocks_per_sm == 1:
        speed = _DEEP
    if c.num_stages == 2 and c.w_kind != "s8":
        speed *= _TWO_STAGES
    if c.grouping == Grouping.SCALED_WEIGHTS and c.block_m <= _FEW and scales_are_split(c):
        wide = c.has_zeros and TYPE_BYTES[c.zero_type] > 1 and c.groups_per_tile > 1
        speed *= _SPLIT_WITH_ZEROS if wide and c.block_n + c.rest_rows > 64 else _SPLIT
    shared = c.share_x if c.in_turns or c.block_m == 256 else c.share_w
    if shared == 2:
        speed *= _SHARING
    work = 2 * c.block_m * c.block_n * c.block_k * k_tiles * c.blocks_per_sm
    compute = rounds * work / (rate * 1e6 / _H200_SMS * speed)
    memory = shape.n * shape.k * BITS[c.w_kind] / 8 / _H200_BYTES_PER_US
    if c.share_x > 1 and not c.in_turns:
        memory *= _SHARE_X if memory > compute and tiles > places else 1.0
        exchange += _SHARE_X_US
    busy, idle = max(compute, memory), min(compute, memory)
    return _LAUNCH_US + exchange + busy + idle * _NOT_HIDDEN


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


def _candidates(device: Device, shape: Shape, scaled: bool) -> Iterator[tuple[Hopper, float]]:
    whole = shape.group_size >= shape.k and not shape.has_zeros and shape.w_kind != "e2m1"
    kind = "s8" if shape.x_kind == "s8" else "bf16"
    scales = "fp4" if shape.w_kind == "e2m1" else "channel" if whole or scaled else "groups"
    key = kind, BITS[shape.w_kind], scales
    emptied = key == ("s8", 4, "groups")
    tiles = [(m, n, 128, consumers, "", rate) for m, n, consumers, rate in _HOPPER_TILES[key]]
    of_k = _TILES_BY_STAGES.get(key, ())
    tiles += [
        (m, 1, block_k, consumers, "by_stages" if consumers > 1 else "", rate)
        for m, block_k, consumers, rate in of_k
    ]
    of_long = _TILES_OF_LONG_STAGES.get(key, ())
    tiles += [
        (m, 1, 256, consumers, how, rate) for m, consumers, how, rate in of_long if shape.m <= m
    ]
    of_short: tuple[tuple[str, int], ...] = ()
    if key == ("bf16", 8, "channel") and whole:
        of_short = _SHORT_STAGES_OF_ROWS
    elif kind == "bf16" and scales == "channel" and shape.group_size < min(shape.k, HOPPER_BLOCK_K):
        of_short = _SHORT_STAGES_OF_GROUPS
    tiles += [(256, 1, 64, 2, how, rate) for how, rate in of_short]
    of_several = _TILES_OF_SEVERAL.get(key, ())
    tiles += [(m, n, 128, consumers, "several", rate) for m, n, consumers, rate in of_several]
    with_rest = _TILES_WITH_REST.get(key, ())
    tiles += [(m, 1, 128, consumers, "rest", rate) for m, consumers, rate in with_rest]
    # stream_k, split_k, share_x, share_w
    ways = [(False, 1, 1, 1), (True, 1, 1, 1), (False, 2, 1, 1), (True, 2, 1, 1)]
    if shape.x_kind == "s8" and whole:  # others are not bound by reading
        ways += [(False, 1, 4, 1), (False, 1, 2, 1), (False, 1, 1, 2)]
    elif scaled:
        ways.append((False, 1, 2, 1))
    if key == ("s8", 8, "channel") and shape.k <= _IN_TURNS_MAX_K:
        tiles += [(m, n, 128, 2, "in_turns", rate) for m, n, rate in _TILES_IN_TURNS]
    one_group = shape.group_size >= shape.k or shape.w_kind == "e2m1"
    sums = shape.has_zeros and not scaled
    for tile, way in itertools.product(tiles, ways):
        block_m, tiles_n, block_k, consumers, how, rate = tile
        groups_per_tile = 1 if one_group else max(1, block_k // shape.group_size)
        if whole:
            grouping = Grouping.CHANNEL
        elif scaled:
            grouping = Grouping.SCALED_WEIGHTS
        else:
            grouping = Grouping.SPAN if groups_per_tile > 1 else Grouping.TILE
        in_turns, by_stages, rest_by_k = (how == w for w in ("in_turns", "by_stages", "rest"))
        stream_k, split_k, share_x, share_w = way
        if in_turns and (split_k > 1 or share_x > 2 or share_w > 1):
            continue  # a cluster has one tile; the others are never the fastest
        if by_stages and (stream_k or share_x * share_w > 1):
            continue
        short = block_k < HOPPER_BLOCK_K
        if scaled and share_x > 1 and (block_m < 256 or short):
            continue  # gains nothing
        if short and split_k > 1 and (whole or by_stages):
            continue  # never the fastest
        if short and by_stages and TYPE_BYTES[shape.scale_type] > 2:
            continue  # never the fastest, or by 2 %
        if block_m == 16 and (shape.m > 16 or split_k > 1):
            continue  # half of 16 tokens is less than what is staged at a time
        if how == "several":
            if not stream_k or split_k != min(2, block_m // 16):
                continue
        elif stream_k and split_k > 1:
            continue
        if rest_by_k and (sums or way != (False, 1, 1, 1)):
            continue  # a stage has the rows left over where others have sums of x
        if rest_by_k and block_m == 128 and groups_per_tile > 1:
            continue  # spills
        if not one_group and shape.group_size % block_k and block_k % shape.group_size:
            continue  # a stage would have parts of groups
        if shape.w_kind == "e2m1" and shape.k % block_k:
            continue  # a stage would have scales of another row
        small_groups = groups_per_tile * HOPPER_BLOCK_K > block_k
        if block_k > HOPPER_BLOCK_K and (small_groups or sums or consumers == split_k == 1):
            continue  # not measured; never the fastest
        if consumers == 4 and ((small_groups and not scaled) or sums):
            continue  # 112 registers a thread are too few
        if consumers > 2 and not by_stages and split_k * share_x * share_w > 1:
            continue  # never the fastest, or not measured
        parts = 4 if emptied and block_m == 256 else 1
        if parts > 1 and split_k > 1:
            continue  # not measured
        extra = stream_k + shape.has_zeros + (groups_per_tile > 1)
        if short:
            spills = False
        elif scaled:
            most = 1 if stream_k else 2
            spills = block_m * tiles_n == 256 and shape.has_zeros and groups_per_tile > most
            if shape.w_kind != "e2m1":
                spills |= _scales_spill(shape, block_m, tiles_n, consumers, groups_per_tile, way)
        else:
            limit = 160 if stream_k or shape.has_zeros or kind != "s8" else 256
            spills = not whole and (block_m * tiles_n + 32 * extra > limit or extra == 3)
        if spills:
            continue
        c = Hopper(
            x_kind=shape.x_kind,
            w_kind=shape.w_kind,
            scale_type=shape.scale_type,
            zero_type=shape.zero_type,
            out_type=shape.out_type,
            block_m=block_m,
            tiles_n=tiles_n,
            block_k=block_k,
            consumers=consumers,
            in_turns=in_turns,
            by_stages=by_stages,
            num_stages=1,
            rest_by_k=rest_by_k,
            stream_k=stream_k,
            split_k=split_k,
            share_x=share_x,
            share_w=share_w,
            parts=parts,
            raster=4096 // block_m if in_turns else 8,
            slab=math.gcd(64, block_m // split_k),
            grouping=grouping,
            groups_per_tile=groups_per_tile,
            has_zeros=shape.has_zeros,
            blocked=shape.blocked,
        )
        if how == "several" and c.clusters_of_tile(shape.m, shape.n, device.sm_count) == 1:
            continue  # a helper would have pieces of several tiles to leave
        if rest_by_k and not c.leaves_a_rest(shape.m, shape.n, device.sm_count):
            continue
        if share_w > 1 and shape.m <= block_m:
            continue  # nobody to share with
        blocks = c.tiles(shape.m, shape.n) * split_k
        room = HALF_SM if consumers == 1 else device.smem_per_block
        one_tile = split_k > 1 or by_stages
        if one_tile and blocks > device.sm_count * (2 if consumers == 1 else 1):
            continue
        if in_turns and blocks <= device.sm_count:
            continue  # a tile a block: nobody to take turns with
        if key == ("s8", 8, "channel") and consumers == 1:
            if share_x > 1:
                continue
            if blocks <= device.sm_count:
                room = device.smem_per_block
        fits = _deepest_ring(c, room)
        if fits is not None:
            yield fits, _hopper_time(fits, rate, device, shape)


def _scales_spill(
    shape: Shape,
    block_m: int,
    tiles_n: int,
    consumers: int,
    groups_per_tile: int,
    way: tuple[bool, int, int, int],
) -> bool:
    """Whether registers are too few for scales that weights take: the warps that bring them hold
    those of a tile of K or more."""
    stream_k, split_k, _, _ = way
    wide = TYPE_BYTES[shape.scale_type] > 2
    if groups_per_tile > 4:
        return tiles_n * consumers > 2 or (block_m == 256 and stream_k)
    if not shape.has_zeros:
        return wide and stream_k and groups_per_tile > 2 and block_m * tiles_n == 256
    if TYPE_BYTES[shape.zero_type] == 1:
        return wide and (consumers == 4 or (split_k > 1 and tiles_n > 1))
    if groups_per_tile > 1 and not scales_are_split(shape):
        return consumers > 2 or (tiles_n == 2 and stream_k)
    return consumers == 4 and groups_per_tile > 1


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
