"""Which tile of gemm.cu a problem gets: the candidates, and the time each would take.

Not here: what a configuration is, and what makes one illegal (gemm.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from .gemm import Gemm, grouping_of, why_illegal
from .problem import (
    BITS,
    LUT4,
    SPAN_K,
    Device,
    Grouping,
    Shape,
    scales_are_split,
    weights_take_scales,
)

# TOPS of an H200 full of blocks, by bits of activations and weights, block_m and block_n. These and
# the times below are fits to 511 problems, M = 32..2048 on 21 layers that no table holds
# (benchmarks/results/h200-layers.json): picking by them loses 1 % to the best tile of 16-bit
# activations and 3 % of INT8, 37 % at most (benchmarks/pick_loss.py). Estimates: tiles of 8 tokens,
# in the proportions of the others, and 128x128 of INT8 times INT4, timed with eight warps only.
_RATES = {
    (16, 4): {
        (8, 64): 135, (8, 128): 110, (16, 64): 270, (16, 128): 214, (32, 64): 278,
        (32, 128): 309, (64, 64): 309, (64, 128): 351, (128, 128): 410,
    },
    (16, 8): {
        (8, 64): 175, (8, 128): 120, (16, 64): 351, (16, 128): 218, (32, 64): 274,
        (32, 128): 317, (64, 64): 327, (64, 128): 383, (128, 128): 404,
    },
    (8, 4): {
        (8, 64): 160, (8, 128): 177, (16, 64): 315, (16, 128): 334, (32, 64): 425,
        (32, 128): 500, (64, 64): 505, (64, 128): 603, (128, 128): 636,
    },
    (8, 8): {
        (8, 64): 175, (8, 128): 250, (16, 64): 348, (16, 128): 410, (32, 64): 409,
        (32, 128): 574, (64, 64): 541, (64, 128): 753, (128, 128): 794, (128, 256): 994,
    },
}  # fmt: skip
# Of FP4 weights, 17 to 2048 tokens of 4096x4096 and 28672x4096; of fewer and of 64 rows estimates.
_FP4_RATES = {
    (8, 64): 70, (8, 128): 80, (16, 64): 100, (16, 128): 120, (32, 64): 125, (32, 128): 160,
    (64, 64): 140, (64, 128): 279, (128, 128): 357,
}  # fmt: skip
_H200_SMS, _H200_BYTES_PER_US = 132, 4.0e6
_LAUNCH_US = 4.6  # until the first product and after the last
_ALONE = 0.6  # of the time of two blocks an SM takes for one
_LATENCY_US = {16: 0.32, 8: 0.2}  # 128 k of a block take no less, by bits of activations
_SPLIT_US, _STRIPE_US = 1.4, 7e-5  # stripes of K that are added up; for each of their sums
_MOST_STRIPES = 8


def _crowded(device: Device, shape: Shape) -> bool:
    """NVRTC 12.9 needs more registers there, so tiles that take them all elsewhere spill."""
    return device.arch in ("sm_100", "sm_120") and BITS[shape.x_kind] == 16


def _rows(device: Device, shape: Shape) -> int:
    """Rows of W that four warps beside each other hold without spilling, for up to 64 tokens."""
    if shape.w_kind == "e2m1":
        return 128
    channel, floats = shape.group_size >= shape.k, BITS[shape.x_kind] == 16
    crowded, sm_90 = _crowded(device, shape), device.arch in ("sm_90", "sm_90a")
    grouping = grouping_of(shape.k, shape.group_size, 64 if shape.group_size == 64 else 128)
    if (
        grouping is Grouping.STRADDLING
        or (shape.has_zeros and (crowded or shape.has_a_zero or grouping is Grouping.SPAN))
        or (not channel and BITS[shape.w_kind] == 8 and (crowded or (floats and sm_90)))
        or (not channel and shape.w_kind in LUT4 and crowded)
    ):
        return 64  # masked fragments, or sums of x, beside two sets of accumulators
    return 128


_LITTLE_SMEM = 100 << 10  # bytes an SM: sm_86, sm_89, sm_120
_SCALED_K = 64  # k of a tile of 16-bit floats that takes all registers
Tile = tuple[int, int, int, int]  # block_m, block_n, warps_m, warps_n
_TALL, _SQUARE, _WIDE = (128, 128, 1, 4), (128, 128, 2, 2), (128, 256, 2, 4)


def _large_tile(device: Device, shape: Shape) -> Tile | None:
    """For many tokens, where one set of accumulators is enough.

    Warps of 64 tokens by 64 rows; of 128 by 32 where codes become 16-bit floats in several
    instructions: that is done half as often then.
    """
    channel = shape.group_size >= shape.k and not shape.has_zeros
    if BITS[shape.x_kind] == 16:
        fits = shape.group_size % _SCALED_K == 0 or _takes_scales_by_span(shape)
        fits = fits and not _crowded(device, shape)
        scaled = weights_take_scales(shape) and fits
        if not (channel or scaled):
            return None
        split = scaled and scales_are_split(shape)
        tall = BITS[shape.w_kind] == 4 or split or _takes_scales_by_span(shape)
        return _TALL if tall else _SQUARE
    if not channel:
        return None
    return _WIDE if shape.w_kind == "s8" and not _little(device, shape) else _SQUARE


def _takes_scales_by_span(shape: Shape) -> bool:
    return shape.group_size == SPAN_K or shape.w_kind == "e2m1"


def _little(device: Device, shape: Shape) -> bool:
    """Where 8-bit tiles take 64 k: little shared memory; INT8 on sm_100, where others spill."""
    spills = device.arch == "sm_100" and shape.w_kind == "s8"
    return device.smem_per_sm <= _LITTLE_SMEM or spills


def _tokens(m: int) -> int:
    """The fewest tokens of a block that hold m, up to 64."""
    return min(64, max(8, 1 << (max(m, 1) - 1).bit_length()))


def _config(device: Device, shape: Shape, tile: Tile) -> Gemm:
    """A tile for a problem, its ring as deep as is useful, K not split."""
    block_m, block_n, warps_m, warps_n = tile
    # half the k where 16-bit tokens fill shared memory, and where there is little of it and 8-bit
    # ones leave none to a second block (not measured: by the paper model)
    floats, large = BITS[shape.x_kind] == 16, tile == _large_tile(device, shape)
    little = large and shape.x_kind == "s8" and _little(device, shape)
    of_64 = shape.group_size == 64 and shape.group_size < shape.k
    of_64 |= shape.scale_type == "e4m3" and block_m == 64  # two scales a step spill with 128
    block_k = _SCALED_K if (floats and large) or little or of_64 else 128
    scaled = floats and (large or shape.w_kind == "e2m1") and weights_take_scales(shape)
    grouping = grouping_of(shape.k, shape.group_size, block_k)
    whole = shape.k * BITS[shape.x_kind] % 128 == 0 and shape.k * BITS[shape.w_kind] % 128 == 0
    if scaled:
        of_span = _takes_scales_by_span(shape)
        grouping = Grouping.SCALED_SPANS if of_span else Grouping.SCALED_WEIGHTS
    config = Gemm(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        warps_m=warps_m,
        warps_n=warps_n,
        num_stages=3,
        split_k=1,
        grouping=grouping,
        has_zeros=shape.has_zeros,
        has_a_zero=shape.has_a_zero,
        aligned=shape.aligned and whole,
    )
    # Three stages, which leave more cache than four for the scales; two where that lets a second
    # block of four warps share the SM.
    room = min(device.smem_per_sm // _blocks_per_sm(config) - 1024, device.smem_per_block)
    if config.smem_bytes > room:
        fewer = replace(config, num_stages=2)
        if fewer.smem_bytes <= room or config.smem_bytes > device.smem_per_block:
            config = fewer
    return config


def _blocks_per_sm(c: Gemm) -> int:
    return 2 if c.threads <= 128 else 1


def pick_gemm(device: Device, shape: Shape) -> Gemm:
    """The candidate with the least predicted time."""
    found = gemm_candidates(device, shape, measured=False)
    best = min(found, key=lambda c: gemm_time(c, device, shape), default=None)
    if best is None:
        raise ValueError(f"no configuration for {shape} on {device.arch}")
    return best


def gemm_candidates(device: Device, shape: Shape, *, measured: bool) -> Iterator[Gemm]:
    """Warps that hold what such operands leave of the registers, K in any stripes.

    measured: with tiles that spill for some operands, which only the compiler can tell; the tuner
    refuses those.
    """
    tokens, rows = _tokens(shape.m), _rows(device, shape)
    tiles = [(m, n, 1, 4) for m in {tokens, max(8, tokens // 2)} for n in {rows, 64}]
    if shape.m > 64:
        large = _large_tile(device, shape)
        tiles += [] if large is None else [large]
        tiles += [_SQUARE] if large == _WIDE else []
        tiles += [(128, rows, 2, 4)] if measured else []
    for tile in dict.fromkeys(tiles):
        if tile[:2] == (64, 64) and rows > 64 and not measured:
            continue
        config = _config(device, shape, tile)
        spills = shape.w_kind == "e4m3" and _crowded(device, shape) and config.block_m > 64
        for split_k in (1,) if spills and not measured else (1, 2, 4, _MOST_STRIPES):
            c = replace(config, split_k=split_k)
            if split_k > 1:
                if math.ceil(shape.k / c.block_k) < 2 * split_k:
                    break
                if c.tiles(shape.m, shape.n) * split_k > 4 * device.sm_count:
                    break  # too much of it would be adding up stripes
            if why_illegal(c, device) is None:
                yield c


def gemm_time(c: Gemm, device: Device, shape: Shape) -> float:
    """Microseconds by the measured rates: what candidates are compared by, no promise."""
    bits = max(8, BITS[shape.x_kind]), BITS[shape.w_kind]
    rates = _FP4_RATES if c.w_kind == "e2m1" else _RATES[bits]
    of_sm = rates[c.block_m, c.block_n] * 1e6 / _H200_SMS
    tile = 2 * c.block_m * c.block_n * c.block_k / of_sm  # 128 or 64 k of one block
    latency = _LATENCY_US[bits[0]] * c.block_k / 128
    blocks, together = c.tiles(shape.m, shape.n) * c.split_k, _blocks_per_sm(c)
    turns, alone = divmod(math.ceil(blocks / device.sm_count), together)
    k_tiles = math.ceil(math.ceil(shape.k / c.block_k) / c.split_k)
    compute = turns * max(together * tile, latency) + alone * max(2 * _ALONE * tile, latency)
    memory = shape.n * shape.k * bits[1] / 8 / _H200_BYTES_PER_US
    time = _LAUNCH_US + math.hypot(compute * k_tiles, memory)
    if c.split_k > 1:
        rounds = max(1.0, blocks / (together * device.sm_count))
        time += _SPLIT_US + _STRIPE_US * c.block_m * c.block_n * c.split_k * rounds
    return time


def is_idle(c: Gemm, device: Device, shape: Shape) -> bool:
    """Whether most SMs have nothing to do, and more stripes of K would give them some."""
    blocks, k_tiles = c.tiles(shape.m, shape.n) * c.split_k, math.ceil(shape.k / c.block_k)
    could_split = 2 * c.split_k <= _MOST_STRIPES and k_tiles >= 4 * c.split_k
    return 2 * blocks <= device.sm_count and could_split
