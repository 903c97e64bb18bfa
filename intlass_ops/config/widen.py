"""widen.cu: INT4 activations as INT8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .problem import Device

_WARPS_OF_SM = 16  # from there on, blocks of several warps are faster
_MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Widen:
    """widen.cu: a thread widens `vector` bytes of packed codes."""

    source: ClassVar[str] = "widen.cu"
    entry: ClassVar[str] = "widen"
    starts_early: ClassVar[bool] = True

    is_signed: bool
    vector: int
    threads: int
    lane_order: bool  # of each 32 codes, as hopper.cu takes them: even k first

    def grid(self, m: int, row_bytes: int) -> tuple[int, int, int]:
        parts = math.ceil(row_bytes / (self.vector * self.threads))
        return m, min(parts, _MAX_GRID_Y), 1

    def __str__(self) -> str:
        return "widen"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


def pick_widen(
    device: Device, x_kind: str, aligned: bool, m: int, row_bytes: int, lane_order: bool
) -> Widen:
    """The configuration; ``aligned``: rows start and end on 16-byte boundaries.

    A tile of hopper.cu leaves an SM the registers of one more warp. Blocks of a warp are there
    before the GEMM ahead has ended, and the one behind them can start as soon as it has.
    """
    vector = 16 if aligned else 1
    few = m * row_bytes <= 32 * vector * _WARPS_OF_SM * device.sm_count
    threads = 32 if few else 128
    return Widen(x_kind == "s4", vector, threads, lane_order)
