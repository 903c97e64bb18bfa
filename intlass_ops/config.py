"""Which kernel configurations exist, which are legal, and which one a problem gets.

The single statement of every kernel constraint. Pure: no CUDA, no torch calls; what the hardware
offers arrives as a `Device`. The kernels state the same facts as static_asserts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import ClassVar

SPAN_K = 32  # k of one span, operands.cuh
BITS = {"bf16": 16, "fp16": 16, "s8": 8, "s4": 4, "u4": 4}
TYPE_BYTES = {
    "float": 4,
    "int": 4,
    "__nv_bfloat16": 2,
    "__half": 2,
    "signed char": 1,
    "unsigned char": 1,
}
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


class Grouping(IntEnum):
    """How the scale groups of a row lie in the spans of the main loop (gemm.cu)."""

    CHANNEL = 0  # one group: scaled once, after all of K
    TILE = 1  # groups of block_k
    SPAN = 2  # groups of whole spans
    STRADDLING = 3  # a group may end inside a span: group_size 16, 48, ...


@dataclass(frozen=True)
class Device:
    """What a GPU offers a kernel."""

    arch: str
    sm_count: int
    smem_per_block: int  # bytes, opt-in maximum
    smem_per_sm: int


# Shared memory by architecture, CUDA C++ Programming Guide, "Compute Capabilities".
_SMEM_KIB = {
    "sm_80": (163, 164),
    "sm_86": (99, 100),
    "sm_89": (99, 100),
    "sm_90a": (227, 228),
    "sm_100": (227, 228),
    "sm_120": (99, 100),
}
_REFERENCE_SMS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90a": 132,
    "sm_100": 148,
    "sm_120": 170,
}


def device_of(arch: str, sm_count: int | None = None) -> Device:
    """The Device of an architecture, with the SM count of its best known card by default."""
    block, sm = _SMEM_KIB.get(arch, (99, 100))
    count = sm_count if sm_count is not None else _REFERENCE_SMS.get(arch, 84)
    return Device(arch, count, block * 1024, sm * 1024)


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

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def smem_bytes(self) -> int:
        """The ring, and the epilogue's vectors of tokens and rows."""
        bits = self.block_m * BITS[self.x_kind] + self.block_n * BITS[self.w_kind]
        return self.num_stages * bits * self.block_k // 8 + 4 * (2 * self.block_m + self.block_n)

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
            f"{self.block_m}x{self.block_n}x{self.block_k}/{self.num_stages}{split}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        """Regular expressions of the tensor-core instructions the compiled kernel must hold."""
        wide = self.grouping <= Grouping.TILE and self.block_k >= 128  # gemm.cu, wide_steps
        return _mma_sass(self.x_kind, arch, 64 if wide else 32)


def _mma_sass(x_kind: str, arch: str, int4_k: int = 32) -> tuple[str, ...]:
    if x_kind in ("bf16", "fp16"):
        return (r"HMMA\.16816\.F32" + (r"\.BF16" if x_kind == "bf16" else r"\b"),)
    native = x_kind in ("s4", "u4") and arch in ("sm_80", "sm_86", "sm_89")
    return (rf"IMMA\.168{int4_k}\.S4\.S4" if native else r"IMMA\.16832\.S8\.S8",)


@dataclass(frozen=True)
class Skinny:
    """skinny.cu: one block computes 16 * tiles_n rows of W for all, at most 8 * tiles_m, tokens."""

    source: ClassVar[str] = "skinny.cu"
    entry: ClassVar[str] = "skinny"
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
            f"warps={self.warps} unroll={self.unroll}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return _mma_sass(self.x_kind, arch)


HOPPER_BLOCK_K = 128


@dataclass(frozen=True)
class SkinnyRing:
    """skinny_ring.cu: blocks stay on their SM; a group of warps takes 16 * tiles_n rows a time."""

    source: ClassVar[str] = "skinny_ring.cu"
    entry: ClassVar[str] = "skinny_ring"
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
            f"warps={self.groups}x{self.warps // self.groups} stages={self.num_stages}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return _mma_sass(self.x_kind, arch)


def _ring_slab(tokens: int, tiles_n: int) -> int:
    """Bytes of a warp's sums of one tile, the row padded by a sum of x."""
    return 4 * tokens * (16 * tiles_n + 4)


def _ring_smem(c: SkinnyRing) -> int:
    ring = c.warps * c.num_stages * 1024 * c.tiles_n
    x = c.segment_k * c.tokens * BITS[c.x_kind] // 8
    return ring + x + (1 if c.tokens > 8 else 2) * c.warps * _ring_slab(c.tokens, c.tiles_n)


@dataclass(frozen=True)
class Hopper:
    """hopper.cu: a block's consumers compute 64 * tiles_n rows of W each, by block_m tokens."""

    source: ClassVar[str] = "hopper.cu"
    entry: ClassVar[str] = "hopper"

    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    block_m: int
    tiles_n: int
    consumers: int
    num_stages: int
    stream_k: bool  # whether the blocks share out the last tiles by k
    raster: int
    grouping: int
    groups_per_tile: int
    has_zeros: bool
    has_a_zero: bool = False

    @property
    def block_n(self) -> int:
        return 64 * self.tiles_n * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def blocks_per_sm(self) -> int:
        return 2 if self.consumers == 1 else 1

    @property
    def stage_bytes(self) -> int:
        bits = self.block_m * BITS[self.x_kind] + self.block_n * BITS[self.w_kind]
        sums = 4 * self.groups_per_tile * self.block_m if self.has_zeros else 0
        return math.ceil((bits * HOPPER_BLOCK_K // 8 + sums) / 1024) * 1024

    @property
    def smem_bytes(self) -> int:
        """Barriers and the ring, then staging for the output."""
        slab = math.gcd(64, self.block_m)
        staging = self.consumers * (slab * (64 * TYPE_BYTES[self.out_type] + 16) + 4 * self.block_m)
        return 1024 + self.num_stages * self.stage_bytes + staging

    @property
    def wgmma(self) -> tuple[str, int]:
        """Kind of the operands and tokens of its wgmma instructions."""
        return self.x_kind, self.block_m

    def tiles(self, m: int, n: int) -> int:
        return math.ceil(m / self.block_m) * math.ceil(n / self.block_n)

    def grid(self, m: int, n: int, k: int, sm_count: int) -> tuple[int, int, int]:
        """A block for every place on the GPU, if there is work for it."""
        work = self.tiles(m, n) * (math.ceil(k / HOPPER_BLOCK_K) if self.stream_k else 1)
        return min(sm_count * self.blocks_per_sm, work), 1, 1

    def shares(self, m: int, n: int, k: int, blocks: int) -> tuple[int, int, int, int, int, int]:
        """hopper.cu's Shares: tiles of m, n, k; tiles taken whole; k tiles of the rest a block."""
        of_m, of_n = math.ceil(m / self.block_m), math.ceil(n / self.block_n)
        k_tiles = math.ceil(k / HOPPER_BLOCK_K)
        shared = of_m * of_n % blocks if self.stream_k else 0
        each, extra = divmod(shared * k_tiles, blocks)
        return of_m, of_n, k_tiles, of_m * of_n - shared, each, extra

    @property
    def values_per_block(self) -> int:
        """Words a block leaves in the workspace of a shared tile."""
        return self.block_m * self.block_n

    def __str__(self) -> str:
        extra = " stream_k" if self.stream_k else ""
        return (
            f"hopper {self.x_kind}x{self.w_kind} "
            f"{self.block_m}x{self.block_n}x{HOPPER_BLOCK_K}/{self.num_stages}{extra}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        """Regular expressions of the tensor-core instructions the compiled kernel must hold."""
        return (r"IGMMA\.64x" if self.x_kind == "s8" else r"HGMMA\.64x",)


@dataclass(frozen=True)
class TokenSums:
    """token_sums.cu: sums of tokens over spans of k, which zero points multiply."""

    source: ClassVar[str] = "token_sums.cu"
    entry: ClassVar[str] = "token_sums"
    x_kind: str
    span: int
    tokens: int = 32
    spans: int = 8
    threads: int = 256

    def __str__(self) -> str:
        return f"token_sums {self.x_kind} {self.span}"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


def why_not_hopper(device: Device, shape: Shape) -> str | None:
    """What keeps a problem from hopper.cu, or None."""
    if device.arch != "sm_90a":
        return f"{device.arch} has no wgmma"
    if shape.k == 0:
        return "K=0"
    if shape.has_a_zero:
        return "activations with a zero point need row sums of W"
    if not shape.aligned:
        return "rows do not start on 16-byte boundaries"
    if not shape.apart:
        return "rows overlap, which TMA does not take"
    if shape.x_kind in ("s4", "u4"):
        return "no INT4 activations"
    whole = shape.group_size >= shape.k
    if shape.x_kind == "s8" and shape.w_kind == "s8" and not whole:
        return "INT8 weights under INT8 activations have one scale a row"
    if not whole and shape.group_size % HOPPER_BLOCK_K and shape.group_size not in (32, 64):
        return f"group_size={shape.group_size} is neither 32, 64 nor a multiple of {HOPPER_BLOCK_K}"
    return None


# Tiles of hopper.cu: block_m, tiles_n, consumers, and the TOPS of an H200 full of them, by kinds
# of activations and weights. These and the times below are a fit to 168 problems, M = 32..2048 on
# four layers, with every tile measured on each: picking by them loses 0.4 % to the best tile.
_HOPPER_TILES = {
    ("bf16", 4, "groups"): (
        (128, 2, 2, 614), (128, 1, 2, 543), (64, 2, 2, 429), (64, 1, 2, 368), (64, 1, 1, 381),
        (32, 2, 2, 237), (32, 1, 1, 208),
    ),
    ("bf16", 4, "channel"): (
        (256, 1, 2, 730), (128, 2, 2, 650), (128, 1, 2, 560), (64, 2, 2, 440), (64, 1, 1, 380),
        (32, 2, 2, 260), (32, 1, 1, 200),
    ),
    ("bf16", 8, "channel"): (
        (256, 1, 2, 861), (128, 2, 2, 664), (128, 1, 2, 612), (64, 2, 2, 419), (64, 1, 1, 419),
        (32, 2, 2, 286), (32, 1, 1, 242),
    ),
    ("s8", 4, "groups"): (
        (128, 2, 2, 877), (128, 1, 2, 784), (64, 2, 2, 618), (64, 1, 2, 496), (64, 1, 1, 460),
        (32, 2, 2, 377), (32, 1, 1, 271),
    ),
    ("s8", 4, "channel"): (
        (256, 1, 2, 1397), (128, 2, 2, 1282), (128, 1, 2, 1105), (64, 2, 2, 887), (64, 1, 1, 741),
        (32, 2, 2, 490), (32, 1, 1, 461),
    ),
    ("s8", 8, "channel"): (
        (256, 1, 2, 1424), (128, 2, 2, 1334), (128, 1, 2, 1395), (128, 1, 1, 1125),
        (64, 2, 2, 1088), (64, 1, 2, 1088), (64, 1, 1, 941), (32, 2, 2, 636), (32, 1, 1, 641),
    ),
}  # fmt: skip
_HOPPER_TILES["bf16", 8, "groups"] = _HOPPER_TILES["bf16", 4, "groups"]
_H200_SMS, _H200_BYTES_PER_US = 132, 4.2e6
_LAUNCH_US = 0.8  # until the first product and after the last
_SHARED_US = 6.6  # until a block has the sums of another
_EXCHANGED_PER_US = 15000  # sums that a block reads from others
_ALONE = 0.64  # of its rate a block reaches that has no other one on its SM to hide latencies


def _hopper_time(c: Hopper, rate: float, device: Device, shape: Shape) -> float:
    """Microseconds by the measured rates: what candidates are compared by, no promise."""
    tiles = c.tiles(shape.m, shape.n)
    places = device.sm_count * c.blocks_per_sm
    k_tiles = math.ceil(shape.k / HOPPER_BLOCK_K)
    rounds = tiles / places if c.stream_k else math.ceil(tiles / places)
    blocks = c.grid(shape.m, shape.n, shape.k, device.sm_count)[0]
    speed = 2 * _ALONE if c.blocks_per_sm == 2 and blocks <= device.sm_count else 1.0
    work = 2 * c.block_m * c.block_n * HOPPER_BLOCK_K * k_tiles * c.blocks_per_sm
    compute = rounds * work / (rate * 1e6 / _H200_SMS * speed)
    memory = shape.n * shape.k * BITS[c.w_kind] / 8 / _H200_BYTES_PER_US
    parts = max(1.0, places / tiles) if c.stream_k else 0.0
    exchange = _SHARED_US * c.stream_k + parts * c.block_m * c.block_n / _EXCHANGED_PER_US
    busy, idle = max(compute, memory), min(compute, memory)
    return _LAUNCH_US + exchange + busy + idle / 4


def hopper_candidates(device: Device, shape: Shape) -> Iterator[tuple[Hopper, float]]:
    """The tiles that fit a problem, with as deep a ring as fits, and their predicted times."""
    whole = shape.group_size >= shape.k and not shape.has_zeros
    kind = "s8" if shape.x_kind == "s8" else "bf16"
    tiles = _HOPPER_TILES[kind, BITS[shape.w_kind], "channel" if whole else "groups"]
    groups_per_tile = max(1, HOPPER_BLOCK_K // min(shape.group_size, HOPPER_BLOCK_K))
    if shape.group_size >= shape.k:
        groups_per_tile = 1
    several = Grouping.SPAN if groups_per_tile > 1 else Grouping.TILE
    for block_m, tiles_n, consumers, rate in tiles:
        for stream_k in (False, True):
            extra = stream_k + shape.has_zeros + (groups_per_tile > 1)
            crowded = 0 if whole else block_m * tiles_n + 32 * extra
            if crowded > (160 if stream_k or shape.has_zeros else 256):
                continue  # registers would spill
            c = Hopper(
                x_kind=shape.x_kind,
                w_kind=shape.w_kind,
                scale_type=shape.scale_type,
                zero_type=shape.zero_type,
                out_type=shape.out_type,
                block_m=block_m,
                tiles_n=tiles_n,
                consumers=consumers,
                num_stages=1,
                stream_k=stream_k,
                raster=8,
                grouping=Grouping.CHANNEL if whole else several,
                groups_per_tile=groups_per_tile,
                has_zeros=shape.has_zeros,
            )
            # two blocks on an SM, each with 1 KiB of the system's
            room = (device.smem_per_block - 1024 * (c.blocks_per_sm - 1)) // c.blocks_per_sm
            rest = c.smem_bytes - c.stage_bytes
            c = replace(c, num_stages=min(8, (room - rest) // c.stage_bytes))
            if c.num_stages >= 2:
                yield c, _hopper_time(c, rate, device, shape)


def _pick_hopper(device: Device, shape: Shape) -> Hopper:
    """The tile with the least predicted time."""
    return min(hopper_candidates(device, shape), key=lambda candidate: candidate[1])[0]


SKINNY_MAX_M = 16


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
    whole_chunks = shape.group_size >= shape.k or shape.group_size % chunk_k == 0
    if not whole_chunks and shape.group_size not in (chunk_k // 2, chunk_k // 4):
        return f"group_size={shape.group_size} does not divide chunks of {chunk_k} k"
    return None


def _pick_skinny(device: Device, shape: Shape) -> Skinny | SkinnyRing:
    """Rows by the thousand stream through a ring; else every block loads its rows at once.

    Where decoding costs nothing, loading at once is as fast (W8A8, W4A8, W8A16 on an H200).
    """
    w4a16 = BITS[shape.w_kind] == 4 and BITS[shape.x_kind] == 16
    if w4a16 and shape.n >= 128 * device.sm_count:
        ring = _pick_ring(device, shape)
        if ring is not None:
            return ring
    return _pick_direct(device, shape)


def _pick_direct(device: Device, shape: Shape) -> Skinny:
    """Warps by how many blocks there are: few blocks need many loads in flight.

    Measured on an H200 over rows x warps x unroll x blocks (docs/notes/kernels.md); what the best
    of each shape needs more registers for than there are is left out.
    """
    chunk_k = 512 // BITS[shape.w_kind]
    chunks = math.ceil(shape.k / chunk_k)
    groups_per_chunk = max(1, chunk_k // shape.group_size) if shape.group_size < shape.k else 1
    # Where one token tile of codes without zero points does with 128 registers, others take twice.
    crowded = shape.has_zeros or groups_per_chunk > 1
    tiles_n, warps, unroll, blocks_per_sm = _direct_tile(device, shape, chunks, crowded)
    return Skinny(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        tiles_m=math.ceil(shape.m / 8),
        tiles_n=tiles_n,
        warps=warps,
        unroll=unroll,
        blocks_per_sm=blocks_per_sm,
        groups_per_chunk=groups_per_chunk,
        chunks_per_group=max(1, min(shape.group_size, shape.k) // chunk_k),
        grouping=Grouping.CHANNEL if shape.group_size >= shape.k else Grouping.SPAN,
        has_zeros=shape.has_zeros,
        whole=shape.k % (chunk_k * warps * unroll) == 0,
    )


def _direct_tile(
    device: Device, shape: Shape, chunks: int, crowded: bool
) -> tuple[int, int, int, int]:
    """(tiles_n, warps, unroll, blocks_per_sm) of skinny.cu."""
    blocks, sms = math.ceil(shape.n / 32), device.sm_count
    masked = 1 if crowded and shape.m > 8 else 2  # rows by 16: fragments of masked groups
    if crowded:
        warps = max(1, min(8, chunks))
        return (1 if 2 * blocks <= sms else masked), warps, 1, min(4, 8 // warps)
    few_tokens = shape.m <= 8
    if chunks <= 16 and 2 * blocks <= sms:  # a small layer: each warp one chunk
        return 1, max(1, chunks), 1, 1
    if blocks <= sms:
        if few_tokens and chunks <= 64:
            tile = 2, 8, 4, 1
        elif few_tokens:
            tile = 1, 16, 1, 2
        elif device.arch.startswith("sm_90") and chunks <= 64:
            tile = 2, 8, 4, 1
        else:
            tile = 2, 16, 1, 1
    elif blocks <= 2 * sms:
        if few_tokens and chunks <= 64:
            tile = 1, 8, 1, 4
        else:
            tile = 2, 8, 2 if few_tokens else 1, 2
    else:
        warps = 8 if chunks > 32 else 4
        tile = 2, warps, 2, (16 if few_tokens else 8) // warps
    tiles_n, warps, unroll, blocks_per_sm = tile
    while warps > 1 and warps * unroll > chunks:
        warps, unroll = (warps, unroll // 2) if unroll > 1 else (warps // 2, 1)
    return tiles_n, warps, unroll, blocks_per_sm


def _pick_ring(device: Device, shape: Shape) -> SkinnyRing | None:
    """The first choice that fits shared memory, in the order in which they were measured."""
    chunk_k = 512 // BITS[shape.w_kind]
    chunks = max(1, math.ceil(shape.k / chunk_k))
    tokens = 1 << (shape.m - 1).bit_length()
    groups_per_chunk = max(1, chunk_k // shape.group_size) if shape.group_size < shape.k else 1
    heavy = shape.m > 8 or shape.has_zeros or groups_per_chunk > 1  # registers for 8 warps only
    # warps of a group share a row's chunks evenly
    group_warps = min((4, 3, 2), key=lambda g: math.ceil(chunks / g) * g) if chunks > 1 else 1
    for warps, num_stages, blocks_per_sm in (
        *([] if heavy or tokens > 4 else [(8, 3, 2)]),
        *([] if heavy else [(16, 3, 1), (12, 3, 1)]),
        (8, 4, 1),
        (8, 3, 1),
        (4, 3, 1),
    ):
        groups = min(8, max(1, warps // group_warps))
        config = SkinnyRing(
            x_kind=shape.x_kind,
            w_kind=shape.w_kind,
            scale_type=shape.scale_type,
            zero_type=shape.zero_type,
            out_type=shape.out_type,
            tokens=tokens,
            tiles_n=2,
            warps=groups * group_warps,
            groups=groups,
            num_stages=num_stages,
            blocks_per_sm=blocks_per_sm,
            resident_blocks=device.sm_count * blocks_per_sm,
            segment_k=chunks * chunk_k,
            fixed_smem=0,
            groups_per_chunk=groups_per_chunk,
            chunks_per_group=max(1, min(shape.group_size, shape.k) // chunk_k),
            grouping=Grouping.CHANNEL if shape.group_size >= shape.k else Grouping.SPAN,
            has_zeros=shape.has_zeros,
            whole=shape.k % chunk_k == 0,
        )
        room = min(device.smem_per_block, device.smem_per_sm // blocks_per_sm - 1024)
        # all of x at once, or for the last choices in segments
        segments = range(1, 9) if warps <= 8 and blocks_per_sm == 1 else (1,)
        for count in segments:
            rounds = math.ceil(chunks / (count * group_warps))
            config = replace(config, segment_k=min(rounds * group_warps, chunks) * chunk_k)
            config = replace(config, fixed_smem=_ring_smem(config))
            if config.smem_of(shape.n, shape.k) <= room:
                return config
    return None


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
    return None


@dataclass(frozen=True)
class Shape:
    """What `pick` may know of a problem: kinds, types and sizes."""

    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    has_zeros: bool
    has_a_zero: bool
    aligned: bool
    m: int
    n: int
    k: int
    group_size: int
    apart: bool = True  # no two rows share memory


def grouping_of(k: int, group_size: int, block_k: int) -> Grouping:
    if group_size >= k:
        return Grouping.CHANNEL
    if group_size == block_k:
        return Grouping.TILE
    return Grouping.STRADDLING if group_size % SPAN_K else Grouping.SPAN


@lru_cache(maxsize=65536)
def pick(device: Device, shape: Shape) -> Gemm | Skinny | SkinnyRing | Hopper:
    """The configuration for a problem: the kernel family by M and device, its tile by shape."""
    if why_not_skinny(shape) is None:
        return _pick_skinny(device, shape)
    if why_not_hopper(device, shape) is None:
        return _pick_hopper(device, shape)
    return _pick_gemm(device, shape)


def reason(device: Device, shape: Shape) -> str:
    """Why `pick` chose the kernel family it chose."""
    not_skinny = why_not_skinny(shape)
    if not_skinny is None:
        return f"M={shape.m} is bound by reading W once"
    not_hopper = why_not_hopper(device, shape)
    return not_skinny if not_hopper is None else f"{not_skinny}; {not_hopper}"


def _pick_gemm(device: Device, shape: Shape) -> Gemm:
    """Warp tiles by what the accumulators leave of the registers, split_k by SM count.

    Measured on an H200 (docs/notes/kernels.md): warps of 64 tokens by 64 rows with one set of
    accumulators, by 32 rows with a second one for groups; four warps a block, two blocks an SM.
    """
    channel, floats = shape.group_size >= shape.k, BITS[shape.x_kind] == 16
    block_k = 64 if shape.group_size == 64 and not channel else 128
    grouping = grouping_of(shape.k, shape.group_size, block_k)
    # NVRTC 12.9 needs more registers for these, so tiles that take them all elsewhere spill.
    crowded = device.arch in ("sm_100", "sm_120") and floats
    large_tiles = math.ceil(shape.m / 128) * math.ceil(shape.n / 128)
    large = shape.m >= 192 and large_tiles > 1.5 * device.sm_count
    block_m = min(64, max(8, 1 << (max(shape.m, 1) - 1).bit_length()))
    block_n, warps_m, warps_n = 128, 1, 4
    if channel and large and not shape.has_zeros and not (crowded and shape.w_kind == "s8"):
        block_m, warps_m, warps_n = 128, 2, 2
        if floats:
            block_n, warps_n, block_k = 256, 4, 64  # half the k: 16-bit tokens fill shared memory
    elif (
        grouping is Grouping.STRADDLING
        or (shape.has_zeros and (crowded or grouping is Grouping.SPAN))
        or (crowded and not channel and shape.w_kind == "s8")
    ):
        block_n = 64  # masked fragments, or sums of x, beside two sets of accumulators
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
        grouping=grouping,
        has_zeros=shape.has_zeros,
        has_a_zero=shape.has_a_zero,
        aligned=shape.aligned and whole,
    )
    # Three stages, which leave more cache than four for the scales; two where that lets a second
    # block of four warps share the SM.
    blocks = 2 if config.threads <= 128 else 1
    room = min(device.smem_per_sm // blocks - 1024, device.smem_per_block)
    if config.smem_bytes > room:
        fewer = replace(config, num_stages=2)
        if fewer.smem_bytes <= room or config.smem_bytes > device.smem_per_block:
            config = fewer
    if problem := why_illegal(config, device):
        raise ValueError(f"no configuration for {shape} on {device.arch}: {problem}")
    tiles = config.tiles(shape.m, shape.n)
    k_tiles = math.ceil(shape.k / config.block_k)
    # Two blocks for each SM, in stripes of at least four tiles of K; powers of two: few kernels.
    wanted = min(blocks * device.sm_count // max(tiles, 1), k_tiles // 4, 4)
    return replace(config, split_k=1 << max(wanted, 1).bit_length() - 1)


@dataclass(frozen=True)
class Quantize:
    """quantize.cu: threads_per_segment threads hold a segment in `chunks` vectors each."""

    source: ClassVar[str] = "quantize.cu"
    entry: ClassVar[str] = "quantize"

    x_type: str
    bits: int
    symmetric: bool
    stochastic: bool
    vector: int
    threads_per_segment: int
    threads: int
    chunks: int
    before: int  # Before

    def __str__(self) -> str:
        name = "" if self.before == Before.NONE else f"{Before(self.before).name.lower()} "
        return (
            f"{name}quantize int{self.bits} {self.threads_per_segment}x{self.vector}x{self.chunks}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


class Before(IntEnum):
    """What quantize.cu computes from x before it quantises."""

    NONE = 0
    RMS_NORM = 1
    SILU_MUL = 2


_MAX_CHUNKS = 8


@lru_cache(maxsize=4096)
def pick_quantize(
    x_type: str,
    bits: int,
    symmetric: bool,
    stochastic: bool,
    vector: int,
    length: int,
    before: Before = Before.NONE,
) -> Quantize:
    """Enough threads to keep a segment in registers with few loads each; 0 chunks reads twice."""
    vectors = max(1, math.ceil(length / vector))
    per_segment = min(max(32, 1 << (math.ceil(vectors / 2) - 1).bit_length()), 1024)
    chunks = math.ceil(vectors / per_segment)
    return Quantize(
        x_type=x_type,
        bits=bits,
        symmetric=symmetric,
        stochastic=stochastic,
        vector=vector,
        threads_per_segment=per_segment,
        threads=max(per_segment, 256),
        chunks=chunks if chunks <= _MAX_CHUNKS else 0,
        before=before,
    )


@dataclass(frozen=True)
class Fp4:
    """fp4.cu: one block computes 16 * tiles_n rows of W for 8 * tiles_m tokens."""

    source: ClassVar[str] = "fp4.cu"
    entry: ClassVar[str] = "fp4"

    x_kind: str  # e2m1, bf16, fp16
    scale_kind: str  # e8m0, e4m3
    out_type: str
    tiles_m: int
    tiles_n: int
    warps: int
    unroll: int
    blocks_per_sm: int
    blocked: bool  # scales in the order of fp4.to_blocked
    scale_words_aligned: bool  # rows of scales start at multiples of four bytes

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return math.ceil(n / (16 * self.tiles_n)), math.ceil(m / (8 * self.tiles_m)), 1

    def __str__(self) -> str:
        return (
            f"fp4 {self.x_kind}x{self.scale_kind} {8 * self.tiles_m}x{16 * self.tiles_n} "
            f"warps={self.warps} unroll={self.unroll}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return _mma_sass("s8" if self.x_kind == "e2m1" else self.x_kind, arch)


FP4_X = ("e2m1", "bf16", "fp16")
# Above so many tokens, decoding both operands to bf16 once and a dense product are faster (H200).
FP4_MAX_M = 64


@lru_cache(maxsize=4096)
def pick_fp4(
    device: Device,
    x_kind: str,
    scale_kind: str,
    out_type: str,
    blocked: bool,
    scale_words_aligned: bool,
    m: int,
    n: int,
    k: int,
) -> Fp4:
    """As `_pick_skinny`: warps that share out K, fewer rows a block where that leaves SMs idle."""
    tiles_m = 1 if m <= 8 else 2
    blocks = math.ceil(n / 32) * math.ceil(m / (8 * tiles_m))
    chunks = math.ceil(k / 128)
    warps = 8
    while warps > 1 and warps > chunks:
        warps //= 2
    unroll = 2 if tiles_m == 1 and x_kind == "e2m1" and chunks >= 2 * warps else 1
    return Fp4(
        x_kind=x_kind,
        scale_kind=scale_kind,
        out_type=out_type,
        tiles_m=tiles_m,
        tiles_n=1 if 2 * blocks <= device.sm_count else 2,
        warps=warps,
        unroll=unroll,
        blocks_per_sm=1,
        blocked=blocked,
        scale_words_aligned=scale_words_aligned or blocked,
    )


# Activation and weight kinds that have a kernel.
PAIRS = (
    *((x, w) for x in ("bf16", "fp16") for w in ("s4", "u4", "s8")),
    *(("s8", w) for w in ("s4", "u4", "s8")),
    *((x, w) for x in ("s4", "u4") for w in ("s4", "u4")),
)


Config = Gemm | Skinny | SkinnyRing | Hopper | TokenSums | Quantize | Fp4


def without_wgmma(device: Device) -> Device:
    """The same GPU, on which `pick` takes the portable kernels."""
    return replace(device, arch="sm_90") if device.arch == "sm_90a" else device


def _shipped_hopper(
    types: tuple[str, ...], zero_types: tuple[str, ...]
) -> Iterator[tuple[Hopper | TokenSums, tuple[str, ...]]]:
    turn = 0
    for x, w in PAIRS:
        for group_size in (4096, 128, 32 + 32 * (turn % 2)):
            for m in ((32, 128, 4096), (64, 512))[turn % 2]:
                turn += 1
                shape = Shape(
                    x_kind=x,
                    w_kind=w,
                    scale_type=types[turn % 3],
                    zero_type=zero_types[turn % 5] if w == "u4" else "float",
                    out_type=types[turn // 2 % 3],
                    has_zeros=w == "u4",
                    has_a_zero=False,
                    aligned=True,
                    m=m,
                    n=(4096, 28672)[turn % 2],
                    k=4096,
                    group_size=group_size,
                )
                if why_not_hopper(device_of("sm_90a"), shape) is None:
                    yield _pick_hopper(device_of("sm_90a"), shape), ("sm_90a",)
        if x in ("bf16", "fp16", "s8") and w == "u4":
            for span in (128, 64, 32):
                yield TokenSums(x, span), ("sm_90a",)


def shipped_configs() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """A covering set of what the picks can return, each with the architectures it is built for.

    Every pair of kinds meets every block shape and every grouping; groups, scale, zero and output
    types, which change little code, rotate through the combinations rather than multiply them.
    """
    types = ("__nv_bfloat16", "float", "__half")
    zero_types = (*types, "unsigned char", "int")
    turn = 0
    for x, w in PAIRS:
        # From M = 64 on groups share a block shape; one scale a row has another for many tiles.
        cases = [(1, (4096, 128, 64, 32)[turn % 4]), (16, (128, 64, 32, 4096)[turn % 4])]
        cases += [(64, (128, 64, 256)[turn % 3]), (64, 16), (4096, 4096)]
        for m, group_size in cases:
            turn += 1
            shape = Shape(
                x_kind=x,
                w_kind=w,
                scale_type=types[turn % 3],
                zero_type=zero_types[turn % 5] if w == "u4" else "float",
                out_type=types[turn // 2 % 3],
                has_zeros=w == "u4",
                has_a_zero=x == "u4" or (x == "s8" and (group_size == 16 or m * (w == "s4") > 64)),
                aligned=turn % 7 != 0,
                m=m,
                n=4096,
                k=4096,
                group_size=group_size,
            )
            for arch in ARCHS:
                yield pick(without_wgmma(device_of(arch)), shape), (arch,)
                if m <= SKINNY_MAX_M and BITS[x] == 16 and BITS[w] == 4:
                    many_rows = replace(shape, n=32768, aligned=True)
                    yield pick(without_wgmma(device_of(arch)), many_rows), (arch,)
    yield from _shipped_hopper(types, zero_types)
    for turn, (bits, symmetric) in enumerate(((8, True), (4, False), (8, False), (4, True))):
        for x_type, (vector, length) in zip(types, ((8, 4096), (2, 5), (8, 100_000)), strict=True):
            yield pick_quantize(x_type, bits, symmetric, turn > 1, vector, length), ARCHS
            if turn < 2 and vector == 8:
                for before in (Before.RMS_NORM, Before.SILU_MUL):
                    c = pick_quantize(x_type, bits, symmetric, False, vector, length, before)
                    yield c, ARCHS
    for turn, (x, scale_kind) in enumerate(itertools.product(FP4_X, ("e8m0", "e4m3"))):
        for m, blocked, aligned in ((1, turn % 2 == 0, True), (16, turn % 2 == 1, turn != 2)):
            for arch in ARCHS:
                sizes = m, 4096, 4096
                yield (
                    pick_fp4(
                        device_of(arch), x, scale_kind, types[turn % 3], blocked, aligned, *sizes
                    ),
                    (arch,),
                )
