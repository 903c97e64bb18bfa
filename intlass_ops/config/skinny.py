"""skinny.cu, few tokens, every block loads its rows at once: its configurations and pick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .epilogue import Activation, named
from .problem import (
    BITS,
    LUT4,
    TYPE_BYTES,
    Device,
    Grouping,
    Shape,
    bytes_in_groups,
    codes_take_scales,
    columns_of,
    decoded_fp4,
    groups_in_columns,
    groups_of_chunk,
    groups_spread,
    mma_sass,
)

SKINNY_MAX_M = 16
# (tiles_n, warps, unroll), by kind of W, for up to 8 tokens and for more; where a block of 16 rows
# an SM is enough, where one of 32 is, where two are, and where more are needed. The best of 20
# layers without zero points on an H200 (benchmarks/results/h200-layers.json); None: by the rules of
# _direct_tile.
_TILES = {
    "s8": (
        ((1, 16, 2), (1, 16, 2), (2, 8, 2), (1, 8, 1)),
        ((1, 16, 2), (1, 16, 2), (2, 8, 2), (1, 4, 2)),
    ),
    "s4": (
        ((1, 16, 2), (2, 16, 2), (2, 8, 2), (2, 4, 2)),
        ((1, 16, 2), None, None, (2, 4, 1)),
    ),
    "e4m3": (  # of four layers
        ((1, 16, 2), (1, 16, 2), (1, 16, 1), (1, 8, 2)),
        ((1, 16, 1), (1, 16, 1), (1, 8, 2), (2, 4, 2)),
    ),
    **dict.fromkeys(LUT4, (  # of 4096x14336 in NF4; for more rows INT4's
        ((1, 8, 2), (1, 8, 2), (2, 8, 2), (2, 4, 2)),
        ((1, 16, 1), None, None, (2, 4, 1)),
    )),
}  # fmt: skip
# The same of `bytes_in_groups`, from four layers of FP8 in groups of 128
_TILES_IN_GROUPS = (
    ((1, 8, 4), (1, 8, 4), (1, 8, 2), (1, 8, 2)),
    ((1, 16, 1), (1, 16, 1), (2, 8, 2), (1, 4, 1)),
)


@dataclass(frozen=True)
class Skinny:
    """skinny.cu: one block computes 16 * tiles_n rows of W for all, at most 8 * tiles_m, tokens."""

    source: ClassVar[str] = "skinny.cu"
    entry: ClassVar[str] = "skinny"
    starts_early: ClassVar[bool] = True
    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    tiles_m: int
    tiles_n: int
    warps: int
    unroll: int
    blocks_per_sm: int
    groups_per_chunk: int
    chunks_per_group: int
    grouping: int
    has_zeros: bool
    whole: bool
    has_a_zero: bool = False
    blocked: bool = False  # FP4: scales in the order of fp4.to_blocked
    activation: Activation = Activation.NONE
    residual: bool = False  # the output's type, added after the activation
    experts: bool = False  # tokens by expert, each with a weight of its own (experts.py)

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return math.ceil(n / (16 * self.tiles_n)), 1, 1

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory: none, the warps' sums are static."""
        return 0

    def __str__(self) -> str:
        return (
            f"skinny {self.x_kind}x{self.w_kind} {8 * self.tiles_m}x{16 * self.tiles_n} "
            f"warps={self.warps} unroll={self.unroll}{named(self)}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        if self.x_kind == "e2m1":
            return mma_sass(decoded_fp4(self.scale_type))
        return mma_sass("s8" if self.x_kind == "s4" else self.x_kind)


def why_not_skinny(shape: Shape) -> str | None:
    """What keeps a problem from skinny.cu, or None."""
    if shape.m > SKINNY_MAX_M:
        return f"M={shape.m} is above {SKINNY_MAX_M}"
    if shape.has_a_zero:
        return "activations with a zero point need row sums of W"
    if not shape.aligned:
        return "rows do not start on 16-byte boundaries"
    if shape.x_kind in ("s4", "u4"):
        return "no INT4 activations"
    chunk_k = 512 // BITS[shape.w_kind]
    if shape.k % (chunk_k // 4):
        # rows may be aligned all the same, with padding between them
        return f"K={shape.k} does not fill the last 16 bytes of a row of W"
    if shape.w_kind == "e2m1":
        return None
    whole_chunks = shape.group_size >= shape.k or shape.group_size % chunk_k == 0
    if not whole_chunks and shape.group_size not in (chunk_k // 2, chunk_k // 4):
        return f"group_size={shape.group_size} does not divide chunks of {chunk_k} k"
    return None


def pick_skinny(device: Device, shape: Shape) -> Skinny:
    """Warps by how many blocks there are: few blocks need many loads in flight.

    Measured on an H200 over rows x warps x unroll x blocks (docs/notes/kernels.md); what the best
    of each shape needs more registers for than there are is left out.
    """
    return skinny_config(shape, _direct_tile(device, shape))


def skinny_candidates(device: Device, shape: Shape) -> Iterator[Skinny]:
    """What the tuner measures: as much in flight as registers hold, by few warps or many.

    The tuner refuses what spills.
    """
    chunks = math.ceil(shape.k * BITS[shape.w_kind] / 512)
    for tiles_n, unroll in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)):
        threads = _threads(device, shape, tiles_n * unroll, unroll)
        for warps in (4, 8, 16):
            handed = not groups_spread(shape) or tiles_n * warps <= 16
            if 32 * warps <= threads and warps * unroll <= chunks and handed:
                yield skinny_config(shape, (tiles_n, warps, unroll, threads // (32 * warps)))


def _threads(device: Device, shape: Shape, pieces: int, unroll: int) -> int:
    """Of an SM whose lanes ask for so many 16-byte pieces of W at once.

    What nearly always compiles without spilling in the 64, 128 and 255 registers that so many
    threads leave each other.
    """
    heavy = (columns_of(shape) > 8) + shape.zeros_in_sums
    for threads, most in ((_most_threads(device), 1 >> heavy), (512, 4 >> heavy)):
        if pieces <= most and unroll < 4:
            return threads
    return 256


def _most_threads(device: Device) -> int:
    """Of an SM. NVRTC 12.9 spills a few bytes there with 64 registers and float scales."""
    return 512 if device.arch in ("sm_100", "sm_120") else 1024


def few_tokens_grouping(shape: Shape) -> Grouping:
    if shape.w_kind == "e2m1" or codes_take_scales(shape):
        return Grouping.SCALED_WEIGHTS
    if groups_in_columns(shape):
        return Grouping.COLUMNS
    return Grouping.CHANNEL if shape.group_size >= shape.k else Grouping.SPAN


def skinny_config(shape: Shape, tile: tuple[int, int, int, int]) -> Skinny:
    tiles_n, warps, unroll, blocks_per_sm = tile
    chunk_k = 512 // BITS[shape.w_kind]
    return Skinny(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        tiles_m=math.ceil(columns_of(shape) / 8),
        tiles_n=tiles_n,
        warps=warps,
        unroll=unroll,
        blocks_per_sm=blocks_per_sm,
        groups_per_chunk=groups_of_chunk(shape),
        chunks_per_group=max(1, min(shape.group_size, shape.k) // chunk_k),
        grouping=few_tokens_grouping(shape),
        has_zeros=shape.has_zeros,
        whole=shape.k % (chunk_k * warps * unroll) == 0,
        blocked=shape.blocked,
    )


def _direct_tile(device: Device, shape: Shape) -> tuple[int, int, int, int]:
    """(tiles_n, warps, unroll, blocks_per_sm) of skinny.cu.

    Sums of x for zero points, and groups inside a chunk, take registers; with such sums the tiles
    are chosen for the bytes in flight, not measured.
    """
    chunks = math.ceil(shape.k / (512 // BITS[shape.w_kind]))
    spread = groups_spread(shape)
    blocks, sms = math.ceil(shape.n / 32), device.sm_count
    few_tokens = columns_of(shape) <= 8
    light_x = shape.x_kind == "e2m1" and device.arch.startswith("sm_90")  # others spill
    own_groups = groups_of_chunk(shape) > 1 and not codes_take_scales(shape)
    if own_groups and BITS[shape.x_kind] == 16 and device.arch.startswith("sm_90"):
        tiles_n, warps, unroll = _tile_of_groups(shape, blocks > sms)
        threads = _threads(device, shape, tiles_n * unroll, unroll)
        return _within(device, chunks, (tiles_n, warps, unroll, threads // (32 * warps)))
    if spread or columns_of(shape) > 16:
        deep = few_tokens and chunks >= 16
        tiles_n = 1 if 2 * blocks <= sms or columns_of(shape) > 16 else 2
        return tiles_n, max(1, min(8, chunks)), 1 + deep, 1
    if shape.zeros_in_sums and not few_tokens and blocks > sms:
        warps = max(1, min(8, chunks))
        return 1, warps, 1, min(4, 8 // warps)
    if chunks <= 16 and 2 * blocks <= sms:  # a small layer: each warp one chunk
        return 1, max(1, chunks), 1, 1
    measured = None
    if not shape.has_zeros and shape.w_kind in _TILES:
        rounds = 0 if 2 * blocks <= sms else min(math.ceil(blocks / sms), 3)
        of_kind = _TILES_IN_GROUPS if bytes_in_groups(shape) else _TILES[shape.w_kind]
        measured = of_kind[not few_tokens][rounds]
    if measured is not None:
        tiles_n, warps, unroll = measured
        tile = *measured, _threads(device, shape, tiles_n * unroll, unroll) // (32 * warps)
    elif shape.zeros_in_sums and blocks > sms:
        tile = 1, 8, 2, 2
    elif shape.zeros_in_sums:
        tile = 2, 8, 4 if few_tokens else 2, 1
    elif blocks <= sms:
        if few_tokens and chunks <= 64:
            tile = 2, 8, 4, 1
        elif few_tokens:
            tile = (2, 16, 2, 1) if shape.has_zeros else (1, 16, 1, 2)
        elif device.arch.startswith("sm_90") and chunks <= 64:
            tile = 2, 8, 4, 1
        else:
            tile = 2, 16, 1, 1
    elif blocks <= 2 * sms:
        if few_tokens and chunks <= 64:
            tile = (2, 8, 2, 2) if shape.has_zeros else (1, 8, 1, 4)
        else:
            deep = (few_tokens or light_x) and not shape.has_zeros
            tile = 2, 8, 2 if deep else 1, 2
    elif shape.has_zeros:
        tile = 1, 8, 2, 2 if few_tokens else 1
    else:
        warps = 8 if chunks > 32 else 4
        tile = 2, warps, 2, (16 if few_tokens or light_x else 8) // warps
    return _within(device, chunks, tile)


def _tile_of_groups(shape: Shape, many_rows: bool) -> tuple[int, int, int]:
    """For groups within a chunk under 16-bit activations: of the candidates the fastest, or nearly,
    on an H200 with 1, 8 and 16 tokens of 28672x4096 and 4096x4096."""
    operands = math.ceil(columns_of(shape) / 8)
    if groups_spread(shape):
        if operands > 1:
            return 2, 8, 2
        # a tail of K takes registers, and so do zero points that are bytes
        short = shape.k % 128 or (shape.has_zeros and TYPE_BYTES[shape.zero_type] == 1)
        return (1 if short else 2, 4, 1) if many_rows else (1, 8, 2)
    if operands > 4:
        return 1, 4, 4
    if operands > 1:
        return (2, 4, 2) if many_rows and operands == 2 else (1, 8, 2)
    return 1, 8, 2 if many_rows or BITS[shape.w_kind] == 4 else 4


def _within(
    device: Device, chunks: int, tile: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """A tile with no more warps than there is work for, or room."""
    tiles_n, warps, unroll, blocks_per_sm = tile
    while warps > 1 and warps * unroll > chunks:
        warps, unroll = (warps, unroll // 2) if unroll > 1 else (warps // 2, 1)
    if 32 * warps * blocks_per_sm > _most_threads(device):
        blocks_per_sm = max(1, _most_threads(device) // (32 * warps))
    return tiles_n, warps, unroll, blocks_per_sm
