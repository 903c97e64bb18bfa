"""Grouped GEMMs: which kernel multiplies tokens that are sorted by expert, and its tiles of tokens.

They are skinny.cu, hopper.cu and gemm.cu, whose blocks ask a table that expert_tiles.cu makes on
the GPU: how many tokens an expert has is data, so there is room for the most tiles there can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from .gemm import Gemm
from .gemm_tiles import gemm_candidates, gemm_time
from .hopper import Hopper, why_not_hopper
from .hopper_tiles import hopper_candidates
from .problem import (
    BITS,
    TYPE_BYTES,
    Device,
    Grouping,
    Shape,
    bytes_in_groups,
    columns_of,
    groups_of_chunk,
    groups_spread,
)
from .skinny import SKINNY_MAX_M, Skinny, pick_skinny, skinny_config, why_not_skinny

Grouped = Skinny | Hopper | Gemm
MOST_SLOTS = 65535  # blockIdx.z
_TOGETHER = 8  # tiles of tokens whose blocks are neighbours and share rows of W
# For sm_120 ptxas 12.9 crashes over some of skinny.cu that is to fit into 128 registers; not for
_COMPILES = "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100"
_TILES = 16, 32, 64, 128, 256
_FEW = 12  # tokens of an expert, in the mean, that a tile of 16 holds more often than not


@dataclass(frozen=True)
class ExpertTiles:
    """expert_tiles.cu: which tokens of which expert each tile has, a warp for each."""

    source: ClassVar[str] = "expert_tiles.cu"
    entry: ClassVar[str] = "expert_tiles"
    starts_early: ClassVar[bool] = True
    threads: int = 256

    def grid(self, slots: int) -> tuple[int, int, int]:
        return math.ceil(32 * (slots + 1) / self.threads), 1, 1

    def __str__(self) -> str:
        return "expert_tiles"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


def slots_of(tokens: int, experts: int, tile: int) -> int:
    """The most tiles that tokens of so many experts, and those of none, can take."""
    groups = min(experts + 1, tokens)  # that have any
    return (tokens - groups) // tile + groups


def tokens_of(c: Grouped) -> int:
    """Of a tile."""
    if not isinstance(c, Skinny):
        return c.block_m
    return 8 * c.tiles_m // (c.groups_per_chunk if c.grouping == Grouping.COLUMNS else 1)


def _few_tokens(tokens: int, experts: int) -> int:
    return SKINNY_MAX_M // 2 if 2 * tokens <= _FEW * experts else SKINNY_MAX_M


def pick_experts(device: Device, shape: Shape, experts: int) -> tuple[Grouped, str]:
    """The configuration for the tokens of all experts, ``shape.m``, and why.

    Experts' tokens are taken for as many as they are in the mean, and half a tile each for lost.
    By three bits of their number, so that a new one seldom asks for all that follows.
    """
    step = 1 << max(0, shape.m.bit_length() - 3)
    return _pick(device, replace(shape, m=-(-shape.m // step) * step), experts)


@lru_cache(maxsize=4096)
def _pick(device: Device, shape: Shape, experts: int) -> tuple[Grouped, str]:
    tokens = shape.m
    few = replace(shape, m=_few_tokens(tokens, experts), n=shape.n * min(tokens, experts))
    not_skinny = why_not_skinny(few)
    if not_skinny is None and tokens <= _FEW * experts:
        c = replace(_skinny(device, few), experts=True)
        return c, "few tokens an expert are bound by reading W"
    found: list[tuple[Grouped, float]] = [*_hopper(device, shape, experts)]
    found = found or [*_gemm(device, shape, experts)]
    if not found:
        raise ValueError(f"no configuration for {experts} experts of {shape} on {device.arch}")
    best, _ = min(found, key=lambda candidate: candidate[1])
    why = "the least predicted time"
    return replace(best, experts=True), why if not_skinny is None else f"{why}; {not_skinny}"


def _skinny(device: Device, shape: Shape) -> Skinny:
    """Of a tile's tokens and all experts' rows: small blocks of 32 rows, many on an SM.

    Of what an H200 was timed with, six schemes of 1 to 128 tokens of Qwen3-30B-A3B's and gpt-oss's
    layers, the fastest or nearly (docs/notes/kernels.md). Where there are too few blocks of 32
    rows, another tile is as for one weight.
    """
    long_groups = bytes_in_groups(shape) and _chunks(shape) >= _LONG
    if shape.n <= 64 * device.sm_count and not long_groups:
        return _roomy(device, shape, pick_skinny(device, shape))
    tiles_n, warps, unroll, threads = _tile(device, shape)
    most = 1024 if device.arch.startswith("sm_90") else 512  # elsewhere more may spill
    tile = tiles_n, warps, unroll, min(threads, most) // (32 * warps)
    return _roomy(device, shape, skinny_config(shape, tile))


_LONG = 100  # chunks of a row


def _chunks(shape: Shape) -> int:
    return math.ceil(shape.k * BITS[shape.w_kind] / 512)


def _tile(device: Device, shape: Shape) -> tuple[int, int, int, int]:
    """(tiles_n, warps, unroll, threads of an SM): as few warps as K is short."""
    few, chunks = columns_of(shape) <= 8, _chunks(shape)
    blocks = shape.n / 32 / device.sm_count  # an SM, at most
    short, sparse = chunks < 12, chunks >= 12 and blocks <= 4
    sm_90 = device.arch.startswith("sm_90")  # elsewhere some spill
    if BITS[shape.w_kind] == 8:
        if few and chunks >= 16 and bytes_in_groups(shape):  # timed with FP8
            return (1, 4, 4, 512) if chunks >= _LONG else (1, 4, 2, 768 if sparse else 1024)
        if few and chunks >= 16:
            deep = 3 if shape.w_kind == "s8" else 2  # FP8 would spill
            return (1, 4, 2, 512) if sparse else (2, 4, deep, 512)
        if few:
            spills = shape.w_kind == "s8" and bytes_in_groups(shape)  # under fp16
            return 2, 4, 1, 768 if spills else 1024
        return 1, 4, 2, 512 if shape.group_size < shape.k else 1024
    if BITS[shape.x_kind] == 8:
        if not few:
            return 2, 2, 1, 768
        if sparse:
            return 2, 4, 2, 512
        if groups_spread(shape) and sm_90 and not shape.has_zeros:
            return 1, 1, 4, 384
        whole = shape.k % 512 == 0  # of four warps; others spill
        return (2, 2, 1, 1024) if short and blocks >= 8 else (2, 4, 1, 1024 if whole else 768)
    if not few:
        one = 2, 1, 2, 384 if sm_90 else 256
        return (2, 1, 1, 512) if short else one if chunks < 20 else (2, 4, 1, 512)
    if chunks < 20 and blocks >= (8 if short else 24):
        return 2, 1, 2, 384 if shape.has_zeros else 512
    if chunks < 20:
        return (2, 4, 2, 512) if sparse else (2, 4, 1, 512 if short else 768)
    if chunks >= _LONG and shape.w_kind == "s4" and sm_90:
        return 2, 4, 4, 384
    return 2, 2 if blocks >= 8 and chunks < 40 else 4, 2, 512


def _roomy(device: Device, shape: Shape, c: Skinny) -> Skinny:
    """With registers for an expert's addresses."""
    sm_90 = device.arch.startswith("sm_90")
    within = groups_of_chunk(shape) > 1
    within &= groups_spread(shape) or shape.group_size < 64 or BITS[shape.w_kind] == 8
    measured = sm_90 and TYPE_BYTES[shape.zero_type] == 1
    if within or shape.zeros_in_sums or (shape.has_zeros and not measured):
        c = replace(c, unroll=1 if c.tiles_m > 1 else c.unroll)
        if c.tiles_n == c.tiles_m == c.warps == 1:
            return c
    elif device.arch in _COMPILES:
        return c
    return replace(c, blocks_per_sm=min(c.blocks_per_sm, max(1, 256 // c.threads)))


def _of_one_weight(tokens: int, experts: int, tile: int) -> int:
    """Tokens of one weight that take as many tiles."""
    busy = min(tokens, experts)
    return tile * max(busy, round(tokens / tile + busy / 2))


def _hopper(device: Device, shape: Shape, experts: int) -> Iterator[tuple[Hopper, float]]:
    if why_not_hopper(device, shape) is not None:
        return
    for tile in _TILES[1:]:
        for c, us in hopper_candidates(
            device, replace(shape, m=_of_one_weight(shape.m, experts, tile))
        ):
            alone = c.cluster == 1 and not (c.stream_k or c.by_stages or c.rest_by_k)
            spills = c.scale_type == "e8m0" and (c.block_m, c.consumers) == (64, 4)  # 8 bytes
            if c.block_m == tile and alone and not (c.needs_token_sums or spills):
                yield c, us


def _gemm(device: Device, shape: Shape, experts: int) -> Iterator[tuple[Gemm, float]]:
    for tile in _TILES[:-1]:
        for c in gemm_candidates(device, replace(shape, m=tile), measured=False):
            if c.block_m == tile and c.split_k == 1 and not _spills(c, device):
                as_one = replace(shape, m=_of_one_weight(shape.m, experts, tile))
                yield c, gemm_time(c, device, as_one)


def _spills(c: Gemm, device: Device) -> bool:
    """Whether the expert's addresses are more than a tile that fills the registers has room for."""
    grouping = Grouping(c.grouping)
    short = c.has_zeros or device.arch in ("sm_100", "sm_120")
    in_sums = short and grouping in (Grouping.TILE, Grouping.SPAN)
    full = c.block_m * c.block_n >= (64 if in_sums else 128) * 128
    in_spans = grouping is Grouping.SCALED_SPANS and c.w_kind != "e2m1"
    return full and (in_sums or in_spans)


def tiles_together(c: Grouped, slots: int) -> int:
    """Tiles of tokens whose blocks are neighbours: of skinny.cu each has other experts' rows."""
    return min(_TOGETHER, slots) if isinstance(c, Gemm) else 1


def grid_of(c: Grouped, n: int, slots: int, sm_count: int) -> tuple[int, int, int]:
    """Of blocks; ``slots`` whole rounds of `tiles_together`."""
    if isinstance(c, Hopper):
        return min(slots * math.ceil(n / c.block_n), sm_count * c.blocks_per_sm), 1, 1
    near = tiles_together(c, slots)
    return c.grid(1, n)[0] * near, 1, slots // near
