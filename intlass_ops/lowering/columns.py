"""Scales along K, which no group holds: w[n, k] = (q[n, k] - z[n, g]) * s[n, g] * c[k].

They go to the activations (SINQ's second scale, smoothing that nobody folded, a weight that is
used along its rows). Lives here: `candidates`, the values of a slice that may be c, `without`, the
slice with one number in place of all of c, and `of_activations`, what x is multiplied by. Not here:
whether it is so (probing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from .program import Evaluation, Program, as_text, dependents, renumbered
from .weights import Recipe, as_nk

if TYPE_CHECKING:
    from .editor import Editor

aten: Any = torch.ops.aten
# For any values, what these make of c is a multiple of c, or of 1 / c.
_PROPORTIONAL = (
    *("aten._to_copy.", "aten._unsafe_view.", "aten.alias.", "aten.clone.", "aten.detach."),
    *("aten.div.Tensor", "aten.expand.", "aten.mul.Tensor", "aten.permute.", "aten.reshape."),
    *("aten.squeeze.", "aten.t.", "aten.transpose.", "aten.unsqueeze.", "aten.view.default"),
    "prims.convert_element_type.",
)


@dataclass(frozen=True)
class Columns:
    """c is value `index` of a slice. divides: the weight is divided by it."""

    index: int
    divides: bool


def candidates(evaluation: Evaluation, k: int) -> Iterator[Columns]:
    """What may scale the columns, nearest to the weight first."""
    program = evaluation.program
    for index in range(program.result - 1, -1, -1):
        value = evaluation.values[index]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != k:
            continue
        if value.dtype.itemsize == 1:
            continue  # few operations know floats of 8 bits: what they are cast to is next to them
        after = dependents(program, index)
        path = [program.operations[i - program.leaves] for i in after]
        floats = all(evaluation.values[i].is_floating_point() for i in after)
        if path and floats and all(op.target.startswith(_PROPORTIONAL) for op in path):
            yield Columns(index, divides=False)
            if any(op.target == "aten.div.Tensor" for op in path):
                yield Columns(index, divides=True)


def _extreme(columns: Columns) -> Any:
    """The number in place of c makes what x is multiplied by at most 1: no overflow in float16."""
    return aten.amin.default if columns.divides else aten.amax.default


def without(program: Program, columns: Columns, c: Tensor) -> Program:
    """The slice with the extreme of |c| in place of each of its elements."""
    first, at = program.leaves, columns.index
    place: dict[int, Any] = {i: {"v": i} for i in range(first)}
    operations: list[tuple[str, Any, Any]] = []

    def add(target: str, *args: Any) -> dict[str, int]:
        operations.append((target, list(args), {"k": {}}))
        return {"v": first + len(operations) - 1}

    def replaced(value: Any) -> Any:
        size = add("aten.abs.default", value)
        one = add(str(_extreme(columns)), size)
        some = add("aten.clamp_min.default", one, torch.finfo(c.dtype).smallest_normal)
        return add("aten.expand.default", some, list(c.shape))

    if at < first:
        place[at] = replaced(place[at])
    for index, op in enumerate(program.operations, start=first):
        args, kwargs = renumbered(op.args, place), renumbered(op.kwargs, place)
        operations.append((op.target, args, kwargs))
        place[index] = {"v": first + len(operations) - 1}
        if index == at:
            place[index] = replaced(place[index])
    return Program(as_text(first, operations))


def proved(evaluation: Evaluation, recipe: Recipe, columns: Columns) -> bool:
    """Whether c scales the columns of the weight, one after the other, and nothing else."""
    c = evaluation.values[columns.index].double()
    least = torch.finfo(evaluation.values[columns.index].dtype).smallest_normal
    one = _extreme(columns)(c.abs()).clamp_min(least)
    some = as_nk(evaluation.with_codes(columns.index, one.expand(c.shape)), recipe)
    every = as_nk(evaluation.with_codes(columns.index, c), recipe)
    ratio = (one / c if columns.divides else c / one).flatten()
    return torch.allclose(every.double(), some.double() * ratio, rtol=1e-9, atol=0)


def of_activations(edit: Editor, columns: Columns, c: Node, x: Node, *, flipped: bool) -> Node:
    """x[.., K], or x[K, M] if flipped, times the columns' scales, in the dtype of x."""
    cast = torch.ops.prims.convert_element_type.default
    dtype = c.meta["val"].dtype
    one = edit.call(_extreme(columns), edit.call(aten.abs.default, c))
    one = edit.call(aten.clamp_min.default, one, torch.finfo(dtype).smallest_normal)
    c, one = (edit.call(cast, each, torch.float32) for each in (c, one))
    ratio = edit.call(aten.div.Tensor, *((one, c) if columns.divides else (c, one)))
    ratio = edit.call(aten.reshape.default, ratio, [-1, 1] if flipped else [-1])
    wide = edit.call(aten.mul.Tensor, edit.call(cast, x, torch.float32), ratio)
    return edit.call(cast, wide, x.meta["val"].dtype)
