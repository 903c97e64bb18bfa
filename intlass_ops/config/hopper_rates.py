"""The tiles of hopper.cu with the rates that an H200 reaches, and the time a problem would take.

Not here: what a configuration is (hopper.py), which tile fits a problem and is picked
(hopper_tiles.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from .hopper import HOPPER_BLOCK_K, PIECE, Hopper
from .problem import BITS, TYPE_BYTES, Device, Grouping, Shape, scales_are_split

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
_SHORT_STAGES_OF_ROWS = (("", 750),)  # weights of eight bits, in groups of 128 and more too
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
    ("bf16", 8, "channel"): ((128, 1, 2, 900),),
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
# stream_k: slower over many rounds, in which tiles share less of what L2 holds; not by short stages
_STREAMED = 0.06


class Tile(NamedTuple):
    """Of hopper.cu, and the TOPS of an H200 full of it."""

    block_m: int
    tiles_n: int
    block_k: int
    consumers: int
    how: str  # by_stages, in_turns, rest (by k), several (clusters a tile), or ""
    rate: float


def tiles_of(shape: Shape, scaled: bool, whole: bool) -> Iterator[Tile]:
    kind = "s8" if shape.x_kind == "s8" else "bf16"
    scales = "fp4" if shape.w_kind == "e2m1" else "channel" if whole or scaled else "groups"
    key = kind, BITS[shape.w_kind], scales
    for m, n, consumers, rate in _HOPPER_TILES[key]:
        yield Tile(m, n, 128, consumers, "", rate)
    for m, block_k, consumers, rate in _TILES_BY_STAGES.get(key, ()):
        yield Tile(m, 1, block_k, consumers, "by_stages" if consumers > 1 else "", rate)
    for m, consumers, how, rate in _TILES_OF_LONG_STAGES.get(key, ()):
        yield Tile(m, 1, 256, consumers, how, rate)
    if key == ("bf16", 8, "channel") and (whole or shape.group_size % HOPPER_BLOCK_K == 0):
        short: tuple[tuple[str, int], ...] = _SHORT_STAGES_OF_ROWS
    else:
        small = shape.group_size < min(shape.k, HOPPER_BLOCK_K)
        short = _SHORT_STAGES_OF_GROUPS if small and key[::2] == ("bf16", "channel") else ()
    for how, rate in short:
        yield Tile(256, 1, 64, 2, how, rate)
    for m, n, consumers, rate in _TILES_OF_SEVERAL.get(key, ()):
        yield Tile(m, n, 128, consumers, "several", rate)
    for m, consumers, rate in _TILES_WITH_REST.get(key, ()):
        yield Tile(m, 1, 128, consumers, "rest", rate)
    if key == ("s8", 8, "channel") and shape.k <= _IN_TURNS_MAX_K:
        for m, n, rate in _TILES_IN_TURNS:
            yield Tile(m, n, 128, 2, "in_turns", rate)


def hopper_time(c: Hopper, rate: float, device: Device, shape: Shape) -> float:
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
    if c.num_stages == 2 and BITS[c.w_kind] != 8:
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
