"""skinny_ring.cu, few tokens, rows stream through a ring: its configurations and pick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from .epilogue import Activation, named
from .problem import (
    BITS,
    LUT4,
    Device,
    Grouping,
    Shape,
    decoded_fp4,
    groups_in_columns,
    groups_of_chunk,
    groups_spread,
    lut4_pairs_bytes,
    mma_sass,
)
from .skinny import few_tokens_grouping

# (tiles_n, warps, most of them in a group, num_stages, blocks_per_sm)
_LONG_ROWS = (2, 16, 16, 3, 1)
_FEWEST_TOKENS: tuple[tuple[int, int, int, int, int], ...] = (
    (2, 8, 8, 3, 2),
    (2, 16, 8, 3, 1),
    _LONG_ROWS,
    (2, 8, 8, 3, 1),
    (1, 8, 8, 3, 2),
    (2, 8, 2, 4, 2),
)
_FEWEST_OF_LUT4 = (1, 8, 8, 3, 2), (2, 8, 8, 3, 1), (2, 8, 2, 4, 2)  # others spill


@dataclass(frozen=True)
class SkinnyRing:
    """skinny_ring.cu: blocks stay on their SM; a group of warps takes 16 * tiles_n rows a time."""

    source: ClassVar[str] = "skinny_ring.cu"
    entry: ClassVar[str] = "skinny_ring"
    starts_early: ClassVar[bool] = True
    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    tokens: int  # a power of two, at least M
    tiles_n: int
    warps: int
    groups: int
    num_stages: int
    blocks_per_sm: int
    resident_blocks: int  # of the whole GPU
    segment_k: int  # k of x in shared memory at a time
    fixed_smem: int  # bytes without the sums of segments
    groups_per_chunk: int
    chunks_per_group: int
    grouping: int
    has_zeros: bool
    whole: bool
    has_a_zero: bool = False
    blocked: bool = False  # FP4: scales in the order of fp4.to_blocked
    activation: Activation = Activation.NONE
    residual: bool = False  # the output's type, added after the activation

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def smem_bytes(self) -> int:
        return self.fixed_smem

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        tiles = math.ceil(n / (16 * self.tiles_n))
        return min(self.resident_blocks, math.ceil(tiles / self.groups)), 1, 1

    def smem_of(self, n: int, k: int) -> int:
        """Bytes for a problem: with several segments of K, sums of every tile are kept between."""
        if k <= self.segment_k:
            return self.fixed_smem
        blocks, _, _ = self.grid(0, n)
        turns = math.ceil(math.ceil(n / (16 * self.tiles_n)) / (blocks * self.groups))
        return self.fixed_smem + turns * self.groups * _ring_slab(self.tokens, self.tiles_n)

    def __str__(self) -> str:
        return (
            f"skinny_ring {self.x_kind}x{self.w_kind} {self.tokens}x{16 * self.tiles_n} "
            f"warps={self.groups}x{self.warps // self.groups} stages={self.num_stages}{named(self)}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return mma_sass(decoded_fp4(self.scale_type) if self.x_kind == "e2m1" else self.x_kind)


def _ring_slab(tokens: int, tiles_n: int) -> int:
    """Bytes of a warp's sums of one tile, the row padded by a sum of x."""
    return 4 * tokens * (16 * tiles_n + 4)


def _ring_smem(c: SkinnyRing) -> int:
    ring = c.warps * c.num_stages * 1024 * c.tiles_n
    x_k = c.segment_k + 128 * (c.grouping == Grouping.COLUMNS)  # a chunk of zeros, of INT4
    x = x_k * c.tokens * 2  # fragments of 16 bits
    sums = (1 if c.tokens > 8 else 2) * c.warps * _ring_slab(c.tokens, c.tiles_n)
    spread = c.grouping == Grouping.SPAN and c.groups_per_chunk > 1
    left = c.warps * 2 * c.tiles_n * 128 * (1 + c.has_zeros) if spread else 0
    return ring + x + sums + left


def _even_share(chunks: int, most: int) -> int:
    """Warps, at most so many and at least half of them, that share a row's chunks evenly."""
    if chunks == 1:
        return 1
    return min(range(most, most // 2 - 1, -1), key=lambda g: math.ceil(chunks / g) * g)


def why_not_ring(shape: Shape) -> str | None:
    """What keeps a problem for few tokens (skinny.why_not_skinny) from skinny_ring.cu, or None.

    Where decoding costs nothing, loading at once is as fast (W8A8, W4A8, W8A16 on an H200).
    """
    if shape.w_kind == "e2m1":
        return None
    if BITS[shape.w_kind] != 4 or BITS[shape.x_kind] != 16:
        return "decoding costs nothing that a ring could hide"
    return None


def pick_ring(device: Device, shape: Shape) -> SkinnyRing | None:
    """The first choice that fits shared memory."""
    return next(ring_candidates(device, shape), None)


def ring_candidates(device: Device, shape: Shape) -> Iterator[SkinnyRing]:
    """What fits shared memory, the best of what was measured first."""
    spills = device.arch in ("sm_100", "sm_120")  # NVRTC 12.9
    if spills and groups_spread(shape) and shape.has_zeros and shape.m > 8:
        return
    chunk_k = 512 // BITS[shape.w_kind]
    chunks = max(1, math.ceil(shape.k / chunk_k))
    tokens = 1 << (shape.m - 1).bit_length()
    zeros = shape.has_zeros and (shape.zeros_in_sums or shape.x_kind == "fp16")
    columns = groups_in_columns(shape) and (tokens > 1 or (spills and shape.has_zeros))
    own_groups = groups_spread(shape) or columns
    heavy = shape.m > 8 or zeros or own_groups  # registers for 8 warps only
    if shape.w_kind == "e2m1":  # others were not tried
        fewest = _FEWEST_TOKENS[1:3] if device.arch.startswith("sm_90") and shape.k > 8192 else ()
    else:
        fewest = (_LONG_ROWS, *_FEWEST_TOKENS) if shape.k > 8192 else _FEWEST_TOKENS
    if shape.w_kind in LUT4:
        fewest = _FEWEST_OF_LUT4
    for tiles_n, warps, most, num_stages, blocks_per_sm in (
        # One token or two: so many warps on a row that x is of use to few rows, and soon read
        *([] if heavy or tokens > 2 else fewest),
        *([] if heavy or tokens > 4 else [(2, 8, 4, 3, 2)]),
        *([] if heavy else [(2, 16, 4, 3, 1), (2, 12, 4, 3, 1)]),
        (2, 8, 4, 4, 1),
        (2, 8, 4, 3, 1),
        (2, 4, 4, 3, 1),
        (2, 8, 2, 4, 1),
    ):
        group_warps = _even_share(chunks, most)
        groups = min(8, max(1, warps // group_warps))
        config = SkinnyRing(
            x_kind=shape.x_kind,
            w_kind=shape.w_kind,
            scale_type=shape.scale_type,
            zero_type=shape.zero_type,
            out_type=shape.out_type,
            tokens=tokens,
            tiles_n=tiles_n,
            warps=groups * group_warps,
            groups=groups,
            num_stages=num_stages,
            blocks_per_sm=blocks_per_sm,
            resident_blocks=device.sm_count * blocks_per_sm,
            segment_k=chunks * chunk_k,
            fixed_smem=0,
            groups_per_chunk=groups_of_chunk(shape),
            chunks_per_group=max(1, min(shape.group_size, shape.k) // chunk_k),
            grouping=few_tokens_grouping(shape),
            has_zeros=shape.has_zeros,
            whole=shape.k % chunk_k == 0,
            blocked=shape.blocked,
        )
        room = min(device.smem_per_block, device.smem_per_sm // blocks_per_sm - 1024)
        room -= lut4_pairs_bytes(shape.w_kind)
        # all of x at once, or for the last choices in segments
        segments = range(1, 9) if warps <= 8 and blocks_per_sm == 1 else (1,)
        for count in segments:
            rounds = math.ceil(chunks / (count * group_warps))
            config = replace(config, segment_k=min(rounds * group_warps, chunks) * chunk_k)
            config = replace(config, fixed_smem=_ring_smem(config))
            if config.smem_of(shape.n, shape.k) <= room:
                yield config
                break
