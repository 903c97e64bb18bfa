"""FP4 (MXFP4, NVFP4): which kernel takes a product, and decode_fp4.cu's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from .gemm import Gemm
from .gemm_tiles import pick_gemm
from .hopper import Hopper, why_not_hopper
from .hopper_tiles import pick_hopper
from .problem import Device, Shape, decoded_fp4
from .skinny import Skinny, pick_skinny, why_not_skinny
from .skinny_held import SkinnyHeld, pick_held
from .skinny_mx import SkinnyMx, pick_mx
from .skinny_ring import SkinnyRing, ring_candidates

FewTokens = Skinny | SkinnyRing | SkinnyHeld | SkinnyMx
FP4_X = ("e2m1", "bf16")
# Where there is no wgmma, so many tokens go through gemm.cu, or where that takes no such operands,
# so many slice by slice through the kernels for few tokens. More are faster as a dense product of
# operands that were decoded before.
_GEMM_MAX_M = 128
FP4_MAX_M = 64


# What decoded numbers are divided by (fp4.cuh): bf16 has no room for 6 * 2^127.
FP4_UNIT = {("bf16", "e8m0"): 32, ("bf16", "e4m3"): 1, ("fp16", "e4m3"): 1 << 14}


@dataclass(frozen=True)
class DecodeFp4:
    """decode_fp4.cu: codes and scales to bf16, a block `rows` rows by 8 k a thread."""

    source: ClassVar[str] = "decode_fp4.cu"
    entry: ClassVar[str] = "decode_fp4"
    starts_early: ClassVar[bool] = True
    x_kind: str  # what it makes: bf16, fp16
    scale_type: str  # e8m0, e4m3
    blocked: bool  # scales in the order of fp4.to_blocked
    lane_order: bool  # of each 32 k, as hopper.cu takes them
    only_if: int = -1  # as Hopper's
    threads: int = 128
    rows: int = 4

    def grid(self, rows: int, k: int) -> tuple[int, int, int]:
        return math.ceil(rows / self.rows), math.ceil(k / (8 * self.threads)), 1

    def __str__(self) -> str:
        return f"decode_fp4 {self.scale_type}"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class MxRange:
    """mx_codes.cu: whether both operands of an MXFP4 product fit INT8, a warp a row."""

    source: ClassVar[str] = "mx_codes.cu"
    entry: ClassVar[str] = "mx_range"
    starts_early: ClassVar[bool] = True
    blocked: bool  # scales in the order of fp4.to_blocked
    x_kind: str = "e2m1"
    scale_type: str = "e8m0"
    threads: int = 256
    rows: int = 4  # of a thread that makes codes

    def grid(self, rows: int, k: int, sm_count: int) -> tuple[int, int, int]:
        return math.ceil(rows / (self.threads // 32)), 2, 1

    def __str__(self) -> str:
        return self.entry

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class MxCodes(MxRange):
    """And then the codes, half a block of `rows` rows a thread; no more blocks than run at a time.

    Where INT8 does not fit, blocks find nothing to do, and each takes its time for that.
    """

    entry: ClassVar[str] = "mx_codes"

    def grid(self, rows: int, k: int, sm_count: int) -> tuple[int, int, int]:
        parts = math.ceil(k / (16 * self.threads))
        most = math.ceil(2048 * sm_count / self.threads / parts)
        return min(math.ceil(rows / self.rows), most), parts, 2


@lru_cache(maxsize=4096)
def pick_fp4(device: Device, shape: Shape) -> FewTokens | Hopper | Gemm | None:
    """The configuration for a product with FP4 weights; None: no kernel takes it.

    One of hopper.cu is for FP4 activations that decode_fp4.cu has decoded.
    """
    wide = shape
    if shape.x_kind == "e2m1":
        wide = replace(shape, x_kind=decoded_fp4(shape.scale_type))
    by_hopper = why_not_hopper(device, wide) is None
    if why_not_skinny(shape) is None and not (by_hopper and _few_tokens_for_hopper(device, wide)):
        held = pick_held(device, shape)
        ring = _pick_ring(device, shape, held)
        return pick_mx(device, shape) or ring or held or pick_skinny(device, shape)
    if by_hopper:
        return pick_hopper(device, wide)
    decodes = shape.x_kind == "bf16" and not shape.blocked
    return pick_gemm(device, shape) if decodes and shape.m <= _GEMM_MAX_M else None


def _few_tokens_for_hopper(device: Device, shape: Shape) -> bool:
    """Whether hopper.cu beats the kernels for few tokens, decoding the activations included."""
    return shape.x_kind == "fp16" and shape.m > 8 and shape.k >= 16384 and shape.k % 256 == 0


def _pick_ring(device: Device, shape: Shape, held: SkinnyHeld | None) -> SkinnyRing | None:
    """A ring for many rows, or for long ones that are a tile for each of its groups of warps.

    H200, MXFP4, M = 1: 36.5 us instead of 43.4 (held, in clusters) for 8192 rows of 28672 k, but
    18.5 instead of 16.4 for 5120 rows of 13824, which leave a third of the groups idle.
    """
    candidates = ring_candidates(device, shape)
    tiles, blocks = math.ceil(shape.n / 32), device.sm_count
    if not device.arch.startswith("sm_90"):
        if shape.n >= 128 * blocks:
            return next(candidates, None)
        if shape.k < 16384 or not blocks < tiles <= 2 * blocks:
            return None
        of_two_groups = (c for c in candidates if (c.groups, c.num_stages) == (2, 4))
        return next((c for c in of_two_groups if c.segment_k >= shape.k), None)
    if held is None:  # MXFP4 by MXFP4, M = 16, 28672 rows: 34 us instead of 31
        few = shape.m <= 8 or shape.x_kind != "e2m1"
        many_rows = few and shape.n >= 128 * blocks
        return next(candidates, None) if many_rows else None
    groups = 2 if tiles > blocks else 1
    turns = tiles / (groups * blocks)
    if shape.m > 2 or held.split_k == 1 or turns < 0.9 * math.ceil(turns):
        return None
    return next((c for c in candidates if c.warps > 8 and c.groups == groups), None)
