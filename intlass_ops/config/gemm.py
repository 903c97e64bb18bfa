"""gemm.cu, the portable tensor-core kernel for any problem: what a configuration is, and legal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .epilogue import Activation, named
from .problem import BITS, SPAN_K, Device, Grouping, mma_sass, scales_are_split


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
    experts: bool = False  # tokens by expert, each with a weight of its own (experts.py)

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def smem_bytes(self) -> int:
        """The ring, the epilogue's vectors of tokens and rows, and what GroupTable holds."""
        bits = self.block_m * BITS[self.x_kind] + self.block_n * BITS[self.w_kind]
        entry = (4 if scales_are_split(self) else 2) * (1 + self.has_zeros)
        of_span = 2 if self.scale_type == "e4m3" else 1
        spans = of_span * self.block_k // SPAN_K
        groups = {Grouping.SCALED_WEIGHTS: 1, Grouping.SCALED_SPANS: spans}
        table = 2 * entry * self.block_n * groups.get(Grouping(self.grouping), 0)
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
