"""How benchmarks/quantisers.py times things: a row, and medians on one device.

Kernels are timed as `intlass bench` times them: calls go round over copies of what they read, more
than any cache holds, in one CUDA graph. The graphs of a row's two sides take turns: from some 512
tokens on the GPU's power decides, and with it what ran before. Not here: what is timed
(quantisers_cases.py).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from intlass_ops.bench import timing

BF16 = torch.bfloat16
Method = Callable[[], object]
Call = Callable[..., object]  # of the tensors of a copy
Time = Callable[[], float]  # measured anew, or once if that takes long


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

    def medians(self) -> list[float]:
        """Of ours and the other."""
        return timing.medians((self.ours, self.other), 0.1)


class Bench:
    """Shapes and timing on one device."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.cuda = device.type == "cuda"

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=BF16)

    def size(self, n: int, step: int = 128) -> int:
        """n, or a small multiple of ``step`` in a tiny run."""
        return n if not self.tiny else min(n, step * (1 + n // step % 3))

    def copies(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors, and as many copies of them as no cache holds."""
        count = 1 if self.tiny else timing.copies_of(sum(t.nbytes for t in tensors))
        return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]

    def ms(self, call: Call, copies: Sequence[tuple[Tensor, ...]]) -> Time:
        """Device time of ``call`` of a copy; its graph is made when it is first asked for."""
        calls = 1 if self.tiny else None

        @functools.cache
        def run() -> Time:
            return timing.rounds(
                lambda i: call(*copies[i]), len(copies), self.device.type, calls=calls
            )

        return lambda: run()() / 1e3

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
