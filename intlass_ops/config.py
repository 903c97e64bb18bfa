"""Which kernel configurations exist, which are legal, and which one a problem gets.

The single statement of every kernel constraint. Pure: no CUDA, no torch calls; what the hardware
offers arrives as a `Device`. The kernels state the same facts as static_asserts.
"""

from __future__ import annotations

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
    TILE = 1  # groups of whole block_k
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
        """The ring, and in its place the epilogue's tile with the vectors of its rows."""
        bits = self.block_m * BITS[self.x_kind] + self.block_n * BITS[self.w_kind]
        ring = self.num_stages * bits * self.block_k // 8
        out = TYPE_BYTES[self.out_type]
        vectors = 4 * (2 * self.block_m + self.block_n)
        return max(ring, vectors + self.block_m * (self.block_n + 16 // out) * out)

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
        return _mma_sass(self.x_kind, arch)


def _mma_sass(x_kind: str, arch: str) -> tuple[str, ...]:
    if x_kind in ("bf16", "fp16"):
        return (r"HMMA\.16816\.F32" + (r"\.BF16" if x_kind == "bf16" else r"\b"),)
    native = x_kind in ("s4", "u4") and arch in ("sm_80", "sm_86", "sm_89")
    return (r"IMMA\.16832\.S4\.S4" if native else r"IMMA\.16832\.S8\.S8",)


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
    multicast: int  # blocks of a cluster that share their tokens
    split_k: int  # blocks of a cluster that share their tile
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
        """Barriers and the ring, then staging for the output; or the exchange of split sums."""
        ring = self.num_stages * self.stage_bytes
        slab = math.gcd(64, self.block_m)
        staging = self.consumers * (slab * (64 * TYPE_BYTES[self.out_type] + 16) + 4 * self.block_m)
        exchange = self.block_m * (self.block_n + 4) * 4
        return 1024 + (max(ring, exchange) if self.split_k > 1 else ring + staging)

    @property
    def wgmma(self) -> tuple[str, int]:
        """Kind of the operands and tokens of its wgmma instructions."""
        return self.x_kind, self.block_m

    def tiles(self, m: int, n: int) -> int:
        """Tiles that a cluster takes one after another."""
        return math.ceil(m / self.block_m) * math.ceil(n / (self.block_n * self.multicast))

    def grid(self, m: int, n: int, sm_count: int) -> tuple[int, int, int]:
        """A block for every place on the GPU; with split_k, a cluster for every tile."""
        cluster, tiles = self.multicast * self.split_k, self.tiles(m, n)
        places = sm_count * self.blocks_per_sm // cluster
        return (tiles if self.split_k > 1 else min(tiles, places)) * cluster, 1, 1

    def __str__(self) -> str:
        extra = f" split_k={self.split_k}" if self.split_k > 1 else ""
        extra += f" multicast={self.multicast}" if self.multicast > 1 else ""
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
    if shape.has_a_zero:
        return "activations with a zero point need row sums of W"
    if not shape.aligned:
        return "rows do not start on 16-byte boundaries"
    if shape.x_kind in ("s4", "u4"):
        return "no INT4 activations"
    whole = shape.group_size >= shape.k
    if shape.x_kind == "s8" and shape.w_kind == "s8" and not whole:
        return "INT8 weights under INT8 activations have one scale a row"
    if not whole and shape.group_size % HOPPER_BLOCK_K and shape.group_size not in (32, 64):
        return f"group_size={shape.group_size} is neither 32, 64 nor a multiple of {HOPPER_BLOCK_K}"
    return None


# Tiles of hopper.cu: block_m, tiles_n, consumers, and the TOPS that an H200 reaches with them when
# all SMs are busy, by activations and weights (measured at K = 4096, docs/notes/kernels.md).
_HOPPER_TILES = {
    ("bf16", 4, "groups"): (
        (128, 2, 2, 570), (128, 1, 2, 525), (64, 2, 2, 430), (64, 1, 2, 385), (64, 1, 1, 370),
        (32, 2, 2, 250), (32, 1, 1, 190),
    ),
    ("bf16", 4, "channel"): (
        (256, 1, 2, 730), (128, 2, 2, 650), (128, 1, 2, 560), (64, 2, 2, 440), (64, 1, 1, 380),
        (32, 2, 2, 260), (32, 1, 1, 200),
    ),
    ("s8", 4, "groups"): (
        (128, 2, 2, 790), (128, 1, 2, 720), (64, 2, 2, 620), (64, 1, 2, 540), (64, 1, 1, 470),
        (32, 2, 2, 330), (32, 1, 1, 250),
    ),
    ("s8", 4, "channel"): (
        (256, 1, 2, 1400), (128, 2, 2, 1230), (128, 1, 2, 1080), (64, 2, 2, 850), (64, 1, 1, 630),
        (32, 2, 2, 450), (32, 1, 1, 330),
    ),
    ("s8", 8, "channel"): (
        (256, 1, 2, 1400), (128, 2, 2, 1340), (128, 1, 2, 1150), (128, 1, 1, 960),
        (64, 2, 2, 830), (64, 1, 2, 740), (64, 1, 1, 620), (32, 2, 2, 430), (32, 1, 1, 330),
    ),
}  # fmt: skip
_HOPPER_TILES["bf16", 8, "channel"] = _HOPPER_TILES["bf16", 4, "channel"]
_HOPPER_TILES["bf16", 8, "groups"] = _HOPPER_TILES["bf16", 4, "groups"]
_H200_SMS, _H200_BYTES_PER_US = 132, 4.2e6
_LAUNCH_US = 3.5  # until the first product and after the last
_SPLIT_US = {1: 0.0, 2: 1.0}  # of a cluster; those of four find too few places, and always lose
_EXCHANGED_PER_US = 8192  # sums that a block leaves to its cluster


def _hopper_time(c: Hopper, rate: float, device: Device, shape: Shape) -> float:
    """Microseconds by the measured rates: what candidates are compared by, no promise."""
    blocks = c.tiles(shape.m, shape.n) * c.split_k
    per_sm = math.ceil(blocks / device.sm_count)
    alone = 0.65 if c.blocks_per_sm == 2 and per_sm == 1 else 1.0  # nobody hides its latencies
    if 2 * blocks <= device.sm_count * c.blocks_per_sm:
        alone *= 1.3  # nor competes for L2
    k_tiles = math.ceil(math.ceil(shape.k / HOPPER_BLOCK_K) / c.split_k)
    work = 2 * c.block_m * c.block_n * HOPPER_BLOCK_K * k_tiles  # of a block
    compute = per_sm * work / (rate * 1e6 / _H200_SMS * alone)
    memory = shape.n * shape.k * BITS[c.w_kind] / 8 / _H200_BYTES_PER_US
    exchange = (c.split_k > 1) * c.block_m * c.block_n / _EXCHANGED_PER_US
    busy, idle = max(compute, memory), min(compute, memory)
    return _LAUNCH_US + _SPLIT_US[c.split_k] + exchange + busy + idle / 8


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
        if shape.has_zeros and block_m * tiles_n > 128:
            continue  # the zero points' registers would spill
        for split_k in _SPLIT_US:
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
                multicast=1,
                split_k=split_k,
                raster=8,
                grouping=Grouping.CHANNEL if whole else several,
                groups_per_tile=groups_per_tile,
                has_zeros=shape.has_zeros,
            )
            crowded = c.tiles(shape.m, shape.n) * split_k > device.sm_count * c.blocks_per_sm
            if split_k > 1 and (crowded or shape.k < 4 * split_k * HOPPER_BLOCK_K):
                break
            # two blocks on an SM, each with 1 KiB of the system's
            room = (device.smem_per_block - 1024 * (c.blocks_per_sm - 1)) // c.blocks_per_sm
            rest = c.smem_bytes - c.stage_bytes if split_k == 1 else 1024
            c = replace(c, num_stages=min(8, (room - rest) // c.stage_bytes))
            if c.num_stages >= 2 and c.smem_bytes <= room:
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


def _pick_skinny(device: Device, shape: Shape) -> Skinny:
    """32 rows a block; warps by how many blocks there are: few blocks need many loads in flight.

    Measured on an H200 over warps x unroll x rows (docs/notes/kernels.md): the best of each shape
    holds 16 warps of 128 registers on an SM, as one, two or four blocks.
    """
    chunk_k = 512 // BITS[shape.w_kind]
    chunks = math.ceil(shape.k / chunk_k)
    blocks = math.ceil(shape.n / 32)
    warps = 16 if blocks <= device.sm_count else 8 if chunks > 32 or blocks < 512 else 4
    # Zero points and the second half of a chunk's groups need registers that a second chunk holds.
    groups_per_chunk = max(1, chunk_k // shape.group_size) if shape.group_size < shape.k else 1
    unroll = 1 if shape.has_zeros or groups_per_chunk > 1 else 2
    # Where one token tile of codes without zero points does with 128 registers, others take twice.
    crowded = shape.m > 8 or unroll == 1
    warps_per_sm = 8 if crowded else 16
    warps = min(warps, warps_per_sm)
    while warps > 1 and warps * unroll > chunks:
        warps //= 2
    return Skinny(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        tiles_m=math.ceil(shape.m / 8),
        # 16 rows where 32 leave SMs idle, or where masked fragments of 16 tokens need the registers
        tiles_n=1 if 2 * blocks <= device.sm_count or (groups_per_chunk > 1 and shape.m > 8) else 2,
        warps=warps,
        unroll=unroll,
        blocks_per_sm=min(4, warps_per_sm // warps),
        groups_per_chunk=groups_per_chunk,
        chunks_per_group=max(1, min(shape.group_size, shape.k) // chunk_k),
        grouping=Grouping.CHANNEL if shape.group_size >= shape.k else Grouping.SPAN,
        has_zeros=shape.has_zeros,
        whole=shape.k % (chunk_k * warps * unroll) == 0,
    )


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


def grouping_of(k: int, group_size: int, block_k: int) -> Grouping:
    if group_size >= k:
        return Grouping.CHANNEL
    if group_size % block_k == 0:
        return Grouping.TILE
    return Grouping.STRADDLING if group_size % SPAN_K else Grouping.SPAN


@lru_cache(maxsize=65536)
def pick(device: Device, shape: Shape) -> Gemm | Skinny | Hopper:
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
    """Tile by M, stages by shared memory, split_k by SM count."""
    wide = shape.x_kind == "s8" and shape.w_kind == "s8" and shape.m > 512
    if wide and shape.group_size >= shape.k and not shape.has_a_zero:
        block_m, block_n, warps_m, num_stages = 128, 128, 2, 3
        # The larger warp tile takes all 255 registers, which NVRTC 12.9 exceeds for newer GPUs.
        warps_n = 4 if device.arch in ("sm_100", "sm_120") else 2
    else:
        block_m = min(64, max(8, 1 << (shape.m - 1).bit_length())) if shape.m else 8
        block_n, warps_m, warps_n, num_stages = 128, 1, 4, 4
    grouping = grouping_of(shape.k, shape.group_size, 128)
    if grouping is Grouping.STRADDLING or shape.has_zeros:
        block_n = 64  # masked fragments, or sums of x beside two sets of accumulators
    config = Gemm(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        zero_type=shape.zero_type,
        out_type=shape.out_type,
        block_m=block_m,
        block_n=block_n,
        block_k=128,
        warps_m=warps_m,
        warps_n=warps_n,
        num_stages=num_stages,
        split_k=1,
        grouping=grouping,
        has_zeros=shape.has_zeros,
        has_a_zero=shape.has_a_zero,
        aligned=shape.aligned,
    )
    while why_illegal(config, device) and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    if problem := why_illegal(config, device):
        raise ValueError(f"no configuration for {shape} on {device.arch}: {problem}")
    tiles = config.tiles(shape.m, shape.n)
    k_tiles = math.ceil(shape.k / config.block_k)
    # One block for each SM, in stripes of at least four tiles of K; powers of two: few kernels.
    wanted = min(device.sm_count // max(tiles, 1), k_tiles // 4, 8)
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

    def __str__(self) -> str:
        return f"quantize int{self.bits} {self.threads_per_segment}x{self.vector}x{self.chunks}"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


_MAX_CHUNKS = 8


@lru_cache(maxsize=4096)
def pick_quantize(
    x_type: str, bits: int, symmetric: bool, stochastic: bool, vector: int, length: int
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
    )


# Activation and weight kinds that have a kernel.
PAIRS = (
    *((x, w) for x in ("bf16", "fp16") for w in ("s4", "u4", "s8")),
    *(("s8", w) for w in ("s4", "u4", "s8")),
    *((x, w) for x in ("s4", "u4") for w in ("s4", "u4")),
)


Config = Gemm | Skinny | Hopper | TokenSums | Quantize


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
        # M = 64 and more share a block shape, but for the wide one of INT8.
        cases = [(1, (4096, 128, 64, 32)[turn % 4]), (16, (128, 64, 32, 4096)[turn % 4])]
        cases += [
            (64, 4096),
            (64, 128),
            (64, 16),
            *([(4096, 4096)] if (x, w) == ("s8", "s8") else []),
        ]
        for m, group_size in cases:
            turn += 1
            shape = Shape(
                x_kind=x,
                w_kind=w,
                scale_type=types[turn % 3],
                zero_type=zero_types[turn % 5] if w == "u4" else "float",
                out_type=types[turn // 2 % 3],
                has_zeros=w == "u4",
                has_a_zero=x == "u4" or (x == "s8" and group_size == 16),
                aligned=turn % 7 != 0,
                m=m,
                n=4096,
                k=4096,
                group_size=group_size,
            )
            for arch in ARCHS:
                yield pick(without_wgmma(device_of(arch)), shape), (arch,)
    yield from _shipped_hopper(types, zero_types)
    for turn, (bits, symmetric) in enumerate(((8, True), (4, False), (8, False), (4, True))):
        for x_type, (vector, length) in zip(types, ((8, 4096), (2, 5), (8, 100_000)), strict=True):
            yield pick_quantize(x_type, bits, symmetric, turn > 1, vector, length), ARCHS
