"""gemm.cu, the portable tensor-core kernel for any problem: its configurations and pick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from .epilogue import Activation, named
from .problem import BITS, SPAN_K, Device, Grouping, Shape, mma_sass, weights_take_scales


@dataclass(frozen=True)
class Gemm:
    """gemm.cu: one block computes block_n rows of W by block_m tokens, ring of num_stages."""

    source: ClassVar[str] = "gemm.cu"
    entry: ClassVar[str] = "gemm"

    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    block_m: int
    block_n: int
    block_k: int
    warps_m: int
    warps_n: int
    num_stages: int
    split_k: int
    grouping: int
    has_zeros: bool
    has_a_zero: bool
    aligned: bool
    activation: Activation = Activation.NONE
    residual: bool = False  # the output's type, added after the activation

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def smem_bytes(self) -> int:
        """The ring, the epilogue's vectors of tokens and rows, and what GroupTable holds."""
        bits = self.block_m * BITS[self.x_kind] + self.block_n * BITS[self.w_kind]
        scaled = self.grouping == Grouping.SCALED_WEIGHTS
        table = 4 * (1 + self.has_zeros) * self.block_n if scaled else 0
        vectors = 4 * (2 * self.block_m + self.block_n)
        return self.num_stages * bits * self.block_k // 8 + vectors + table

    def tiles(self, m: int, n: int) -> int:
        """Output tiles, each the work of split_k thread blocks."""
        return math.ceil(m / self.block_m) * math.ceil(n / self.block_n)

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return self.tiles(m, n), self.split_k, 1

    @property
    def values_per_block(self) -> int:
        """Words a block leaves in the workspace when K is split: gemm.cu, add_stripes."""
        tiles_m, tiles_n = self.block_m // self.warps_m // 8, self.block_n // self.warps_n // 16
        return self.threads * 4 * (tiles_n * tiles_m + tiles_n + tiles_m)

    def __str__(self) -> str:
        split = f" split_k={self.split_k}" if self.split_k > 1 else ""
        return (
            f"gemm {self.x_kind}x{self.w_kind} "
            f"{self.block_m}x{self.block_n}x{self.block_k}/{self.num_stages}{split}{named(self)}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        """Regular expressions of the tensor-core instructions the compiled kernel must hold."""
        wide = self.grouping <= Grouping.TILE and self.block_k >= 128  # gemm.cu, wide_steps
        return mma_sass(self.x_kind, 64 if wide else 32)


def why_illegal(c: Gemm, device: Device) -> str | None:
    """What forbids this configuration on this device, or None."""
    if c.block_m % (8 * c.warps_m):
        return f"block_m={c.block_m} is no multiple of 8 tokens for each of warps_m={c.warps_m}"
    if c.block_n % (16 * c.warps_n):
        return f"block_n={c.block_n} is no multiple of 16 rows for each of warps_n={c.warps_n}"
    for kind in (c.x_kind, c.w_kind):
        chunks = c.block_k * BITS[kind] // 128
        if chunks < 1 or chunks & (chunks - 1):
            return f"block_k={c.block_k} of {kind} is no power of two of 16-byte chunks"
    if c.num_stages < 2:
        return f"num_stages={c.num_stages} is below 2"
    if c.smem_bytes > device.smem_per_block:
        return f"{c.smem_bytes} bytes of shared memory exceed {device.smem_per_block}"
    accumulators = c.block_m * c.block_n // (32 * c.warps_m * c.warps_n)
    sums_of_x = c.has_zeros and c.grouping == Grouping.TILE and BITS[c.x_kind] == 16
    if c.split_k > 1 and sums_of_x and accumulators >= 64:
        return f"split_k={c.split_k} with zero points and groups spills beside {accumulators} sums"
    return None


def grouping_of(k: int, group_size: int, block_k: int) -> Grouping:
    if group_size >= k:
        return Grouping.CHANNEL
    if group_size == block_k:
        return Grouping.TILE
    return Grouping.STRADDLING if group_size % SPAN_K else Grouping.SPAN


def _crowded(device: Device, shape: Shape) -> bool:
    """NVRTC 12.9 needs more registers there, so tiles that take them all elsewhere spill."""
    return device.arch in ("sm_100", "sm_120") and BITS[shape.x_kind] == 16


def _rows(device: Device, shape: Shape) -> int:
    """Rows of W that four warps beside each other hold without spilling, for up to 64 tokens."""
    channel, floats = shape.group_size >= shape.k, BITS[shape.x_kind] == 16
    crowded, sm_90 = _crowded(device, shape), device.arch in ("sm_90", "sm_90a")
    grouping = grouping_of(shape.k, shape.group_size, 64 if shape.group_size == 64 else 128)
    if (
        grouping is Grouping.STRADDLING
        or (shape.has_zeros and (crowded or shape.has_a_zero or grouping is Grouping.SPAN))
        or (not channel and shape.w_kind == "s8" and (crowded or (floats and sm_90)))
    ):
        return 64  # masked fragments, or sums of x, beside two sets of accumulators
    return 128


_LITTLE_SMEM = 100 << 10  # bytes an SM: sm_86, sm_89, sm_120
_SCALED_K = 64  # k of a tile of 16-bit floats that takes all registers
Tile = tuple[int, int, int, int]  # block_m, block_n, warps_m, warps_n
_TALL, _SQUARE, _WIDE = (128, 128, 1, 4), (128, 128, 2, 2), (128, 256, 2, 4)


def _large_tile(device: Device, shape: Shape) -> Tile | None:
    """For many tokens, where one set of accumulators is enough.

    Warps of 64 tokens by 64 rows; of 128 by 32 where INT4 codes become 16-bit floats: that is done
    half as often then.
    """
    channel = shape.group_size >= shape.k and not shape.has_zeros
    if BITS[shape.x_kind] == 16:
        fits = shape.group_size % _SCALED_K == 0 and not _crowded(device, shape)
        scaled = weights_take_scales(shape) and fits
        if not (channel or scaled):
            return None
        return _TALL if BITS[shape.w_kind] == 4 else _SQUARE
    if not channel:
        return None
    return _WIDE if shape.w_kind == "s8" and not _little(device, shape) else _SQUARE


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
    block_k = _SCALED_K if (floats and large) or little or of_64 else 128
    scaled = floats and large and weights_take_scales(shape)
    grouping = grouping_of(shape.k, shape.group_size, block_k)
    whole = shape.k * BITS[shape.x_kind] % 128 == 0 and shape.k * BITS[shape.w_kind] % 128 == 0
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
        grouping=Grouping.SCALED_WEIGHTS if scaled else grouping,
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
    """Warp tiles by what the accumulators leave of the registers, split_k by SM count.

    Measured on an H200 (docs/notes/kernels.md): the large tiles with one set of accumulators, 64
    tokens by 32 rows with a second one for groups; four warps a block, two blocks an SM.
    """
    tile = _large_tile(device, shape)
    large_tiles = math.ceil(shape.m / 128) * math.ceil(shape.n / 128)
    few, share = (65, 1) if tile == _TALL else (192, 1.5)
    if tile is None or shape.m < few or large_tiles <= share * device.sm_count:
        tile = _tokens(shape.m), _rows(device, shape), 1, 4
    elif tile == _WIDE:  # 5 % faster, where no SM gets more to do
        wide_tiles = math.ceil(shape.m / 128) * math.ceil(shape.n / 256)
        if 2 * math.ceil(wide_tiles / device.sm_count) > math.ceil(large_tiles / device.sm_count):
            tile = _SQUARE
    config = _config(device, shape, tile)
    if problem := why_illegal(config, device):
        raise ValueError(f"no configuration for {shape} on {device.arch}: {problem}")
    config = _split(config, device, shape)
    if why_illegal(config, device) is not None:
        config = _split(_config(device, shape, (config.block_m, 64, 1, 4)), device, shape)
    return config


def _split(c: Gemm, device: Device, shape: Shape) -> Gemm:
    """Two blocks an SM, in stripes of at least four tiles of K; powers of two: few kernels."""
    tiles, k_tiles = c.tiles(shape.m, shape.n), math.ceil(shape.k / c.block_k)
    wanted = min(_blocks_per_sm(c) * device.sm_count // max(tiles, 1), k_tiles // 4, 4)
    return replace(c, split_k=1 << max(wanted, 1).bit_length() - 1)


def gemm_candidates(device: Device, shape: Shape) -> Iterator[Gemm]:
    """What the tuner measures: warps that hold no more than those of `pick_gemm` for such operands.

    The compiler's choices differ all the same; the tuner refuses what spills.
    """
    tokens, rows = _tokens(shape.m), _rows(device, shape)
    tiles = [(m, n, 1, 4) for m in {tokens, max(8, tokens // 2)} for n in {rows, 64}]
    if shape.m > 64:
        large = _large_tile(device, shape)
        tiles += [(128, rows, 2, 4)] + ([] if large is None else [large])
        tiles += [_SQUARE] if large == _WIDE else []
    for tile in tiles:
        config = _config(device, shape, tile)
        for split_k in (1, 2, 4, _MOST_STRIPES):
            c = replace(config, split_k=split_k)
            whole_stripes = split_k == 1 or math.ceil(shape.k / c.block_k) >= 2 * split_k
            if whole_stripes and why_illegal(c, device) is None:
                yield c


_MOST_STRIPES = 8


def is_idle(c: Gemm, device: Device, shape: Shape) -> bool:
    """Whether most SMs have nothing to do, or too much of it is adding up stripes of K."""
    blocks, k_tiles = c.tiles(shape.m, shape.n) * c.split_k, math.ceil(shape.k / c.block_k)
    could_split = 2 * c.split_k <= _MOST_STRIPES and k_tiles >= 4 * c.split_k
    few = 2 * blocks <= device.sm_count and could_split
    return few or (c.split_k > 1 and blocks > 4 * device.sm_count)
