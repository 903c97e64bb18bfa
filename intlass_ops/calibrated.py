"""Weights of a model's linears by a method of calibrate.py or gptq.py: `quantize_`'s slow half.

Here: how calibration data reaches the methods that want it, in bounded memory, with a progress bar.
Not here: the methods, and what replaces the modules (quantize.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import calibrate
from .calibrate import InputStatistics, QuantizedWeight
from .gptq import gptq
from .integrations import experts
from .ops._library import without_autocast

Method = Literal["rtn", "mse", "hqq", "gptq", "awq"]
Wanted = TypeVar("Wanted")
METHODS = ("rtn", "mse", "hqq", "gptq", "awq")
# Hessians held at a time. Layers beyond it wait for another pass over the data, which then sees
# the layers before them quantised.
HESSIAN_BYTES = 2 << 30


def check(op: str, method: str, bits: int, symmetric: bool, calibration: object | None) -> None:
    """ValueError where a method does not exist, does not fit or lacks its data."""
    if method not in METHODS:
        raise ValueError(f"{op}: method={method!r}; expected one of {', '.join(METHODS)}")
    if method == "hqq" and (bits != 4 or symmetric):
        raise ValueError(f"{op}: method='hqq' makes INT4 with zero points; set symmetric=False")
    if method in ("gptq", "awq") and calibration is None:
        raise ValueError(f"{op}: method={method!r} needs calibration data")
    if method in ("rtn", "hqq") and calibration is not None:
        raise ValueError(f"{op}: method={method!r} takes no calibration data")


def weights(
    model: nn.Module,
    linears: Sequence[tuple[str, nn.Linear]],
    method: Method,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    calibration: Sequence[Any] | None,
    replace: Callable[[nn.Linear, QuantizedWeight, Tensor | None], None],
    progress: bool,
) -> None:
    """``replace(linear, weight, channels)`` for each of ``linears``, in their order.

    ``channels`` [K]: what the layer divides its input by (awq), or None.
    """
    done = _bar(f"Quantising ({method})", len(linears), progress)
    with torch.no_grad():
        sized = [((path, linear), linear.in_features) for path, linear in linears]
        for part in [linears] if calibration is None else _passes(sized):
            seen = {} if calibration is None else _statistics(model, part, calibration)
            for path, linear in part:
                w = linear.weight.detach()
                try:
                    with without_autocast(w.device):  # which is for the model's own products
                        found = seen.pop(path, None)
                        q, c = _quantize(w, method, bits, group_size, symmetric, found)
                except ValueError as problem:
                    raise ValueError(f"quantize_: {path}: {problem}") from problem
                replace(linear, q, c)
                next(done)


def expert_weights(
    model: nn.Module,
    mixtures: Sequence[tuple[str, nn.Module]],
    method: Method,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    calibration: Sequence[Any],
    replace: Callable[[nn.Module, dict[str, list[QuantizedWeight]]], None],
    progress: bool,
) -> None:
    """``replace(module, weights of each expert by projection)`` for each of ``mixtures`` in turn.

    Each expert by what the data sends to it; one that sees nothing as "mse" does without data.
    """
    done = _bar(f"Quantising experts ({method})", len(mixtures), progress)
    with torch.no_grad():
        for path, module in mixtures:
            weights = {
                name: experts.weights_of(module, name) for name in experts.projections(module)
            }
            sized = [((name, e), w.shape[2]) for name, w in weights.items() for e in range(len(w))]
            found: dict[str, list[QuantizedWeight]] = {}
            for part in _passes(sized):
                seen = _expert_statistics(model, module, part, calibration)
                for name, expert in part:
                    w, own = weights[name][expert], seen.pop((name, expert))
                    data = own if own.tokens else None
                    how: Method = "gptq" if method == "gptq" and data is not None else "mse"
                    try:
                        with without_autocast(w.device):
                            q, _ = _quantize(w, how, bits, group_size, symmetric, data)
                    except ValueError as problem:
                        where = f"{path}.{name}[{expert}]"
                        raise ValueError(f"quantize_: {where}: {problem}") from problem
                    found.setdefault(name, []).append(q)
            replace(module, found)
            next(done)


def _expert_statistics(
    model: nn.Module, module: nn.Module, part: Sequence[tuple[str, int]], calibration: Sequence[Any]
) -> dict[tuple[str, int], InputStatistics]:
    """Those of each expert's inputs over one pass of the data."""
    weights = {name: experts.weights_of(module, name) for name in experts.projections(module)}
    found = {
        (name, expert): InputStatistics(weights[name].shape[2], device=weights[name].device)
        for name, expert in part
    }

    def see(name: str, expert: int, x: Tensor) -> None:
        if (name, expert) in found:
            found[name, expert].update(x)

    with experts.watched(module, see):
        _run(model, calibration)
    return found


def _quantize(
    w: Tensor,
    method: Method,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    statistics: InputStatistics | None,
) -> tuple[QuantizedWeight, Tensor | None]:
    if method == "hqq":
        return calibrate.hqq(w, group_size=group_size), None
    how: Any = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if method == "gptq" and statistics is not None:
        # Columns by falling importance: the groups' scales are then those of the original weight.
        return gptq(w, statistics.hessian, act_order=True, **how), None
    if method == "awq" and statistics is not None:
        h, mean_abs = statistics.hessian, statistics.mean_abs
        return calibrate.awq(w, h, mean_abs=mean_abs, powers_of_two=True, **how)
    if method == "mse":
        importance = None if statistics is None else statistics.hessian.diagonal()
        return calibrate.mse(w, weights=importance, **how), None
    return calibrate.rtn(w, **how), None


def _passes(wanted: Iterable[tuple[Wanted, int]]) -> Iterator[list[Wanted]]:
    """What has its statistics collected in one pass over the data, of things with their K."""
    part: list[Wanted] = []
    held = 0
    for each, k in wanted:
        size = 4 * k**2
        if part and held + size > HESSIAN_BYTES:
            yield part
            part, held = [], 0
        part.append(each)
        held += size
    if part:
        yield part


def _statistics(
    model: nn.Module, part: Sequence[tuple[str, nn.Linear]], calibration: Sequence[Any]
) -> dict[str, InputStatistics]:
    """Those of each linear's inputs over one pass of the data, by path."""
    found = {
        path: InputStatistics(linear.in_features, device=linear.weight.device)
        for path, linear in part
    }

    def listen(statistics: InputStatistics) -> Callable[..., None]:
        return lambda _, args, named: statistics.update(args[0] if args else named["input"])

    hooks = [
        linear.register_forward_pre_hook(listen(found[path]), with_kwargs=True)
        for path, linear in part
    ]
    try:
        _run(model, calibration)
    finally:
        for hook in hooks:
            hook.remove()
    for path, statistics in found.items():
        if not statistics.tokens:
            raise ValueError(f"quantize_: {path}: no calibration batch reaches this layer")
    return found


def _run(model: nn.Module, calibration: Sequence[Any]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in calibration:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
    finally:
        for module, training in modes:
            module.training = training


def _bar(text: str, total: int, progress: bool) -> Iterator[object]:
    """An iterator to advance once a layer; it draws on a terminal where `rich` is installed."""
    steps: Iterable[object] = range(total)
    if progress and total and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            return iter([*steps, None])
        return _then_none(track(steps, text, total, console=Console(stderr=True)))
    return iter([*steps, None])


def _then_none(steps: Iterable[object]) -> Iterator[object]:
    """One more, so that the last advance of a bar never ends in StopIteration."""
    yield from steps
    yield None
