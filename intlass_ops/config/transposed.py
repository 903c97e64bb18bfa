"""transposed.cu, x @ w for an INT4 weight: its configurations and pick."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from .problem import Device, mma_sass

# Above so many tokens, dequantising once and a dense product are faster (H200, before it had
# transposed_wgmma.cu).
TRANSPOSED_MAX_M = 64
_COLUMNS, _STEP_N = 64, 32  # of a block, and rows of W that a warp takes at a time


@dataclass(frozen=True)
class Transposed:
    """transposed.cu: a block computes 64 columns for its tokens."""

    source: ClassVar[str] = "transposed.cu"
    entry: ClassVar[str] = "transposed"
    starts_early: ClassVar[bool] = True

    x_kind: str  # bf16, fp16
    has_zeros: bool
    parameter_vectors: bool  # scales and zeros of neighbouring rows lie side by side
    tiles_m: int
    warps_m: int
    warps_n: int
    cluster: int  # stripes of N, which meet in shared memory; 1: none, or they meet elsewhere

    @property
    def tokens(self) -> int:
        return 8 * self.tiles_m * self.warps_m

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def values_per_block(self) -> int:
        return _COLUMNS * self.tokens

    @property
    def smem_bytes(self) -> int:
        return 2 * self.values_per_block * (self.warps_n + 2 * (self.cluster - 1))

    def grid(self, m: int, n: int, k: int, sm_count: int) -> tuple[int, int, int]:
        """Blocks along k and m, and stripes of n: about one block a processor."""
        x, y = math.ceil(k / _COLUMNS), math.ceil(m / self.tokens)
        stripes, steps = 1, math.ceil(n / (_STEP_N * self.warps_n))
        while 2 * stripes * x * y <= sm_count and 2 * stripes <= steps:
            stripes *= 2
        return x, y, stripes

    def __str__(self) -> str:
        return f"transposed {self.x_kind} {self.tokens}x{_COLUMNS} warps_n={self.warps_n}"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return mma_sass(self.x_kind)


def why_not_transposed(m: int, n: int, k: int, same_types: bool, aligned: bool) -> str | None:
    """What transposed.cu lacks for a problem, None if nothing."""
    if not m * n * k:
        return "nothing to compute"
    if m > TRANSPOSED_MAX_M:
        return f"M={m} is above {TRANSPOSED_MAX_M}: dequantising once is faster"
    if not same_types:
        return "scales or zeros are of another type than x"
    if k % 8 or n % 8 or not aligned:
        return "K or N is not a multiple of 8, or a row is not aligned"
    return None


@lru_cache(maxsize=4096)
def pick_transposed(
    device: Device, x_kind: str, has_zeros: bool, parameter_vectors: bool, m: int, n: int, k: int
) -> Transposed:
    """All tokens in one block, 32 at most in a warp; warps share out N, and Hopper's clusters."""
    tiles_m, warps_m = (1, 1) if m <= 8 else (2, 1) if m <= 16 else (4, 1) if m <= 32 else (4, 2)
    c = Transposed(
        x_kind=x_kind,
        has_zeros=has_zeros,
        parameter_vectors=parameter_vectors,
        tiles_m=tiles_m,
        warps_m=warps_m,
        warps_n=(16 if m <= 16 else 8) // warps_m,
        cluster=1,
    )
    stripes = c.grid(m, n, k, device.sm_count)[2]
    return replace(c, cluster=stripes) if device.arch == "sm_90a" and stripes <= 8 else c
