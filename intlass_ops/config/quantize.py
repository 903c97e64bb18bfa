"""quantize.cu: its configurations and pick."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import ClassVar

from .problem import TYPE_BYTES, Device


class Before(IntEnum):
    """What quantize.cu computes from x before it quantises."""

    NONE = 0
    RMS_NORM = 1
    SILU_MUL = 2
    ROUNDED_NORM = 3  # before its weight too

    @property
    def is_norm(self) -> bool:
        return self in (Before.RMS_NORM, Before.ROUNDED_NORM)


@dataclass(frozen=True)
class Quantize:
    """quantize.cu: threads_per_segment threads hold a segment in `chunks` vectors each.

    Blocks that stay for many segments load one ``ahead``; ``cluster`` of them share a long one.
    """

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
    ahead: bool = False
    cluster: int = 1
    blocks_per_sm: int = 1
    full_range: bool = False  # torchao's arithmetic (reference.quantize_full_range)
    lanes: bool = False  # codes in the order of packing.to_lanes

    @property
    def smem_bytes(self) -> int:
        """The segment ahead, and a norm's weight in fp32."""
        if not self.ahead:
            return 0
        operands = 2 if self.before == Before.SILU_MUL else 1
        weight = 4 if Before(self.before).is_norm else 0
        return self.chunks * self.threads * 8 * (2 * operands + weight)

    def __str__(self) -> str:
        name = "" if self.before == Before.NONE else f"{Before(self.before).name.lower()} "
        return (
            f"{name}quantize int{self.bits}{' full range' if self.full_range else ''} "
            f"{self.threads_per_segment}x{self.vector}x{self.chunks} "
            f"{'ahead' if self.ahead else f'cluster={self.cluster}'}"
            f"{' lanes' if self.lanes else ''}"
        )

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


_MAX_CHUNKS = 4  # of 16-bit values, in the 64 registers that a thread of 1024 has
_CLUSTER = 8
_RESERVED = 2048  # bytes: what a block keeps beside a segment
_SEGMENTS_OF_AN_SM = 4  # that run at once, about


@lru_cache(maxsize=4096)
def pick_quantize(
    device: Device,
    x_type: str,
    bits: int,
    symmetric: bool,
    stochastic: bool,
    vector: int,
    segments: int,
    length: int,
    before: Before = Before.NONE,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantize:
    """Blocks that load ahead for many segments of whole vectors, a cluster for few long ones.

    Enough threads to keep a segment in registers; 0 chunks reads twice. What counts for few
    segments, no more than run at once, is their latency: a load a thread. Threads of many have so
    many loads that what is to be done once a segment costs little.
    """
    vectors = max(1, math.ceil(length / vector))
    few = segments <= _SEGMENTS_OF_AN_SM * device.sm_count
    pairs = TYPE_BYTES[x_type] == 2
    ahead = pairs and not few and vector == 8 and not stochastic
    has_clusters = device.arch.startswith(("sm_9", "sm_10", "sm_12"))
    cluster = 1
    # a norm would wait for the others twice
    if few and vectors > 1024 and 2 * segments <= device.sm_count and not before.is_norm:
        cluster = _CLUSTER if has_clusters else 1
    if few:
        loads = 1
    elif before == Before.SILU_MUL or not pairs:
        loads = 2
    elif ahead and 512 < vectors <= 640:
        loads = 5  # of four warps; of eight with three each a sixth would be idle
    else:
        loads = 2 if before == Before.NONE and 512 <= vectors <= 1024 else 4
    per_segment = _threads(vectors, loads) if cluster == 1 else _in_cluster(vectors)
    chunks = math.ceil(vectors / (per_segment * cluster))
    c = Quantize(
        x_type=x_type,
        bits=bits,
        symmetric=symmetric,
        stochastic=stochastic,
        vector=vector,
        threads_per_segment=per_segment,
        threads=per_segment * max(1, 128 // per_segment if cluster == 1 else 1),
        chunks=chunks if chunks <= (max(loads, _MAX_CHUNKS) if pairs else _MAX_CHUNKS // 2) else 0,
        before=before,
        cluster=cluster,
        full_range=full_range,
        lanes=lanes and bits == 8 and vector == 8 and length % 32 == 0,
    )
    if not ahead or not c.chunks:
        return c
    staying = replace(c, ahead=True)
    if staying.smem_bytes + _RESERVED > device.smem_per_block:
        return c
    room = device.smem_per_sm // (staying.smem_bytes + _RESERVED)
    return replace(staying, blocks_per_sm=max(1, min(_blocks_that_stay(staying), room)))


def _threads(vectors: int, loads: int) -> int:
    """Of a segment: as many warps for each of an SM's four schedulers, unless it is short."""
    warps = math.ceil(vectors / (32 * loads))
    return 32 * (warps if warps < 3 else min(4 * math.ceil(warps / 4), 32))


def _in_cluster(vectors: int) -> int:
    """Threads of each of its blocks: a vector for each, up to 65536 values."""
    return 32 * min(math.ceil(vectors / (32 * _CLUSTER)), 32)


def _blocks_that_stay(c: Quantize) -> int:
    """Of an SM, from sweeps on an H200: what registers and the latency of a segment allow."""
    if c.chunks > _MAX_CHUNKS:
        return 4
    if Before(c.before).is_norm:
        return math.ceil(768 / c.threads)
    return 8 if c.threads <= 128 else 1280 // c.threads
