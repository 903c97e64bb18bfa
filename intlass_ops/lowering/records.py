"""What the pass decided about each matrix product, and counters for tests and `explain`.

Lives here: the `Decision` record, the process-wide log and its counters. Not here: how a
decision is reached (weights.py, activations.py, linears.py) or printed (intlass_ops/explain.py).
A graph served by PyTorch's caches is not passed over again, so it adds no decisions: the
run-time counters (runtime.py) still count every call and every packing.

`watch` ties the decisions of one compile to the compiled graph, so that they are told to
`explain()` and `strict()` whenever it runs.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .. import lut4
from ..explain import linears_ran, listening

SWAPPED = "swapped"
DECLINED = "declined"
DENSE = "dense"
META = "intlass_decision"  # of a node: the Decision that made it


@dataclass(frozen=True)
class Decision:
    """One matrix product of one compiled graph: where it was and what became of it.

    bound: the result differs from the graph's own by at most bound times the sum over k of
    |x| (|q| + |zero|) |scale|, plus |bias| and |residual|; to first order, with fp32 sums on both
    sides.
    recipe: how its weight is read from the leaves, for linears that are packed.
    within: N of the GEMM that it is a part of, where compiling told.

    >>> print(Decision('mm', 'mlp.up', 'mm', 'declined', 'quantised', 'a table', shape=(64, 32)))
    mlp.up [N=64, K=32]: declined quantised (a table)
    """

    node: str
    path: str
    gemm: str
    outcome: str
    scheme: str
    reason: str
    rule: str = ""
    shape: tuple[int, int] | None = None
    group_size: int | None = None
    bound: float | None = None
    within: int | None = None
    recipe: str = field(default="", repr=False, compare=False)

    def as_stored(self) -> Decision:
        """The same with the bits its weights have: codes of 4 bits may come in 8-bit tensors.

        That is known when a weight is packed; a weight that was not affine then is dense.
        """
        with _LOCK:
            kinds = {each.kind: each.reason for each in _STORED.get(self.recipe, ())}
        if not kinds:
            return self
        dense = kinds.pop("dense", None)
        if not kinds:
            return replace(
                self, outcome=DECLINED, scheme="quantised", reason=f"its values: {dense}"
            )
        reason = self.reason if dense is None else f"{self.reason}; some stay dense: {dense}"
        if "fp8" in kinds:
            return replace(self, reason=reason)
        if len(kinds) == 1 and (table := next(iter(kinds))) in lut4.TABLES:
            return replace(self, scheme=f"{table}a16", reason=reason)
        bits = 4 if set(kinds) == {"int4"} else 8
        activations = self.scheme.rpartition("a")[2]
        return replace(self, scheme=f"w{bits}a{activations}", reason=reason)

    def __str__(self) -> str:
        where = self.path or self.node
        size = f" [N={self.shape[0]}, K={self.shape[1]}]" if self.shape else ""
        return f"{where}{size}: {self.outcome} {self.scheme} ({self.reason})"


_LOCK = threading.Lock()
# Bounded: a server that compiles for weeks must not grow without end.
_DECISIONS: deque[Decision] = deque(maxlen=65536)
_COUNTERS: Counter[str] = Counter()
# By recipe: its weights that are packed now (storage.Packed).
_STORED: dict[str, weakref.WeakSet[Any]] = {}


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


def amend(before: Decision, after: Decision) -> None:
    """A later pass went on with what was decided."""
    compile_: Compile | None = getattr(_current, "compile", None)
    with _LOCK:
        for decisions in (_DECISIONS, [] if compile_ is None else compile_.decisions):
            for i in range(len(decisions) - 1, -1, -1):
                if decisions[i] is before:
                    decisions[i] = after
                    break


def stored(recipe: str, packed: Any) -> None:
    """A weight of this recipe is packed now, for as long as `packed` lives."""
    with _LOCK:
        _STORED.setdefault(recipe, weakref.WeakSet()).add(packed)


def count(name: str, by: int = 1) -> None:
    with _LOCK:
        _COUNTERS[name] += by


def report() -> tuple[Decision, ...]:
    """Every decision since the last `clear_report()`, oldest first.

    >>> clear_report()
    >>> report()
    ()
    """
    with _LOCK:
        decisions = tuple(_DECISIONS)
    return tuple(each.as_stored() for each in decisions)


def counters() -> dict[str, int]:
    """Counts by outcome, rule, run-time packings ("run.packed") and memo hits ("run.hit")."""
    with _LOCK:
        return dict(_COUNTERS)


def clear_report() -> None:
    """Forget all decisions and counts.

    >>> clear_report()
    >>> counters()
    {}
    """
    with _LOCK:
        _DECISIONS.clear()
        _COUNTERS.clear()
