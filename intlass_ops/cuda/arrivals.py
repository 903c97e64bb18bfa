"""Arrival counters of kernels that split K: ints in GPU memory, zero before and after a launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import jit

# Kernels that split K count the arrivals of a tile in ints that are zero before and after a launch.
# Launches of one stream follow each other and share a slab; a captured launch may be replayed on
# any stream, beside any other, so it gets ints of its own that are never handed out again.
# Every linear of a model at dozens of batch sizes, each with a graph, takes a million of them.
_SLAB = 1 << 21  # ints


class _Counters:
    """The arrival counters of one device: a slab for each stream, one for captured launches."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.of_stream: dict[int, tuple[int, int]] = {}  # stream -> address, ints
        self.captured = jit.allocate_zeroed(index, 4 * _SLAB)
        self.captured_used = 0

    def for_stream(self, stream: int, count: int) -> int:
        address, size = self.of_stream.get(stream, (0, 0))
        if size < count:
            size = max(count, 4096)
            address = jit.allocate_zeroed(self.index, 4 * size)
            self.of_stream[stream] = address, size
        return address

    def for_capture(self, count: int) -> int | None:
        first = self.captured_used
        if first + count > _SLAB:
            return None
        self.captured_used += count
        return self.captured + 4 * first


_counters: dict[int, _Counters] = {}


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """What is captured inside gives its counters back: its graphs must not run beside others.

    For who times one graph at a time; with no counters left, graphs are slower.
    """
    before = {index: counters.captured_used for index, counters in _counters.items()}
    try:
        yield
    finally:
        for index, used in before.items():
            _counters[index].captured_used = used


def arrival_counters(a: Tensor, stream: int, count: int) -> tuple[int, Tensor | None]:
    """Address of ``count`` zeroed ints for one launch on ``stream``, and the tensor they lie in."""
    counters = _counters.get(a.device.index)
    if torch.cuda.is_current_stream_capturing():
        address = None if counters is None else counters.for_capture(count)
        if address is None:  # the zeroing becomes a node of the graph: right, if slower, and rare
            zeroed = a.new_zeros(count, dtype=torch.int32)
            return zeroed.data_ptr(), zeroed
        return address, None
    if counters is None:
        counters = _counters[a.device.index] = _Counters(a.device.index)
    return counters.for_stream(stream, count), None
