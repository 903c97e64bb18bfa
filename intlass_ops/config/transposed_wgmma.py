"""transposed_wgmma.cu, x @ w for an INT4 weight by TMA and wgmma: its configurations and pick."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from .problem import Device

TRANSPOSED_WGMMA_M = range(9, 1025)  # fewer: transposed.cu; more: dequantising once (H200)
_STAGE_N = 128  # rows of W in a stage of the ring
_COLUMNS = 128  # of a block


@dataclass(frozen=True)
class TransposedWgmma:
    """A block computes 128 columns by block_m tokens."""

    source: ClassVar[str] = "transposed_wgmma.cu"
    entry: ClassVar[str] = "transposed_wgmma"
    starts_early: ClassVar[bool] = True

    x_kind: str  # bf16, fp16
    has_zeros: bool
    block_m: int
    consumers: int  # of a block, which take turns at the rows of W
    split_n: int  # blocks of a cluster that share the rows of W
    groups: int  # that a block's columns lie in
    num_stages: int

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def blocks_per_sm(self) -> int:
        return 2 if self.consumers == 1 else 1

    @property
    def smem_bytes(self) -> int:
        """Barriers and the ring, over which a cluster lays its sums."""
        parameters = 2 * _STAGE_N * self.groups * (1 + self.has_zeros)
        stage = _STAGE_N * (2 * self.block_m + _COLUMNS // 2) + parameters
        parts = self.split_n * self.consumers
        sums = 4 * self.block_m * _COLUMNS * self.consumers if parts > 1 else 0
        return 1024 + max(self.num_stages * math.ceil(stage / 1024) * 1024, sums)

    @property
    def wgmma(self) -> tuple[str, int]:
        """Kind of the operands and tokens of its wgmma instructions."""
        return self.x_kind, self.block_m

    def grid(self, m: int, k: int) -> tuple[int, int, int]:
        return self.split_n * math.ceil(k / _COLUMNS), math.ceil(m / self.block_m), 1

    def __str__(self) -> str:
        split = f" split_n={self.split_n}" if self.split_n > 1 else ""
        return f"transposed_wgmma {self.x_kind} {self.block_m}x{_COLUMNS}x{self.consumers}{split}"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return (r"HGMMA\.64x",)


def why_not_transposed_wgmma(
    device: Device, m: int, n: int, k: int, group_size: int, aligned: bool
) -> str | None:
    """What transposed_wgmma.cu lacks for a problem, None if nothing."""
    if device.arch != "sm_90a":
        return f"{device.arch} has no wgmma"
    if m not in TRANSPOSED_WGMMA_M:
        return f"M={m} is not in {TRANSPOSED_WGMMA_M}"
    if not n * k:
        return "nothing to compute"
    if n % 8 or k % 32 or not aligned:
        return "K is not a multiple of 32 or N of 8, or a row is not aligned"
    if group_size < k and group_size % _COLUMNS and group_size not in (32, 64):
        return f"group_size={group_size} is neither 32, 64 nor a multiple of {_COLUMNS}"
    return None


# Microseconds on an H200: of a stage for a consumer, bound by latency, and of the rest of a block's
# life. They predict most of 50 measured times of three layers within a tenth.
_STAGE_US = {16: 0.76, 32: 0.85, 64: 1.02, 128: 1.42}
_BLOCK_US = 3.3
_PLACES = {3: 0.9, 4: 0.75}  # of the processors' places, clusters of so many find such a part


def _time(device: Device, c: TransposedWgmma, m: int, n: int, k: int) -> float:
    x, y, _ = c.grid(m, k)
    places = device.sm_count * c.blocks_per_sm * _PLACES.get(c.split_n, 1)
    rounds = math.ceil(x * y / places)
    stages = math.ceil(n / (_STAGE_N * c.split_n * c.consumers))
    return rounds * (_BLOCK_US + stages * _STAGE_US[c.block_m])


@lru_cache(maxsize=4096)
def pick_transposed_wgmma(
    device: Device, x_kind: str, has_zeros: bool, m: int, n: int, k: int, group_size: int
) -> TransposedWgmma:
    """The one with the least predicted time, of equals that with the fewest blocks."""
    candidates = (
        TransposedWgmma(
            x_kind=x_kind,
            has_zeros=has_zeros,
            block_m=block_m,
            consumers=consumers,
            split_n=split_n,
            groups=1 if group_size >= k else max(1, _COLUMNS // group_size),
            num_stages=consumers,
        )
        for block_m in _STAGE_US
        if m > block_m // 2
        for split_n in (1, 2, 3, 4)
        for consumers in (2, 1)
    )
    return _with_ring(device, min(candidates, key=lambda c: _time(device, c, m, n, k)))


def _with_ring(device: Device, c: TransposedWgmma) -> TransposedWgmma:
    """As many stages as shared memory holds, at most eight, as many for each consumer."""
    room = (device.smem_per_block - 1024 * (c.blocks_per_sm - 1)) // c.blocks_per_sm
    each = range(8 // c.consumers, 1 // c.consumers, -1)
    rings = (replace(c, num_stages=c.consumers * stages) for stages in each)
    return next(ring for ring in rings if ring.smem_bytes <= room)
