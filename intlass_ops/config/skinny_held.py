"""skinny_held.cu, few tokens, whose activations stay in registers: its configurations and pick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .epilogue import Activation, named
from .problem import (
    BITS,
    LUT4,
    Device,
    Shape,
    codes_take_scales,
    decoded_fp4,
    groups_in_columns,
    groups_of_chunk,
    groups_spread,
    lut4_pairs_bytes,
    mma_sass,
)
from .skinny import few_tokens_grouping

# Clusters of so many blocks that an H200 holds at once, of its SMs
PLACES = {1: 1.0, 2: 1.0, 4: 0.88, 8: 0.85}
_MOST_GROUPS = 15  # each has a named barrier, of which a block has 16, one for all
_FEWEST_WARPS = 6  # five, of K that has no better divisors, have too little under way
WITH_CLUSTERS = ("sm_90a", "sm_100", "sm_120")


@dataclass(frozen=True)
class SkinnyHeld:
    """skinny_held.cu: a warp owns `warp_chunks` of K, and takes 16 * tiles_n rows a turn."""

    source: ClassVar[str] = "skinny_held.cu"
    entry: ClassVar[str] = "skinny_held"
    starts_early: ClassVar[bool] = True
    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    tokens: int  # a power of two, at least M
    tiles_n: int
    warps: int
    k_warps: int  # share the k of a block; so many are a group, with rows of its own
    warp_chunks: int
    split_k: int  # blocks of a cluster that share K
    num_stages: int
    x_staged: bool
    blocks_per_sm: int
    resident_blocks: int  # of the whole GPU
    fixed_smem: int  # bytes without the sums that a cluster's blocks keep
    groups_per_chunk: int
    chunks_per_group: int
    grouping: int
    has_zeros: bool
    has_a_zero: bool = False
    blocked: bool = False  # FP4: scales in the order of fp4.to_blocked
    fp16_codes: bool = False  # two MXFP4 operands: fp16 where their scales allow it, else bf16
    activation: Activation = Activation.NONE
    residual: bool = False  # the output's type, added after the activation

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def _clusters(self, n: int) -> int:
        turns = math.ceil(n / (16 * self.tiles_n * self.groups))
        return min(self.resident_blocks // self.split_k, turns)

    @property
    def groups(self) -> int:
        return self.warps // self.k_warps

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return self.split_k * self._clusters(n), 1, 1

    def smem_of(self, n: int, k: int) -> int:
        """Bytes for a problem: blocks that share K keep their sums of all rows to the end."""
        if self.split_k == 1:
            return self.fixed_smem
        rows = 16 * self.tiles_n * self.groups
        return self.fixed_smem + math.ceil(n / (rows * self._clusters(n))) * rows * self.tokens * 4

    def __str__(self) -> str:
        return (
            f"skinny_held {self.x_kind}x{self.w_kind} {self.tokens}x{16 * self.tiles_n} "
            f"warps={self.groups}x{self.k_warps} chunks={self.warp_chunks} split={self.split_k} "
            f"stages={self.num_stages}{named(self)}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        if self.x_kind == "e2m1":
            return mma_sass(decoded_fp4(self.scale_type))
        return mma_sass("s8" if self.x_kind == "s4" else self.x_kind)


def why_not_held(shape: Shape) -> str | None:
    """What keeps a problem for few tokens (skinny.why_not_skinny) from skinny_held.cu, or None."""
    if BITS[shape.w_kind] != 4:
        return "a warp's share of X has no room in registers"
    chunk_k = 512 // BITS[shape.w_kind]
    if shape.k == 0 or shape.k % chunk_k:
        return f"K={shape.k} is not a multiple of {chunk_k}"
    if shape.group_size >= shape.k and shape.zeros_in_sums and shape.w_kind != "e2m1":
        return "sums of x for one scale a row"
    return None


def pick_held(device: Device, shape: Shape) -> SkinnyHeld | None:
    """The configuration for a problem where it is the fastest that was measured, or None."""
    if why_not_held(shape) is not None or not device.arch.startswith("sm_90"):
        return None
    picked = next(held_candidates(device, shape), None)
    if picked is None:
        return None
    fp4 = shape.w_kind == "e2m1"
    few = 4 if shape.w_kind in LUT4 else 2
    if picked.split_k > 2 and shape.m <= few and BITS[shape.x_kind] == 16 and not fp4:
        return None  # long rows of few tokens are faster in the ring, where all warps share a row
    # rows for each SM; fewer are as fast loaded at once (skinny.cu)
    if shape.k < (4096 if fp4 else 2048):
        fewest = 40
    else:
        fewest = 28 if fp4 and (shape.m <= 2 or shape.m > 8) else 0
    return picked if shape.n * picked.split_k >= fewest * device.sm_count else None


def held_candidates(device: Device, shape: Shape) -> Iterator[SkinnyHeld]:
    """What fits registers and shared memory, the best of what was measured first."""
    many_rows = shape.n >= 128 * device.sm_count
    for split_k in PLACES if device.arch in WITH_CLUSTERS else (1,):
        tiles = _tiles(shape, many_rows, split_k)
        configs = (_config(device, shape, split_k, *tile) for tile in dict.fromkeys(tiles))
        found = [c for c in configs if c is not None]
        yield from sorted(found, key=lambda c: c.warps < _FEWEST_WARPS)
        if found:  # more blocks would share less
            break


def _tiles(shape: Shape, many_rows: bool, split_k: int) -> list[tuple[int, ...]]:
    """(warps, warp_chunks, num_stages): 64 registers of x among 16 warps, 128 among eight.

    Five stages have room for 16 tokens on their way to registers, three for eight, two for four: x
    is there sooner, which few turns are worth. A fourth number: so many
    blocks of an SM. For FP4 two are 5 to 10 % faster than one.
    """
    many_turns = many_rows or split_k > 1
    tiles: list[tuple[int, ...]]
    own_groups = groups_of_chunk(shape) > 1 and not codes_take_scales(shape)
    if own_groups and BITS[shape.x_kind] == 16:
        if shape.m > 8 and split_k > 1 and shape.has_zeros and not shape.zeros_in_sums:
            return []  # two registers short
        tiles = (
            [(8, 4, 2), (8, 4, 3)] if shape.m <= 4 and not many_turns else [(8, 4, 3), (8, 4, 2)]
        )
        if shape.w_kind in LUT4 and 4 < shape.m <= 8:
            tiles.insert(0, (16, 2, 2))
        few = groups_in_columns(shape) and not shape.zeros_in_sums
        return [*tiles, *([(16, 2, 2)] if shape.m <= 8 else []), *([(8, 8, 2)] if few else [])]
    if BITS[shape.x_kind] == 8:
        tiles = [
            (16, 2, 3),
            (16, 2, 2),
            (8, 4, 3),
            *([] if own_groups or shape.zeros_in_sums else [(16, 4, 2)]),
        ]
        if shape.m <= 2 or not many_turns:
            tiles.insert(0, (16, 2, 2))
    elif shape.m > 8:
        tiles = [(16, 2, 3), (16, 2, 2), (8, 4, 3), (8, 4, 2), (8, 4, 5), (16, 2, 5)]
        if shape.w_kind in LUT4 and shape.n >= 14336:
            tiles.insert(0, (16, 2, 2))
        elif not many_turns and shape.x_kind != "e2m1":
            tiles = tiles[4:] + tiles[:4]
        elif not many_rows or split_k > 1 or shape.x_kind == "e2m1":
            tiles.insert(0, (16, 2, 2))
    else:
        tiles = [(8, 4, 3), (8, 4, 2), (16, 2, 3), (16, 2, 2), (16, 4, 2), (8, 8, 2), (8, 8, 3)]
        if shape.w_kind == "e2m1" and many_rows and split_k == 1:
            tiles[:0] = (8, 4, 2, 2), (16, 4, 2)
        elif shape.x_kind == "e2m1" and split_k == 1:
            tiles.insert(0, (16, 2, 2))
        elif shape.m <= 4 and not many_turns:
            tiles.insert(0, (8, 4, 2))
        elif shape.m > 4 and shape.w_kind != "e2m1":
            tiles[:0] = (16, 2, 3), (8, 4, 3), (8, 8, 3)
    return tiles


def _config(
    device: Device,
    shape: Shape,
    split_k: int,
    warps: int,
    warp_chunks: int,
    num_stages: int,
    blocks_per_sm: int = 1,
) -> SkinnyHeld | None:
    chunk_k = 512 // BITS[shape.w_kind]
    chunks = shape.k // chunk_k
    k_warps = math.ceil(chunks / (split_k * warp_chunks))
    resident = int(device.sm_count * blocks_per_sm * PLACES[split_k]) // split_k * split_k
    spills = warps == 16 and warp_chunks == 4 and k_warps > 8 and BITS[shape.x_kind] == 16
    if shape.w_kind in LUT4 and not codes_take_scales(shape):
        spills |= warps * warp_chunks > 32 or (warps == 16 and shape.m > 8)
    if chunks % warp_chunks or k_warps > warps or not resident or spills:
        return None
    tokens = 1 << (shape.m - 1).bit_length()
    groups = warps // k_warps
    if groups > _MOST_GROUPS:
        return None
    warps = groups * k_warps
    x_stages = max(1, tokens // 4)
    few_turns = shape.n * split_k <= 64 * groups * resident
    spread = groups_spread(shape)
    tiles_m = math.ceil(tokens / 8)
    x_sums = warp_chunks * (groups_of_chunk(shape) if spread else 1) * tiles_m * 8
    left = 2 * warp_chunks * 32 * (1 + shape.has_zeros) * spread
    floats = 2 * tokens * 20 + x_sums * shape.zeros_in_sums + left
    mx = (shape.x_kind, shape.w_kind, shape.scale_type) == ("e2m1", "e2m1", "e8m0")
    c = SkinnyHeld(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        tokens=tokens,
        tiles_n=1,
        warps=warps,
        k_warps=k_warps,
        warp_chunks=warp_chunks,
        split_k=split_k,
        num_stages=num_stages,
        x_staged=BITS[shape.x_kind] == 16 and x_stages < num_stages,
        blocks_per_sm=blocks_per_sm,
        resident_blocks=resident,
        fixed_smem=warps * (num_stages * warp_chunks * 1024 + 4 * floats),
        groups_per_chunk=groups_of_chunk(shape),
        chunks_per_group=max(1, min(shape.group_size, shape.k) // chunk_k),
        grouping=few_tokens_grouping(shape),
        has_zeros=shape.has_zeros,
        blocked=shape.blocked,
        fp16_codes=mx and few_turns,
    )
    room = min(device.smem_per_block, device.smem_per_sm // blocks_per_sm) - 1024
    room -= lut4_pairs_bytes(shape.w_kind)
    return c if c.smem_of(shape.n, shape.k) <= room else None
