"""rotate_hopper.cu, rotation and quantisation by wgmma: its configurations, and which one fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .problem import Device

_KIND = {"__nv_bfloat16": "bf16", "__half": "fp16"}
_MX = 2  # of ROTATE_FORMATS
_STAGES = 2
_VALUES = 8192  # that a warpgroup has at a time: 64 for each of its threads
_WARPGROUPS = 4  # of an SM, where their threads keep all these in registers


@dataclass(frozen=True)
class RotateHopper:
    """rotate_hopper.cu: `teams` of warpgroups, each with units of `tiles` * 64 rows a warpgroup."""

    source: ClassVar[str] = "rotate_hopper.cu"
    entry: ClassVar[str] = "rotate_quantize"
    starts_early: ClassVar[bool] = True
    piece: ClassVar[int] = 32

    x_type: str
    rotation: int
    format: int  # index into ROTATE_FORMATS
    quest: bool
    mask: bool
    scaled: bool  # nv: its global scale is not 1
    scope: int  # Scope
    group_size: int  # of quads, otherwise 0
    columns: int  # of h that are multiplied at a time
    tiles: int
    warpgroups: int
    teams: int
    stages: int
    blocks_per_sm: int

    @property
    def capacity(self) -> int:
        """Pieces of a unit."""
        return self.warpgroups * self.tiles * 64 * self.rotation // self.piece

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups * self.teams

    @property
    def smem_bytes(self) -> int:
        ring = self.teams * self.stages * self.capacity * self.piece
        return 2 * (ring + self.rotation**2)

    @property
    def wgmma(self) -> tuple[str, int]:
        """Kind of the operands and columns of its wgmma instructions."""
        return _KIND[self.x_type], self.columns

    def units(self, pieces: int, group_pieces: int) -> int:
        """What the teams share out: parts of x, or groups."""
        return math.ceil(pieces / (group_pieces if self.group_size == 0 else self.capacity))

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "a group a unit"
        return (
            f"rotate {self.rotation} and quantize {('int8', 'int4', 'mx', 'nv')[self.format]} "
            f"{groups} wgmma {self.teams}x{self.warpgroups}x{self.tiles}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ("HGMMA",)


def rotate_hopper(
    device: Device,
    x_type: str,
    rotation: int,
    format_: int,
    quest: bool,
    mask: bool,
    scaled: bool,
    scope: int,
    group_size: int,
) -> RotateHopper | None:
    """For groups of up to 32 values (`scope` 0) or groups as units (2), if these have room."""
    if device.arch != "sm_90a" or x_type not in _KIND or not 32 <= rotation <= 128:
        return None
    most = _VALUES // (64 * rotation)
    columns, warpgroups, tiles, blocks = rotation, 1, most, 1
    if group_size <= 32:
        # half of R = 128 at a time leaves room for more warps; then a group of 32 has two lanes
        columns = rotation if format_ == _MX else min(rotation, 64)
        teams = {32: 5, 64: 6}.get(rotation, 6 if columns == 64 else 4)
    else:
        tiles_of_group = math.ceil(group_size / (64 * rotation))
        warpgroups = math.ceil(tiles_of_group / most)
        if warpgroups > _WARPGROUPS:
            return None
        tiles = math.ceil(tiles_of_group / warpgroups)
        teams = _WARPGROUPS // warpgroups
        if rotation < 128 and teams == _WARPGROUPS:  # two blocks hide each other's beginning
            teams, blocks = teams // 2, 2
    return RotateHopper(
        x_type=x_type,
        rotation=rotation,
        format=format_,
        quest=quest,
        mask=mask,
        scaled=scaled,
        scope=scope,
        group_size=group_size if group_size <= 32 else 0,
        columns=columns,
        tiles=tiles,
        warpgroups=warpgroups,
        teams=teams,
        stages=_STAGES,
        blocks_per_sm=blocks,
    )
