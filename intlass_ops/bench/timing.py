"""How long a call takes: cold weights, no launch overhead on a GPU, medians.

A layer of a model finds its weights in no cache, since all other layers ran in between. So a
contender's calls go round over copies of its weights that together exceed every cache. On a GPU
they are captured in a CUDA graph, which leaves the time of the kernels alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..cuda import arrivals

COLD_BYTES = 320 << 20  # more than the last cache of any current GPU or CPU socket
_CALLS = 20
_MIN_REPEATS = 5


def copies_of(num_bytes: int) -> int:
    """How many copies of a weight of so many bytes make every call a cold one."""
    return max(2, min(64, math.ceil(COLD_BYTES / max(num_bytes, 1))))


def microseconds(
    call: Callable[[int], object],
    copies: int,
    device: str,
    seconds: float,
    *,
    calls: int | None = None,
    give_up: float = math.inf,
) -> float:
    """Median time of ``call(i)`` with i going round over the copies.

    ``calls``: so many in one CUDA graph. ``give_up``: what takes longer at first is not repeated.
    """
    return medians([rounds(call, copies, device, calls=calls)], seconds, give_up)[0]


def rounds(
    call: Callable[[int], object], copies: int, device: str, *, calls: int | None = None
) -> Callable[[], float]:
    """What measures ``call(i)`` anew each time: microseconds of a call, of a round of them."""
    calls = calls or max(_CALLS, copies)
    if device == "cpu":

        def run() -> float:
            begin = time.perf_counter()
            for i in range(calls):
                call(i % copies)
            return (time.perf_counter() - begin) * 1e6 / calls

    else:
        run = _replays(call, copies, calls)
    run()
    return run


def _replays(call: Callable[[int], object], copies: int, calls: int) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(copies, 3)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with arrivals.borrowed(), torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / calls

    return replay


def medians(
    runs: Sequence[Callable[[], float]], seconds: float, give_up: float = math.inf
) -> list[float]:
    """Of what runs measure that take turns: what ran before, and a GPU's power, count alike."""
    times = [[run()] for run in runs]
    start = time.perf_counter()
    while min(t[0] for t in times) <= give_up and (
        len(times[0]) < _MIN_REPEATS or time.perf_counter() - start < seconds
    ):
        for run, own in zip(runs, times, strict=True):
            own.append(run())
    return [statistics.median(own) for own in times]


def copy_bandwidth(device: str, seconds: float = 0.2) -> float:
    """Bytes a second that a plain copy reads and writes together: what memory-bound calls meet."""
    num_bytes = (1 << 30) if device != "cpu" else (64 << 20)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = microseconds(lambda _: target.copy_(source), 2, device, seconds)
    return 2 * num_bytes / us * 1e6
