"""hopper.cu and token_sums.cu, TMA and wgmma: their configurations and pick."""

from __future__ import annotations

import itertools
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
    starts_early: ClassVar[bool] = True

    x_kind: str
    w_kind: str
    scale_type: str
    zero_type: str
    out_type: str
    block_m: int
    tiles_n: int
    consumers: int
    in_turns: bool  # a consumer computes all of a tile, while others write out theirs
    num_stages: int
    stream_k: bool  # whether the blocks share out the last tiles by k
    split_k: int  # blocks of a cluster that share a tile
    share_x: int  # blocks of a cluster that load the same tokens, each a part for all
    raster: int
    slab: int  # tokens of the output in shared memory at a time
    grouping: int
    groups_per_tile: int
    has_zeros: bool
    has_a_zero: bool = False
    blocked: bool = False  # FP4: scales in the order of fp4.to_blocked
    x_unit: int = 1  # what decoded activations were divided by

    @property
    def block_n(self) -> int:
        return 64 * self.tiles_n * (1 if self.in_turns else self.consumers)

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def blocks_per_sm(self) -> int:
        return 2 if self.consumers == 1 else 1

    @property
    def stage_bytes(self) -> int:
        bits = self.block_m * BITS[self.x_kind] + self.block_n * BITS[self.w_kind]
        sums = 4 * self.groups_per_tile * self.block_m if self.needs_token_sums else 0
        return math.ceil((bits * HOPPER_BLOCK_K // 8 + sums) / 1024) * 1024

    @property
    def needs_token_sums(self) -> bool:
        """Whether zero points multiply sums of the activations (TokenSums)."""
        return self.has_zeros and self.grouping != Grouping.SCALED_WEIGHTS

    @property
    def smem_bytes(self) -> int:
        """Barriers and the ring; behind it staging for the output, or over it a cluster's sums."""
        if self.split_k > 1:
            exchange = 4 * self.block_m * (self.block_n + 4)
            return 1024 + max(self.num_stages * self.stage_bytes, exchange)
        staging = self.consumers * (
            self.slab * (64 * TYPE_BYTES[self.out_type] + 16) + 4 * self.block_m
        )
        return 1024 + self.num_stages * self.stage_bytes + staging

    @property
    def wgmma(self) -> tuple[str, int]:
        """Kind of the operands and tokens of its wgmma instructions."""
        return self.x_kind, self.block_m

    def tiles(self, m: int, n: int) -> int:
        """Tiles of the output, side by side `share_x` at a time."""
        return math.prod(self._tiles(m, n)) * self.share_x

    def _tiles(self, m: int, n: int) -> tuple[int, int]:
        return math.ceil(m / self.block_m), math.ceil(n / (self.block_n * self.share_x))

    def grid(self, m: int, n: int, k: int, sm_count: int) -> tuple[int, int, int]:
        """A block for every place on the GPU, if there is work for it."""
        if self.split_k > 1:
            return self.tiles(m, n) * self.split_k, 1, 1
        work = self.tiles(m, n) * (math.ceil(k / HOPPER_BLOCK_K) if self.stream_k else 1)
        places = sm_count * self.blocks_per_sm // self.share_x * self.share_x
        return min(places, work), 1, 1

    def shares(self, m: int, n: int, k: int, blocks: int) -> tuple[int, int, int, int, int, int]:
        """hopper.cu's Shares: tiles of m, n, k; tiles taken whole; k tiles of the rest a block."""
        of_m, of_n = self._tiles(m, n)
        k_tiles = math.ceil(k / HOPPER_BLOCK_K)
        shared = of_m * of_n % blocks if self.stream_k else 0
        each, extra = divmod(shared * k_tiles, blocks)
        return of_m, of_n, k_tiles, of_m * of_n - shared, each, extra

    @property
    def values_per_block(self) -> int:
        """Words a block leaves in the workspace of a shared tile."""
        return self.block_m * self.block_n

    def __str__(self) -> str:
        extra = " in_turns" if self.in_turns else ""
        extra += " stream_k" if self.stream_k else ""
        if self.split_k > 1:
            extra = f" split_k={self.split_k}"
        if self.share_x > 1:
            extra += f" share_x={self.share_x}"
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
    if shape.w_kind == "e2m1":
        if shape.x_kind != "bf16":
            return "FP4 activations are decoded before"
        whole_tiles = shape.k % HOPPER_BLOCK_K == 0
        return None if whole_tiles else f"K={shape.k} is not a multiple of {HOPPER_BLOCK_K}"
    whole = shape.group_size >= shape.k
    if shape.x_kind == "s8" and shape.w_kind == "s8" and not whole:
        return "INT8 weights under INT8 activations have one scale a row"
    if not whole and shape.group_size % HOPPER_BLOCK_K and shape.group_size not in (32, 64):
        return f"group_size={shape.group_size} is neither 32, 64 nor a multiple of {HOPPER_BLOCK_K}"
    return None


# Tiles of hopper.cu: block_m, tiles_n, consumers, and the TOPS of an H200 full of them, by kinds
# of activations and weights. These and the times below are a fit to 200 problems, M = 17..4096 on
# five layers, with every tile that comes near the best measured on each: picking by them loses
# 0.8 % to the best tile. FP4: 256 and 128 tokens from four problems, fewer in INT4's proportions.
_HOPPER_TILES = {
    ("bf16", 4, "groups"): (
        (128, 2, 2, 614), (128, 1, 2, 543), (64, 2, 2, 429), (64, 1, 2, 368), (64, 1, 1, 381),
        (32, 2, 2, 237), (32, 1, 1, 208),
    ),
    ("bf16", 4, "channel"): (
        (256, 1, 2, 782), (128, 2, 2, 653), (128, 1, 2, 633), (64, 2, 2, 471), (64, 1, 1, 417),
        (32, 2, 2, 284), (32, 1, 1, 238),
    ),
    ("bf16", 4, "fp4"): (
        (256, 1, 2, 735), (128, 2, 2, 540), (128, 1, 2, 555), (64, 2, 2, 400), (64, 1, 1, 350),
        (32, 2, 2, 240), (32, 1, 1, 200),
    ),
    ("bf16", 8, "channel"): (
        (256, 1, 2, 766), (128, 2, 2, 725), (128, 1, 2, 686), (64, 2, 2, 500), (64, 1, 1, 462),
        (32, 2, 2, 312), (32, 1, 1, 259),
    ),
    ("s8", 4, "groups"): (
        (128, 2, 2, 845), (128, 1, 2, 773), (64, 2, 2, 650), (64, 1, 2, 537), (64, 1, 1, 516),
        (32, 2, 2, 412), (32, 1, 1, 321),
    ),
    ("s8", 4, "channel"): (
        (256, 1, 2, 1428), (128, 2, 2, 1346), (128, 1, 2, 1203), (64, 2, 2, 969), (64, 1, 1, 819),
        (32, 2, 2, 569), (32, 1, 1, 511),
    ),
    ("s8", 8, "channel"): (
        (256, 1, 2, 1509), (128, 2, 2, 1513), (128, 1, 2, 1465), (128, 1, 1, 1108),
        (64, 2, 2, 1264), (64, 1, 2, 1139), (64, 1, 1, 959), (32, 2, 2, 819), (32, 1, 1, 672),
    ),
}  # fmt: skip
_HOPPER_TILES["bf16", 8, "groups"] = _HOPPER_TILES["bf16", 4, "groups"]
# W8A8 by two consumers in turns: block_m, tiles_n and TOPS. From 64 tiles of K on, writing out is
# so little of the work that larger tiles win; weights that become fragments want larger ones too.
_TILES_IN_TURNS = ((192, 2, 1600), (128, 2, 1550), (256, 1, 1480))
_IN_TURNS_MAX_K = 8192
_H200_SMS, _H200_BYTES_PER_US = 132, 4.01e6
_LAUNCH_US = 1.2  # until the first product and after the last
_SHARED_US = 6.1  # until a block has the sums of another, by stream_k
_CLUSTER_US = 2.4  # and of one of its cluster
_EXCHANGED_PER_US = 15200  # sums that a block reads from others
_ALONE = 0.58  # of its rate a block reaches that has no other one on its SM to hide latencies
_NOT_HIDDEN = 0.25  # of the shorter of computing and reading W
_SHARE_X_US, _SHARE_X = 0.4, 0.95  # share_x: until a cluster is there; of a time bound by reading
_STREAMED = 0.12  # stream_k: slower over many rounds, in which tiles share less of what L2 holds


def _hopper_time(c: Hopper, rate: float, device: Device, shape: Shape) -> float:
    """Microseconds by the measured rates: what candidates are compared by, no promise."""
    tiles = c.tiles(shape.m, shape.n)
    places = device.sm_count * c.blocks_per_sm
    k_tiles = math.ceil(shape.k / HOPPER_BLOCK_K)
    rounds = math.ceil(tiles * c.split_k / places) / c.split_k
    exchange = _CLUSTER_US * (c.split_k > 1)
    if c.stream_k:
        rounds = tiles / places
        rounds *= 1 + _STREAMED * max(0.0, 1 - 1 / rounds)
        exchange = _SHARED_US + max(1.0, places / tiles) * c.block_m * c.block_n / _EXCHANGED_PER_US
    blocks = c.grid(shape.m, shape.n, shape.k, device.sm_count)[0]
    speed = 2 * _ALONE if c.blocks_per_sm == 2 and blocks <= device.sm_count else 1.0
    work = 2 * c.block_m * c.block_n * HOPPER_BLOCK_K * k_tiles * c.blocks_per_sm
    compute = rounds * work / (rate * 1e6 / _H200_SMS * speed)
    memory = shape.n * shape.k * BITS[c.w_kind] / 8 / _H200_BYTES_PER_US
    if c.share_x > 1:
        memory *= _SHARE_X if memory > compute else 1.0
        exchange += _SHARE_X_US
    busy, idle = max(compute, memory), min(compute, memory)
    return _LAUNCH_US + exchange + busy + idle * _NOT_HIDDEN


def weights_take_scales(shape: Shape) -> bool:
    """Whether scales of groups multiply the weights, which are rounded to the activations' type.

    So does a dequantised model, and scales of the activations' own type say that this one was. An
    output of 16 bits hides it; one of float32 is summed group by group and rounded once.
    """
    own = {"bf16": "__nv_bfloat16", "fp16": "__half"}.get(shape.x_kind)
    zeros = ("int", "signed char", "unsigned char", *(["__nv_bfloat16"] if own != "__half" else []))
    return shape.w_kind == "e2m1" or (
        shape.group_size < shape.k
        and shape.scale_type == own
        and shape.out_type != "float"
        and (not shape.has_zeros or shape.zero_type in zeros)
    )


def hopper_candidates(device: Device, shape: Shape) -> Iterator[tuple[Hopper, float]]:
    """The tiles that fit a problem, with as deep a ring as fits, and their predicted times."""
    whole = shape.group_size >= shape.k and not shape.has_zeros and shape.w_kind != "e2m1"
    scaled = weights_take_scales(shape)
    kind = "s8" if shape.x_kind == "s8" else "bf16"
    scales = "fp4" if shape.w_kind == "e2m1" else "channel" if whole or scaled else "groups"
    key = kind, BITS[shape.w_kind], scales
    tiles = [(m, n, consumers, False, rate) for m, n, consumers, rate in _HOPPER_TILES[key]]
    ways = [(False, 1, 1), (True, 1, 1), (False, 2, 1)]  # stream_k, split_k, share_x
    if shape.x_kind == "s8" and whole:  # others are not bound by reading
        ways += [(False, 1, 4), (False, 1, 2)]
    if key == ("s8", 8, "channel") and shape.k <= _IN_TURNS_MAX_K:
        tiles += [(m, n, 2, True, rate) for m, n, rate in _TILES_IN_TURNS]
    groups_per_tile = max(1, HOPPER_BLOCK_K // min(shape.group_size, HOPPER_BLOCK_K))
    if shape.group_size >= shape.k or shape.w_kind == "e2m1":
        groups_per_tile = 1
    if whole:
        grouping = Grouping.CHANNEL
    elif scaled:
        grouping = Grouping.SCALED_WEIGHTS
    else:
        grouping = Grouping.SPAN if groups_per_tile > 1 else Grouping.TILE
    for tile, way in itertools.product(tiles, ways):
        block_m, tiles_n, consumers, in_turns, rate = tile
        stream_k, split_k, share_x = way
        if in_turns and split_k > 1:
            continue  # a cluster has one tile
        extra = stream_k + shape.has_zeros + (groups_per_tile > 1)
        if scaled:
            spills = block_m * tiles_n == 256 and shape.has_zeros and groups_per_tile > 2
        else:
            limit = 160 if stream_k or shape.has_zeros else 256
            spills = not whole and block_m * tiles_n + 32 * extra > limit
        if spills:
            continue
        c = Hopper(
            x_kind=shape.x_kind,
            w_kind=shape.w_kind,
            scale_type=shape.scale_type,
            zero_type=shape.zero_type,
            out_type=shape.out_type,
            block_m=block_m,
            tiles_n=tiles_n,
            consumers=consumers,
            in_turns=in_turns,
            num_stages=1,
            stream_k=stream_k,
            split_k=split_k,
            share_x=share_x,
            raster=8,
            slab=math.gcd(64, block_m),
            grouping=grouping,
            groups_per_tile=groups_per_tile,
            has_zeros=shape.has_zeros,
            blocked=shape.blocked,
        )
        places = device.sm_count * c.blocks_per_sm
        if split_k > 1 and c.grid(shape.m, shape.n, shape.k, 0)[0] > places:
            continue
        if in_turns and c.tiles(shape.m, shape.n) <= places:
            continue  # a tile a block: nobody to take turns with
        # two blocks on an SM, each with 1 KiB of the system's
        room = (device.smem_per_block - 1024 * (c.blocks_per_sm - 1)) // c.blocks_per_sm
        rings = (
            replace(c, num_stages=stages, slab=slab)
            for stages in range(8, 1, -1)
            for slab in ((c.slab, 16) if stages == 3 else (c.slab,))  # a third stage is worth it
        )
        fits = next((r for r in rings if r.smem_bytes <= room), None)
        if fits is not None:
            yield fits, _hopper_time(fits, rate, device, shape)


def pick_hopper(device: Device, shape: Shape) -> Hopper:
    """The tile with the least predicted time."""
    return min(hopper_candidates(device, shape), key=lambda candidate: candidate[1])[0]
