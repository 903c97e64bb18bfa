"""hopper.cu and token_sums.cu, TMA and wgmma: their configurations, and what they take.

Not here: which tile a problem gets (hopper_tiles.py), how fast tiles are (hopper_rates.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from .epilogue import Activation, named
from .problem import (
    BITS,
    TYPE_BYTES,
    Device,
    Grouping,
    Shape,
    decoded_fp4,
    lut4_pairs_bytes,
    scales_are_split,
    weights_take_scales,
)

HOPPER_BLOCK_K = 128  # k of a stage, or half or twice as many
PIECE = 3.0  # tiles of 128 k that a helper could compute while it leaves its sums of one
HALF_SM = (227 - 1) * 1024 // 2  # shared memory of each of two blocks; the system takes 1 KiB each


class Shares(NamedTuple):
    """How a problem's tiles are shared out among blocks: hopper_tile.cuh's struct."""

    of_m: int
    of_n: int
    k_tiles: int
    whole: int
    helpers: int
    tail: int
    each: int
    extra: int


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
    block_k: int  # of a stage: HOPPER_BLOCK_K, or half or twice as many
    consumers: int
    in_turns: bool  # a consumer computes all of a tile, while others write out theirs
    by_stages: bool  # the consumers share out a tile by k, one tile a block
    num_stages: int
    rest_by_k: bool  # the last consumer takes a share of the rows that are left over, by k
    stream_k: bool  # whether blocks without a tile in the last round help the others
    split_k: int  # blocks of a cluster that share a tile
    share_x: int  # blocks of a cluster that load the same tokens, each a part for all
    share_w: int  # or the same rows of W
    parts: int  # of the tokens: two accumulators take turns, and are emptied behind one another
    raster: int
    slab: int  # tokens of the output in shared memory at a time
    grouping: int
    groups_per_tile: int
    has_zeros: bool
    has_a_zero: bool = False
    blocked: bool = False  # FP4: scales in the order of fp4.to_blocked
    half_tiles: bool = False  # FP4: K ends in the middle of a tile of it
    lane_order: bool = False  # of each 32 k of X: widen.cu and decode_fp4.cu make it
    x_unit: int = 1  # what decoded activations were divided by
    only_if: int = -1  # what a flag must be, or nothing is done; less than 0: there is none
    activation: Activation = Activation.NONE
    residual: bool = False  # the output's type, added after the activation
    experts: bool = False  # tokens by expert, each with a weight of its own (experts.py)

    @property
    def block_n(self) -> int:
        team = 1 if self.in_turns or self.by_stages else self.consumers - self.rest_by_k
        return 64 * self.tiles_n * team

    @property
    def rest_rows(self) -> int:
        """Rows of the last consumer's tiles, if it has its own."""
        return 64 * self.tiles_n * self.rest_by_k

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def blocks_per_sm(self) -> int:
        smem = self.smem_bytes + self.static_smem
        return 2 if self.consumers == 1 and smem <= HALF_SM else 1

    @property
    def static_smem(self) -> int:
        """Of a table of numbers, which hopper_weights.cuh has up to as many tokens."""
        return lut4_pairs_bytes(self.w_kind) if self.block_m <= 64 else 0

    @property
    def sharing(self) -> int:
        """Blocks of a cluster that load for one another."""
        return self.share_x * self.share_w

    @property
    def cluster(self) -> int:
        """Blocks of a cluster, for one reason or another."""
        return self.sharing * self.split_k

    @property
    def stage_bytes(self) -> int:
        rows = self.block_n + self.rest_rows
        bits = self.block_m * BITS[self.x_kind] + rows * BITS[self.w_kind]
        sums = 4 * self.groups_per_tile * self.block_m if self.needs_token_sums else 0
        scales = self.staged_bytes * self.groups_per_tile * rows
        return math.ceil((bits * self.block_k // 8 + sums + scales) / 1024) * 1024

    @property
    def staged_bytes(self) -> int:
        """Of a row and group in the ring: what weights, or sums, are multiplied by in groups."""
        if self.grouping == Grouping.CHANNEL or self.w_kind == "e2m1":
            return 0
        scaled = self.grouping == Grouping.SCALED_WEIGHTS
        return 8 if self.has_zeros or (scaled and not scales_are_split(self)) else 4

    @property
    def w_rows(self) -> int:
        """Rows of W that are loaded at a time."""
        return self.rest_rows or self.block_n // self.share_w

    def x_rows(self, m: int) -> int:
        """Tokens that are loaded at a time: TMA takes its time for rows that there are none of."""
        if self.share_x * self.parts > 1:  # parts: short of registers
            return self.block_m // self.share_x
        return min(self.block_m, math.ceil(m / 8) * 8)

    @property
    def needs_token_sums(self) -> bool:
        """Whether zero points multiply sums of the activations (TokenSums)."""
        return self.has_zeros and self.grouping != Grouping.SCALED_WEIGHTS

    @property
    def smem_bytes(self) -> int:
        """Barriers, the ring, staging for the output, and what a cluster exchanges of its sums."""
        tokens = self.block_m // self.split_k  # that a block writes
        writers = 1 if self.by_stages else self.consumers
        staging = writers * (self.slab * (64 * TYPE_BYTES[self.out_type] + 16) + 4 * tokens)
        exchange = 4 * tokens * self.block_n * (self.split_k - 1)
        return 1024 + self.num_stages * self.stage_bytes + staging + exchange

    @property
    def wgmma(self) -> tuple[str, int]:
        """Kind of the operands and tokens of its wgmma instructions."""
        return self.x_kind, self.block_m // self.parts

    def tiles(self, m: int, n: int) -> int:
        """Tiles of the output, as many at a time as a cluster shares operands of."""
        return math.prod(self._tiles(m, n)) * self.sharing

    def _tiles(self, m: int, n: int) -> tuple[int, int]:
        rows, columns = self.block_m * self.share_w, self.block_n * self.share_x
        return math.ceil(m / rows), math.ceil(n / columns)

    def grid(self, m: int, n: int, k: int, sm_count: int) -> tuple[int, int, int]:
        """A block for every place on the GPU, if there is work for it."""
        tiles = math.prod(self._tiles(m, n))
        if self.split_k > 1 and not self.stream_k:
            return tiles * self.cluster, 1, 1
        work = tiles * (math.ceil(k / self.block_k) if self.stream_k else 1)
        places = sm_count * self.blocks_per_sm // self.cluster
        if self.clusters_of_tile(m, n, sm_count) > 1:
            places -= places % tiles
        return min(places, work) * self.cluster, 1, 1

    def clusters_of_tile(self, m: int, n: int, sm_count: int) -> int:
        """How many share each tile by stream_k, where there are so few tiles; else 1.

        A helper then has one piece to leave, and a tile as many pieces as any other.
        """
        places = sm_count * self.blocks_per_sm // self.cluster
        return max(1, places // math.prod(self._tiles(m, n))) if self.stream_k else 1

    def whole_and_rest(self, n: int, blocks: int) -> tuple[int, int]:
        """rest_by_k: tiles, as many for each block, and tiles of the last consumers' rows."""
        whole = n // self.block_n // blocks * blocks
        return whole, math.ceil((n - whole * self.block_n) / self.rest_rows)

    def leaves_a_rest(self, m: int, n: int, sm_count: int) -> bool:
        """Whether last consumers have as much to do as the others of one tile, or less."""
        whole, rest = self.whole_and_rest(n, sm_count)
        return m <= self.block_m and whole > 0 and 0 < rest <= sm_count

    def shares(self, m: int, n: int, k: int, blocks: int) -> Shares:
        """Of which the helpers' part is as large as lets all end together."""
        of_m, of_n = self._tiles(m, n)
        k_tiles = math.ceil(k / self.block_k)
        clusters = blocks // self.cluster
        if self.rest_by_k:
            whole, rest = self.whole_and_rest(n, blocks)
            each, extra = divmod(rest * k_tiles, blocks)
            return Shares(1, whole, k_tiles, whole, blocks, k_tiles, each, extra)
        shared = of_m * of_n % clusters if self.stream_k else 0
        helpers = clusters - shared
        of_helper = shared / helpers if helpers else 0.0
        piece = PIECE * HOPPER_BLOCK_K / self.block_k
        cost = piece * (of_helper + 1)  # of what a helper leaves, and of adding it
        tail = max(0, min(k_tiles - 1, int((k_tiles - cost) / (1 + of_helper))))
        if shared == of_m * of_n and helpers % shared == 0:
            tail = k_tiles // (clusters // shared) * (helpers // shared)  # all the same
        if tail == 0:
            shared, helpers = 0, clusters
        each, extra = divmod(shared * tail, helpers)
        return Shares(of_m, of_n, k_tiles, of_m * of_n - shared, helpers, tail, each, extra)

    @property
    def values_per_block(self) -> int:
        """Words a block leaves in the workspace of a shared tile."""
        return self.block_m * (self.rest_rows or self.block_n) // self.split_k

    @property
    def shares_tiles(self) -> bool:
        """Whether blocks leave sums for others in a workspace."""
        return self.stream_k or self.rest_by_k

    def __str__(self) -> str:
        extra = " in_turns" if self.in_turns else ""
        if self.consumers == 4 or self.by_stages:
            extra = f" {'by_stages' if self.by_stages else 'consumers'}={self.consumers}"
        extra += " rest_by_k" if self.rest_by_k else ""
        extra += " stream_k" if self.stream_k else ""
        if self.split_k > 1:
            extra += f" split_k={self.split_k}"
        if self.share_x > 1:
            extra += f" share_x={self.share_x}"
        if self.share_w > 1:
            extra += f" share_w={self.share_w}"
        if self.parts > 1:
            extra += f" parts={self.parts}"
        return (
            f"hopper {self.x_kind}x{self.w_kind} "
            f"{self.block_m}x{self.block_n}x{self.block_k}/{self.num_stages}{extra}{named(self)}"
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
        if shape.x_kind not in ("bf16", decoded_fp4(shape.scale_type)):
            return "FP4 activations are decoded before"
        unit = HOPPER_BLOCK_K if shape.blocked else HOPPER_BLOCK_K // 2
        return None if shape.k % unit == 0 else f"K={shape.k} is not a multiple of {unit}"
    whole = shape.group_size >= shape.k
    if shape.x_kind == "s8" and shape.w_kind == "s8" and not whole:
        return "INT8 weights under INT8 activations have one scale a row"
    sizes = (16, 32, 64) if weights_take_scales(shape) and not shape.has_zeros else (32, 64)
    if not whole and shape.group_size % HOPPER_BLOCK_K and shape.group_size not in sizes:
        *few, last = map(str, sizes)
        return (
            f"group_size={shape.group_size} is neither {', '.join(few)}, {last} nor a multiple of "
            f"{HOPPER_BLOCK_K}"
        )
    return None
