"""rotate_quantize.cu: its configurations and pick."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from .problem import TYPE_BYTES, Device, mma_sass
from .rotate_hopper import RotateHopper, rotate_hopper
from .rotate_hopper import Scope as Scope

ROTATE_FORMATS = ("int8", "int4", "mx", "nv")
_KIND = {"__nv_bfloat16": "bf16", "__half": "fp16"}


@dataclass(frozen=True)
class RotateQuantize:
    """rotate_quantize.cu: a block takes `row_warps` * `tiles` * 16 rows of R values at a time."""

    source: ClassVar[str] = "rotate_quantize.cu"
    entry: ClassVar[str] = "rotate_quantize"
    starts_early: ClassVar[bool] = True

    x_type: str
    rotation: int
    format: int  # index into ROTATE_FORMATS
    quest: bool
    mask: bool
    scaled: bool  # nv: its global scale is not 1
    scope: int  # Scope
    group_size: int  # of quads, otherwise 0
    bits: int  # of a code as it is stored
    row_warps: int
    tiles: int
    stages: int
    blocks_per_sm: int

    @property
    def width(self) -> int:
        """Values of a row: R = 16 has two blocks in it."""
        return max(self.rotation, 32)

    @property
    def piece(self) -> int:
        return min(self.rotation, 32)

    @property
    def capacity(self) -> int:
        """Pieces of a unit."""
        return self.row_warps * self.tiles * 16 * self.width // self.piece

    @property
    def threads(self) -> int:
        return self.row_warps * self.width

    @property
    def smem_bytes(self) -> int:
        stage = self.capacity * self.piece * TYPE_BYTES[self.x_type]
        h = 0
        if self.x_type in _KIND:
            h = (64 if self.rotation > 128 else self.rotation) * (2 * self.rotation + 16)
        collected = self.rotation > 32 and self.bits < 8
        codes = 2 * 16 * self.capacity if collected else 0
        return (self.stages - 1) * stage + max(stage, h) + codes

    def units(self, pieces: int, group_pieces: int) -> int:
        """What the blocks share out: parts of x, or groups where these are longer."""
        unit = self.capacity
        if self.scope != Scope.QUADS:
            unit = max(1, self.capacity // group_pieces) * group_pieces
        return math.ceil(pieces / unit)

    def __str__(self) -> str:
        return (
            f"rotate {self.rotation} and quantize {ROTATE_FORMATS[self.format]} "
            f"{Scope(self.scope).name.lower()} {self.row_warps}x{self.tiles} stages={self.stages}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return mma_sass(_KIND[self.x_type]) if self.x_type in _KIND else ()


_MAX_WARPS = 16
_REGISTERS_OF_SCHEDULER = 16384  # of four in an SM
_MAX_THREADS = 1024  # of an SM: the ring hides the latency of memory


@lru_cache(maxsize=4096)
def pick_rotate_quantize(
    device: Device,
    x_type: str,
    rotation: int,
    format_: str,
    quest: bool,
    mask: bool,
    group_size: int,
    scaled: bool = False,
    layout: str = "packed",
) -> RotateQuantize | RotateHopper:
    """Groups in a unit, or else a group as a unit, or, if it has no room, in several, twice.

    ``layout`` of int4: of "lanes", a RotateQuantize makes "bytes".
    """
    bits = 8 if format_ == "int8" or (format_ == "int4" and layout != "packed") else 4
    width, piece = max(rotation, 32), min(rotation, 32)
    column_warps = width // 32

    def config(scope: Scope, row_warps: int, tiles: int, stages: int) -> RotateQuantize:
        c = RotateQuantize(
            x_type=x_type,
            rotation=rotation,
            format=ROTATE_FORMATS.index(format_),
            quest=quest,
            mask=mask,
            scaled=scaled,
            scope=scope,
            group_size=group_size if scope == Scope.QUADS else 0,
            bits=bits,
            row_warps=row_warps,
            tiles=tiles,
            stages=stages,
            blocks_per_sm=1,
        )
        return replace(c, blocks_per_sm=max(1, _blocks_per_sm(device, c)))

    kernel = ROTATE_FORMATS.index(format_), quest, mask, scaled
    lanes = format_ == "int4" and layout == "lanes"
    hopper = rotate_hopper(device, x_type, rotation, *kernel, group_size, bits, lanes)
    if hopper is not None:
        return hopper

    small = max(1, 4 // column_warps), 1 if rotation > 128 else 2
    if group_size <= 32:
        return config(Scope.QUADS, *small, 3)
    table = config(Scope.TABLE, *small, 3)
    if 2 * (group_size // piece) <= table.capacity:
        return table
    tiles_of_group = math.ceil(group_size / (16 * width))
    found = []
    for tiles, stages in itertools.product(range(1 if rotation > 128 else 2, 8), (3, 2)):
        row_warps = math.ceil(tiles_of_group / tiles)
        c = config(Scope.BLOCK, row_warps, tiles, stages)
        if row_warps * column_warps <= _MAX_WARPS and _blocks_per_sm(device, c):
            found.append(c)
    # Two blocks take turns: one waits for its scale while the other multiplies.
    found.sort(key=lambda c: (c.blocks_per_sm == 1, -c.stages))
    if found:
        return found[0]
    again = [config(Scope.TWICE, max(1, 8 // column_warps), small[1], stages) for stages in (3, 2)]
    return next((c for c in again if _blocks_per_sm(device, c)), again[-1])


def _blocks_per_sm(device: Device, c: RotateQuantize) -> int:
    """How many blocks have room; a thread keeps products, its part of h, and some more."""
    rotation = max(c.rotation // 2, 24) if c.rotation > 16 else 48  # has two blocks in a row
    registers = 16 * c.tiles + rotation + (84 if c.mask else 44)
    warps = 4 * (_REGISTERS_OF_SCHEDULER // (32 * registers))
    shared = c.smem_bytes + 2 * 4 * c.capacity * (c.scope == Scope.TABLE) + 1024
    return min(
        32 * warps // c.threads,
        device.smem_per_sm // shared if shared <= device.smem_per_block else 0,
        _MAX_THREADS // c.threads,
    )
