"""quantize.cu: its configurations and pick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import ClassVar

from .problem import TYPE_BYTES


class Before(IntEnum):
    """What quantize.cu computes from x before it quantises."""

    NONE = 0
    RMS_NORM = 1
    SILU_MUL = 2


@dataclass(frozen=True)
class Quantize:
    """quantize.cu: threads_per_segment threads hold a segment in `chunks` vectors each."""

    source: ClassVar[str] = "quantize.cu"
    entry: ClassVar[str] = "quantize"
    starts_early: ClassVar[bool] = True

    x_type: str
    bits: int
    symmetric: bool
    stochastic: bool
    vector: int
    threads_per_segment: int
    threads: int
    chunks: int
    before: int  # Before

    def __str__(self) -> str:
        name = "" if self.before == Before.NONE else f"{Before(self.before).name.lower()} "
        return (
            f"{name}quantize int{self.bits} {self.threads_per_segment}x{self.vector}x{self.chunks}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


_MAX_CHUNKS = 4  # in the 64 registers that a thread of 1024 has


@lru_cache(maxsize=4096)
def pick_quantize(
    x_type: str,
    bits: int,
    symmetric: bool,
    stochastic: bool,
    vector: int,
    length: int,
    before: Before = Before.NONE,
    few: bool = False,
) -> Quantize:
    """Enough threads to keep a segment in registers; 0 chunks reads twice.

    ``few`` segments, no more than run at once: a load a thread, since their latency is what counts.
    Of many, so many loads that enough bytes are under way at a time.
    """
    vectors = max(1, math.ceil(length / vector))
    loads = 1 if few else 4 if TYPE_BYTES[x_type] == 2 and before != Before.SILU_MUL else 2
    per_segment = min(max(32, 1 << (math.ceil(vectors / loads) - 1).bit_length()), 1024)
    chunks = math.ceil(vectors / per_segment)
    return Quantize(
        x_type=x_type,
        bits=bits,
        symmetric=symmetric,
        stochastic=stochastic,
        vector=vector,
        threads_per_segment=per_segment,
        threads=max(per_segment, 256),
        chunks=chunks if chunks <= _MAX_CHUNKS else 0,
        before=before,
    )
