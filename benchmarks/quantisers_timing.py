"""How benchmarks/quantisers.py times things: a row, and medians on one device.

Not here: what is timed (quantisers_cases.py).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16 = torch.bfloat16
Method = Callable[[], object]
Time = Callable[[], float]


class Row(NamedTuple):
    """``other`` over ``ours``, in whatever unit, should be ``bar`` or more."""

    what: str
    case: str
    bar: float
    ours: Time
    other: Time
    warm: Method | None = None  # compiled beside those of other rows before any is timed

    @property
    def name(self) -> str:
        return f"{self.what}: {self.case}"


class Bench:
    """Shapes and timing on one device."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(1 << 28 if self.cuda else 0, dtype=torch.uint8, device=device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=BF16)

    def size(self, n: int, step: int = 128) -> int:
        """n, or a small multiple of ``step`` in a tiny run."""
        return n if not self.tiny else min(n, step * (1 + n // step % 3))

    def ms(self, run: Method, repeats: int = 20) -> Time:
        """Median device time of ``run``, measured when first asked for."""
        return functools.cache(lambda: self._ms(run, repeats))

    def wall_ms(self, run: Method, repeats: int = 3, warm: Method | None = None) -> Time:
        """Median time of ``run`` as its caller sees it, after ``warm`` or one call more."""

        @functools.cache
        def measured() -> float:
            (warm or run)()
            times = []
            for _ in range(repeats):
                self._wait()
                start = time.perf_counter()
                run()
                self._wait()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)

        return measured

    def compiled(self, run: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(run, backend="inductor" if self.cuda else "eager")

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _ms(self, run: Method, repeats: int) -> float:
        if not self.cuda:
            return self.wall_ms(run, 1)()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(repeats):
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in times))
