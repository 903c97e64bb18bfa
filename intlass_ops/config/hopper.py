"""hopper.cu and token_sums.cu, TMA and wgmma: their configurations and pick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from .problem import BITS, TYPE_BYTES, Device, Grouping, Shape

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


def pick_hopper(device: Device, shape: Shape) -> Hopper:
    """The tile with the least predicted time."""
    return min(hopper_candidates(device, shape), key=lambda candidate: candidate[1])[0]
