"""fp4.cu, MXFP4 and NVFP4 operands, few tokens: its configurations and pick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from .problem import Device, mma_sass

FP4_X = ("e2m1", "bf16", "fp16")
# Above so many tokens, decoding both operands to bf16 once and a dense product are faster (H200).
FP4_MAX_M = 64


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
        return mma_sass("s8" if self.x_kind == "e2m1" else self.x_kind, arch)


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
