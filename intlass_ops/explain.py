"""Which kernel ran and why: `explain(...)` collects it, `strict()` forbids fallbacks.

The ops report every dispatch through `record`, which costs one global look-up while nobody listens.
Not here: the choice itself (config.py) and the report of graph rewrites (lowering/).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import FallbackError


@dataclass(frozen=True)
class Dispatch:
    """One op call: what it was, what ran it, and why that."""

    module: str  # path of the innermost module that was running, "" outside any
    op: str
    scheme: str
    m: int
    n: int
    k: int
    group_size: int
    kernel: str
    reason: str
    fallback: bool


@dataclass
class Explanation:
    """All dispatches of one run, in order; prints as a table."""

    result: Any = None
    dispatches: list[Dispatch] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[Dispatch]:
        return [d for d in self.dispatches if d.fallback]

    def __str__(self) -> str:
        if not self.dispatches:
            return "no intlass op ran"
        header = ("module", "op", "scheme", "M", "N", "K", "group", "kernel", "calls", "why")
        rows = [
            (
                d.module or "-",
                d.op,
                d.scheme,
                *(str(v) for v in (d.m, d.n, d.k, d.group_size)),
                d.kernel,
                str(calls),
                d.reason,
            )
            for d, calls in Counter(self.dispatches).items()
        ]
        widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
        lines = (
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (header, *rows)
        )
        return "\n".join(line.rstrip() for line in lines)


_collecting: list[Explanation] = []
_modules: list[str] = []
_strict = 0


def listening() -> bool:
    """Whether a dispatch has to be recorded at all."""
    return bool(_collecting or _strict)


def record(
    op: str,
    scheme: str,
    sizes: tuple[int, int, int, int],
    kernel: str,
    reason: str,
    *,
    fallback: bool = False,
) -> None:
    """Report one dispatch; ``sizes`` is (M, N, K, group_size). Raises inside `strict()`."""
    if not listening():
        return
    m, n, k, group_size = (int(s) for s in sizes)
    d = Dispatch(
        _modules[-1] if _modules else "",
        op,
        scheme,
        m,
        n,
        k,
        group_size,
        kernel,
        reason,
        fallback,
    )
    for explanation in _collecting:
        explanation.dispatches.append(d)
    if fallback and _strict:
        where = f" in {d.module}" if d.module else ""
        raise FallbackError(
            f"{op}{where}: {scheme} M={m} N={n} K={k} group_size={group_size} "
            f"would run as {kernel}: {reason}"
        )


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``fn(*args, **kwargs)`` and report every intlass op: kernel, configuration, reason.

    ``fn``: any callable; for a torch.nn.Module (or a compiled one) each dispatch carries the path
    of the module it came from, as far as modules are called one by one (inside a compiled graph
    they are not). Returns an `Explanation`: ``print`` it, or read ``.dispatches``, ``.fallbacks``
    and ``.result``.

    >>> import torch, intlass_ops
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 16))
    >>> intlass_ops.quantize_(model, intlass_ops.Int4WeightOnly(group_size=128))
    >>> explanation = explain(model, torch.ones(1, 128))
    >>> [(d.module, d.scheme) for d in explanation.dispatches]
    [('0', 'w4a16')]
    """
    explanation = Explanation()
    _collecting.append(explanation)
    try:
        with _module_paths(fn):
            explanation.result = fn(*args, **kwargs)
    finally:
        _collecting.remove(explanation)
    return explanation


@contextlib.contextmanager
def _module_paths(fn: Callable[..., Any]) -> Iterator[None]:
    def leave(*_: object) -> None:
        _modules.pop()

    handles = []
    if isinstance(fn, torch.nn.Module) and not hasattr(fn, "_orig_mod"):
        for name, module in fn.named_modules():
            handles.append(
                module.register_forward_pre_hook(lambda _m, _a, name=name: _modules.append(name))
            )
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _modules.clear()


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """A context in which any op that would run without one of our kernels raises FallbackError."""
    global _strict
    _strict += 1
    try:
        yield
    finally:
        _strict -= 1
