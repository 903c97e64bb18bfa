"""FP4 (MXFP4, NVFP4): which kernel takes a product, and decode_fp4.cu's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from .hopper import Hopper, why_not_hopper
from .hopper_tiles import pick_hopper
from .problem import Device, Shape
from .skinny import Skinny, pick_skinny, why_not_skinny
from .skinny_held import SkinnyHeld, pick_held
from .skinny_ring import SkinnyRing, ring_candidates

FewTokens = Skinny | SkinnyRing | SkinnyHeld
FP4_X = ("e2m1", "bf16")
# Where there is no wgmma, so many tokens go through the kernels for few tokens slice by slice; more
# are faster as a dense product of operands that were decoded before.
FP4_MAX_M = 64


# What decoded numbers are divided by (fp4.cuh): bf16 has no room for 6 * 2^127.
FP4_UNIT = {"e8m0": 32, "e4m3": 1}


@dataclass(frozen=True)
class DecodeFp4:
    """decode_fp4.cu: codes and scales to bf16, a block `rows` rows by 8 k a thread."""

    source: ClassVar[str] = "decode_fp4.cu"
    entry: ClassVar[str] = "decode_fp4"
    starts_early: ClassVar[bool] = True
    scale_type: str  # e8m0, e4m3
    blocked: bool  # scales in the order of fp4.to_blocked
    lane_order: bool  # of each 32 k, as hopper.cu takes them
    threads: int = 128
    rows: int = 4

    def grid(self, rows: int, k: int) -> tuple[int, int, int]:
        return math.ceil(rows / self.rows), math.ceil(k / (8 * self.threads)), 1

    def __str__(self) -> str:
        return f"decode_fp4 {self.scale_type}"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


@lru_cache(maxsize=4096)
def pick_fp4(device: Device, shape: Shape) -> FewTokens | Hopper | None:
    """The configuration for a product with FP4 weights; None: no kernel takes it."""
    if why_not_skinny(shape) is None:
        held = pick_held(device, shape)
        return held or _pick_ring(device, shape) or pick_skinny(device, shape)
    return pick_hopper(device, shape) if why_not_hopper(device, shape) is None else None


def _pick_ring(device: Device, shape: Shape) -> SkinnyRing | None:
    """A ring for many rows, or for long ones that are a tile for each of its groups of warps.

    H200, MXFP4, M = 1: 49 us instead of 60 for 8192 rows of 28672 k, but 12 instead of 6 for 4096
    rows of 4096. M = 16: 34 us instead of 31 for 28672 rows, if the activations are FP4 too.
    """
    if shape.m > 8 and shape.x_kind == "e2m1" and device.arch.startswith("sm_90"):
        return None
    if shape.n >= 128 * device.sm_count:
        return next(ring_candidates(device, shape), None)
    if shape.k < 16384 or not device.sm_count < math.ceil(shape.n / 32) <= 2 * device.sm_count:
        return None
    of_two_groups = (
        c for c in ring_candidates(device, shape) if (c.groups, c.num_stages) == (2, 4)
    )
    return next((c for c in of_two_groups if c.segment_k >= shape.k), None)
