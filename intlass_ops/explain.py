"""Which kernel ran and why: `explain(...)` collects it, `strict()` forbids fallbacks.

The ops report every dispatch through `record`, compiled graphs their linears through `linears_ran`;
both cost one global look-up while nobody listens. Not here: the choices themselves (config/,
lowering/).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .errors import FallbackError

if TYPE_CHECKING:
    from .lowering.records import Decision


@dataclass(frozen=True)
class Dispatch:
    """One call of a product: what it was, what ran it, and why that.

    >>> from intlass_ops import pack_int4, matmul_int4_bf16_tn
    >>> w, one = pack_int4(torch.ones(8, 16, dtype=torch.int8)), torch.tensor(1.0)
    >>> call = explain(matmul_int4_bf16_tn, torch.ones(2, 16), w, one).dispatches[0]
    >>> call.op, call.scheme, (call.m, call.n, call.k), call.fallback
    ('matmul_int4_bf16_tn', 'w4a16', (2, 8, 16), False)
    """

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
    """One run: every product in order, and every linear of the compiled graphs; prints as tables.

    ``linears``: a `lowering.Decision` for each matrix product with a constant weight: the module's
    ``path``, ``outcome`` ("swapped", "declined", "dense"), ``scheme``, ``shape``, ``reason`` and
    ``bound`` (in the table "error <="): the result differs from the graph's own by at most that,
    times the sum over k of |x| (|q| + |zero|) |scale|, plus |bias|.
    ``unknown``: graphs that came from PyTorch's caches, which keep no decisions.
    ``unwrapped``: weights of a compiled model that PyTorch checks at every call (torchao's).

    >>> explanation = explain(max, 1, 2)
    >>> explanation.result, explanation.dispatches
    (2, [])
    >>> print(explanation)
    no intlass product ran
    """

    result: Any = None
    dispatches: list[Dispatch] = field(default_factory=list)
    linears: list[Decision] = field(default_factory=list)
    unknown: int = 0
    unwrapped: int = 0

    @property
    def fallbacks(self) -> list[Dispatch]:
        return [d for d in self.dispatches if d.fallback]

    @property
    def declined(self) -> list[Decision]:
        """The quantised linears of compiled graphs that were left as they were."""
        return [d for d in self.linears if d.outcome == "declined"]

    def __str__(self) -> str:
        parts = [self._linears(), self._calls()]
        if self.unknown:
            parts.append(
                f"{self.unknown} compiled graphs came from PyTorch's caches, which keep no "
                "decisions: call torch.compiler.reset() and explain() inside strict()"
            )
        if self.unwrapped:
            parts.append(
                f"weights that are tensor subclasses, which PyTorch checks at every call: "
                f"{self.unwrapped}; intlass_ops.prepare_(model) before torch.compile saves that"
            )
        return "\n\n".join(filter(None, parts)) or "no intlass product ran"

    def _linears(self) -> str:
        if not self.linears:
            return ""
        header = ("linear", "N", "K", "group", "outcome", "scheme", "error <=", "kernel", "why")
        rows = []
        for each in dict.fromkeys(self.linears):
            n, k = each.shape or ("", "")
            group = each.group_size or ""
            kernel = self._kernel_of(each)
            where = each.path or each.node
            bound = "" if each.bound is None else f"{each.bound:.1e}"
            sizes = (str(n), str(k), str(group))
            rows.append((where, *sizes, each.outcome, each.scheme, bound, kernel, each.reason))
        return _table(header, rows)

    def _kernel_of(self, linear: Decision) -> str:
        """By size: a graph runs its linears outside their modules, fused ones as one GEMM."""
        if linear.outcome != "swapped" or linear.shape is None:
            return "-"
        n, k = linear.shape
        kernels = dict.fromkeys(
            f"{d.kernel}, fused to N={d.n}"
            for d in self.dispatches
            if (d.n, d.k) == (linear.within, k)
        )
        if not kernels:
            kernels = dict.fromkeys(d.kernel for d in self.dispatches if (d.n, d.k) == (n, k))
        if not kernels:
            wider = (d for d in self.dispatches if d.k == k and d.n > n)
            kernels = dict.fromkeys(f"{d.kernel}, fused to N={d.n}" for d in wider)
        return " or ".join(kernels) or "in a captured graph"

    def _calls(self) -> str:
        if not self.dispatches:
            return ""
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
        return _table(header, rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)


_collecting: list[Explanation] = []
_modules: list[str] = []
_strict = 0


def listening() -> bool:
    """Whether a dispatch has to be recorded at all."""
    return bool(_collecting or _strict)


def is_strict() -> bool:
    return _strict > 0


def linears_ran(linears: Sequence[Decision] | None) -> None:
    """A compiled graph runs with these linears, None if unknown. Raises inside `strict()`."""
    for explanation in _collecting:
        explanation.linears.extend(linears or ())
        explanation.unknown += linears is None
    if not _strict:
        return
    if linears is None:
        raise FallbackError(
            "a compiled graph came from PyTorch's caches, which do not say what became of its "
            "linears: call torch.compiler.reset() and compile inside strict()"
        )
    declined = dict.fromkeys(d for d in linears if d.outcome == "declined")
    if declined:
        lines = "\n  ".join(map(str, declined))
        raise FallbackError(f"{len(declined)} quantised linears would run as they are:\n  {lines}")


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
    """Run ``fn(*args, **kwargs)`` and report each quantised linear: kernel, configuration, reason.

    Under ``torch.compile(model, backend="intlass")`` also each linear of the original model: its
    module, and whether it was swapped and for which kernel, or declined and why.

    ``fn``: any callable; for a torch.nn.Module (or a compiled one) each dispatch carries the path
    of the module it came from, as far as modules are called one by one (inside a compiled graph
    they are not). Returns an `Explanation`: ``print`` it, or read ``.dispatches``, ``.fallbacks``
    ``.linears``, ``.declined``
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
    # A compiled graph tells its linears before it runs, and packs them while it does.
    explanation.linears = [each.as_stored() for each in explanation.linears]
    explanation.unwrapped = _subclasses(fn)
    return explanation


def _subclasses(fn: Any) -> int:
    """Parameters of a compiled module that are tensor subclasses."""
    model = getattr(fn, "_orig_mod", None)
    parameters = () if model is None else model.parameters()
    return sum(hasattr(each, "__tensor_flatten__") for each in parameters)


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
    """A context in which whatever would run without one of our kernels raises FallbackError.

    That is an op call that falls back, and a compiled graph (`backend="intlass"` or `enable()`)
    with a quantised linear that was declined; the message names module, scheme, sizes and reason.
    A graph that PyTorch's caches served before the context was entered is refused too: they do not
    keep what was decided. Compile inside the context, which leaves those caches alone.

    >>> import torch, intlass_ops
    >>> ones = torch.full((1, 16), 0x22, dtype=torch.uint8)  # FP4 has no fast kernel on a CPU
    >>> scale = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    >>> with intlass_ops.strict():
    ...     intlass_ops.matmul_ada_mxf4_bf16_tn(ones, ones, scale, scale, torch.tensor(1.0))
    Traceback (most recent call last):
    intlass_ops.errors.FallbackError: matmul_ada_mxf4_bf16_tn: w4a4 M=1 N=1 K=32 group_size=32 ...
    """
    global _strict
    _strict += 1
    try:
        yield
    finally:
        _strict -= 1
