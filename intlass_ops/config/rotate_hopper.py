"""rotate_hopper.cu, rotation and quantisation by wgmma: its configurations, and which one fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from .problem import Device


class Scope(IntEnum):
    """Where the values of a group lie; the kernels say what each means."""

    QUADS = 0
    TABLE = 1
    BLOCK = 2
    TWICE = 3


_KIND = {"__nv_bfloat16": "bf16", "__half": "fp16"}
_VALUES = 8192  # that a warpgroup has at a time: 64 for each of its threads
_FP4 = 2  # from here on in ROTATE_FORMATS
_BOX_ROWS = 256
_WARPGROUPS = 4  # of an SM, where their threads keep all these in registers


@dataclass(frozen=True)
class RotateHopper:
    """rotate_hopper.cu: `teams` of warpgroups, each with units of `tiles` * 64 rows a warpgroup."""

    source: ClassVar[str] = "rotate_hopper.cu"
    entry: ClassVar[str] = "rotate_quantize"
    starts_early: ClassVar[bool] = True
    piece: ClassVar[int] = 32
    blocks_per_sm: ClassVar[int] = 1

    x_type: str
    rotation: int
    format: int  # index into ROTATE_FORMATS
    quest: bool
    mask: bool
    scaled: bool  # nv: its global scale is not 1
    scope: int  # Scope
    group_size: int  # of quads, otherwise 0
    group_rows: int  # of x that a group has; 0: quads
    bits: int  # of a code as it is stored
    lanes: bool  # codes of int4 in the order of packing.to_lanes
    tiles: int
    warpgroups: int
    teams: int
    stages: int

    @property
    def capacity(self) -> int:
        """Pieces of a unit."""
        return self.warpgroups * self.tiles * 64 * self.rotation // self.piece

    @property
    def unit_rows(self) -> int:
        """Of x in a unit: as many as there is room for, of these whole groups, or one group."""
        if self.scope == Scope.BLOCK:
            return self.group_rows
        rows = 64 * self.tiles * self.warpgroups
        return rows // max(self.group_rows, 1) * max(self.group_rows, 1)

    @property
    def box_rows(self) -> int:
        """Of x that TMA copies at a time."""
        boxes = math.ceil(self.unit_rows / _BOX_ROWS)
        return self.unit_rows if boxes == 1 else math.ceil(self.unit_rows / boxes / 8) * 8

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
        return _KIND[self.x_type], self.rotation

    def units(self, pieces: int, group_pieces: int) -> int:
        """What the teams share out: parts of x, or groups."""
        return math.ceil(pieces * self.piece / (self.unit_rows * self.rotation))

    def __str__(self) -> str:
        groups = f"groups of {self.group_size or self.group_rows * self.rotation}"
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
    group_size: int,
    bits: int,
    lanes: bool,
) -> RotateHopper | None:
    """For groups of up to 32 values, and for longer ones that fill 8 rows or a unit.

    ``lanes`` need these longer ones, and no mask, whose bits would have to change places too.
    """
    if lanes and (group_size <= 32 or mask):
        return None
    if device.arch != "sm_90a" or x_type not in _KIND or not 32 <= rotation <= 128:
        return None
    most = _VALUES // (64 * rotation)
    scope, warpgroups, tiles, group_rows = Scope.QUADS, 1, most, 0
    if group_size > 32:
        group_rows = group_size // rotation
        unit = _unit_of(group_rows, most)
        if unit is None:
            return None
        scope, warpgroups, tiles = unit
    teams = _WARPGROUPS // warpgroups
    if rotation == 128 and format_ >= _FP4:  # integers in groups of 8 would spill
        teams += 1
    return RotateHopper(
        x_type=x_type,
        rotation=rotation,
        format=format_,
        quest=quest,
        mask=mask,
        scaled=scaled,
        scope=scope,
        group_size=0 if group_rows else group_size,
        group_rows=group_rows,
        bits=bits,
        lanes=lanes,
        tiles=tiles,
        warpgroups=warpgroups,
        teams=teams,
        stages=3 if warpgroups == _WARPGROUPS else 2,  # more only help a team that is alone
    )


def makes_lanes(major: int, rotation: int, mask: bool) -> bool:
    """Whether INT4 codes may come as lanes, and hopper.cu is there to take them."""
    return major == 9 and 32 <= rotation <= 128 and not mask


def _unit_of(group_rows: int, most: int) -> tuple[Scope, int, int] | None:
    """Scope, warpgroups and tiles of a unit whose rows are used best; None: a group has no room."""
    found = []
    tiles_of_group = math.ceil(group_rows / 64)
    warpgroups = math.ceil(tiles_of_group / most)
    if group_rows > most * 16 and warpgroups <= _WARPGROUPS:
        tiles = math.ceil(tiles_of_group / warpgroups)
        found.append((group_rows / warpgroups, -warpgroups, Scope.BLOCK, tiles))
    for warpgroups in (1, 2):
        groups = 64 * most * warpgroups // max(1, group_rows)
        if groups > 1 and group_rows and group_rows % 8 == 0:
            found.append((groups * group_rows / warpgroups, -warpgroups, Scope.TABLE, most))
    if not found:
        return None
    _, negative, scope, tiles = max(found)
    return scope, -negative, tiles
