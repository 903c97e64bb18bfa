"""What the pass decided about each matrix product, and counters for tests and `explain`.

Lives here: the `Decision` record, the process-wide log and its counters. Not here: how a
decision is reached (weights.py, activations.py, rules.py) or printed (intlass_ops/explain.py).
A graph served by PyTorch's caches is not passed over again, so it adds no decisions: the
run-time counters (runtime.py) still count every call and every packing.

`watch` ties the decisions of one compile to the compiled graph, so that they are told to
`explain()` and `strict()` whenever it runs.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..explain import linears_ran, listening

SWAPPED = "swapped"
DECLINED = "declined"
DENSE = "dense"


@dataclass(frozen=True)
class Decision:
    """One matrix product of one compiled graph: where it was and what became of it."""

    node: str
    path: str
    gemm: str
    outcome: str
    scheme: str
    reason: str
    rule: str = ""
    shape: tuple[int, int] | None = None
    group_size: int | None = None

    def __str__(self) -> str:
        where = self.path or self.node
        size = f" [N={self.shape[0]}, K={self.shape[1]}]" if self.shape else ""
        return f"{where}{size}: {self.outcome} {self.scheme} ({self.reason})"


_LOCK = threading.Lock()
# Bounded: a server that compiles for weeks must not grow without end.
_DECISIONS: deque[Decision] = deque(maxlen=65536)
_COUNTERS: Counter[str] = Counter()


@dataclass
class Compile:
    """What the pass saw of one compile. ``passed``: False where a cache answered in its place."""

    passed: bool = False
    decisions: list[Decision] = field(default_factory=list)


_current = threading.local()


def passed() -> None:
    """The pass is at work on a graph of the current compile."""
    compile_: Compile | None = getattr(_current, "compile", None)
    if compile_ is not None:
        compile_.passed = True


def watch(compile_graph: Callable[[], Any]) -> Any:
    """What ``compile_graph()`` returns, reporting its linears at every run somebody listens to."""
    if getattr(_current, "compile", None) is not None:
        return compile_graph()  # compile_fx calls itself
    seen = _current.compile = Compile()
    try:
        compiled = compile_graph()
    finally:
        _current.compile = None
    if seen.passed and not seen.decisions:
        return compiled

    def reporting(*args: Any) -> Any:
        if listening():
            linears_ran(seen.decisions if seen.passed else None)
        return compiled(*args)

    return reporting


def record(decision: Decision) -> None:
    compile_: Compile | None = getattr(_current, "compile", None)
    if compile_ is not None:
        compile_.decisions.append(decision)
    with _LOCK:
        _DECISIONS.append(decision)
        _COUNTERS[decision.outcome] += 1
        if decision.rule:
            _COUNTERS[f"rule.{decision.rule}"] += 1


def count(name: str, by: int = 1) -> None:
    with _LOCK:
        _COUNTERS[name] += by


def report() -> tuple[Decision, ...]:
    """Every decision since the last `clear_report()`, oldest first."""
    with _LOCK:
        return tuple(_DECISIONS)


def counters() -> dict[str, int]:
    """Counts by outcome, rule, run-time packings ("run.packed") and memo hits ("run.hit")."""
    with _LOCK:
        return dict(_COUNTERS)


def clear_report() -> None:
    """Forget all decisions and counts."""
    with _LOCK:
        _DECISIONS.clear()
        _COUNTERS.clear()
