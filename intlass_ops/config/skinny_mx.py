"""skinny_mx.cu, few tokens of two MXFP4 operands by wgmma: its configurations and pick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from .epilogue import Activation, named
from .problem import Device, Grouping, Shape
from .skinny_held import PLACES

_ROWS, _BLOCK_K, _WARPGROUPS = 64, 128, 4


@dataclass(frozen=True)
class SkinnyMx:
    """skinny_mx.cu: a cluster of `split_k` blocks takes 64 rows a turn."""

    source: ClassVar[str] = "skinny_mx.cu"
    entry: ClassVar[str] = "skinny_mx"
    starts_early: ClassVar[bool] = True
    x_kind: str
    w_kind: str
    scale_type: str
    out_type: str
    tokens: int  # 8 or 16
    warpgroups: int
    split_k: int  # blocks of a cluster that share K
    num_stages: int  # of 128 k
    early_tiles: int  # of K, whose codes a warp asks for before X
    resident_blocks: int  # of the whole GPU
    fixed_smem: int  # bytes without X and the sums that a cluster's blocks keep
    zero_type: str = "float"
    grouping: int = Grouping.SCALED_WEIGHTS
    has_zeros: bool = False
    has_a_zero: bool = False
    blocked: bool = False  # scales in the order of fp4.to_blocked
    activation: Activation = Activation.NONE
    residual: bool = False

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def wgmma(self) -> tuple[str, int]:
        return "e4m3", self.tokens

    def _clusters(self, n: int) -> int:
        return min(self.resident_blocks // self.split_k, self._tiles(n))

    def _tiles(self, n: int) -> int:
        return 2 * math.ceil(n / (2 * _ROWS)) if self.blocked else math.ceil(n / _ROWS)

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return self.split_k * self._clusters(n), 1, 1

    def turns(self, n: int) -> int:
        return math.ceil(self._tiles(n) / self._clusters(n))

    def smem_of(self, n: int, k: int) -> int:
        """Bytes for a problem: X of a share of K; blocks that share it send one another sums."""
        x = _share(k, self.split_k) * (_BLOCK_K + 4) * self.tokens
        sent = self.turns(n) * (self.tokens * _ROWS * 4 + 8) if self.split_k > 1 else 0
        return self.fixed_smem + x + sent

    def __str__(self) -> str:
        return (
            f"skinny_mx {self.tokens}x{_ROWS} split={self.split_k} stages={self.num_stages}"
            f"{named(self)}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return (r"QGMMA\.64x\d+x32\.F32\.E4M3\.E5M2",)


def why_not_mx(device: Device, shape: Shape) -> str | None:
    """What keeps a problem for few tokens (skinny.why_not_skinny) from skinny_mx.cu, or None."""
    if device.arch != "sm_90a":
        return "no wgmma"
    if (shape.x_kind, shape.w_kind, shape.scale_type) != ("e2m1", "e2m1", "e8m0"):
        return "not two MXFP4 operands"
    whole = _BLOCK_K if shape.blocked else 4 * _BLOCK_K
    if shape.k == 0 or shape.k % whole:
        return f"K={shape.k} is not a multiple of {whole}"
    return None


def pick_mx(device: Device, shape: Shape) -> SkinnyMx | None:
    """The configuration for a problem where it is the fastest that was measured, or None.

    Half as many instructions as in skinny_held.cu, but 64 rows a turn: for up to eight tokens there
    must be many. The least that was measured for more are 2048 rows of 4096 k and 4096 of 2048.
    """
    if shape.m <= 8:
        few = shape.k <= 4096 or (shape.m <= 2 and not shape.blocked)
        fewest = 340_000
    else:
        few = shape.n < 15 * device.sm_count
        fewest = 60_000 if shape.blocked else 120_000
    if few or shape.n * shape.k < fewest * device.sm_count:
        return None

    def tiles_of_k(c: SkinnyMx) -> int:
        """That a block takes, and that the time for all else is worth."""
        share = _share(shape.k, c.split_k)
        return c.turns(shape.n) * share + 3 * (c.split_k // 2) + 4 * (c.num_stages < 4)

    return min(mx_candidates(device, shape), key=tiles_of_k, default=None)


def mx_candidates(device: Device, shape: Shape) -> Iterator[SkinnyMx]:
    """For each number of blocks that may share K, the one with most in flight."""
    if why_not_mx(device, shape) is not None:
        return
    for split_k in PLACES:
        stages = (_config(device, shape, split_k, n) for n in (8, 6, 5, 4, 3))
        yield from [c for c in stages if c is not None][:1]


def _share(k: int, split_k: int) -> int:
    """Tiles of K of a block."""
    return math.ceil(k / (_BLOCK_K * split_k))


def _config(device: Device, shape: Shape, split_k: int, num_stages: int) -> SkinnyMx | None:
    resident = int(device.sm_count * PLACES[split_k]) // split_k * split_k
    last_share = shape.k // _BLOCK_K - (split_k - 1) * _share(shape.k, split_k)
    if not resident or last_share < _WARPGROUPS:
        return None  # no such cluster, or a warpgroup without work
    tokens = 8 if shape.m <= 8 else 16
    warp_bytes = num_stages * 16 * (_BLOCK_K // 2 + 16) + 16 * 16
    c = SkinnyMx(
        x_kind=shape.x_kind,
        w_kind=shape.w_kind,
        scale_type=shape.scale_type,
        out_type=shape.out_type,
        tokens=tokens,
        warpgroups=_WARPGROUPS,
        split_k=split_k,
        num_stages=num_stages,
        early_tiles=0,
        resident_blocks=resident,
        fixed_smem=_WARPGROUPS * (4 * warp_bytes + 2 * tokens * (_ROWS + 4) * 4) + tokens * 4 + 16,
        blocked=shape.blocked,
    )
    if c.turns(shape.n) > 1:  # else X is what all wait for
        c = replace(c, early_tiles=2)
    return c if c.smem_of(shape.n, shape.k) <= device.smem_per_block - 1024 else None
