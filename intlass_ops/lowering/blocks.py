"""Measuring a large weight a few rows at a time, so that its proof needs little memory.

Lives here: `measured` and `first_rows`: how many rows at a time. Not here: whether and how a slice
falls apart into rows (rowwise.py), measuring (weights.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import rowwise
from .program import Evaluation, dependents, device_of, needed_for
from .weights import Measured, NotGrouped, Recipe, evaluate_real, measure

# A proof takes up to 90 bytes an element.
BLOCK_ELEMENTS = 1 << 21
# Larger ones take fewer launches; a quarter of a gigabyte is what a model of 8 B may take for it.
GPU_BLOCK_ELEMENTS = 7 << 19
# Where one kernel proves, a block takes 45, and only the first rows are measured.
FIRST_ELEMENTS = 1 << 20
TAKEN_ELEMENTS = 6 << 20

Take = Callable[[Evaluation, Recipe], bool]


class ColumnsDiffer(Exception):
    """The order of columns that the first rows have is not that of all rows."""


def measured(
    recipe: Recipe, leaves: Sequence[Tensor], take: Take | None = None
) -> Iterator[Measured]:
    """Rows after rows of a weight on its real leaves; all at once where it does not fall apart.

    Rows that ``take`` answers for are left out.
    """
    cut = rowwise.cut(recipe, leaves)
    if cut is None:
        # Often the codes alone are packed across rows: what follows them falls apart.
        part = from_codes(recipe, leaves)
        cut = rowwise.cut(*part)
        if cut is None:
            yield from whole(recipe, leaves)
            return
        recipe, leaves = part
    if recipe.batch > 1:
        for start in range(recipe.batch):
            yield from measured(*cut.rows(leaves, start, 1), take)
        return
    order, start = None, 0
    while start < recipe.n:
        rows = _rounded(_elements(leaves, start, take) // max(recipe.k, 1), cut.step)
        small, rest = cut.rows(leaves, start, min(rows, recipe.n - start))
        evaluation = evaluate_real(small, rest)
        if take is None or not take(evaluation, small):
            try:
                found = measure(evaluation, small, order=order)
            except NotGrouped as problem:
                if order is None:
                    raise
                raise ColumnsDiffer from problem
            if start and found.order is not order:
                raise ColumnsDiffer
            order = found.order
            yield found
        start += rows


def _elements(leaves: Sequence[Tensor], start: int, take: Take | None) -> int:
    if take is not None:
        return TAKEN_ELEMENTS if start else FIRST_ELEMENTS
    return GPU_BLOCK_ELEMENTS if device_of(leaves).type == "cuda" else BLOCK_ELEMENTS


def whole(recipe: Recipe, leaves: Sequence[Tensor], take: Take | None = None) -> Iterator[Measured]:
    """The same, all rows at once."""
    yield measure(evaluate_real(recipe, leaves), recipe)


def downstream(recipe: Recipe) -> tuple[Recipe, list[int]]:
    """The part of a slice that depends on the codes, as a slice of its own, and which values of
    the whole, the codes among them, are its leaves."""
    program = recipe.program
    after = dependents(program, recipe.codes)
    read = sorted(needed_for(program, recipe.codes) - set(after))
    small = program.part(read, after)
    return replace(recipe, program=small, codes=read.index(recipe.codes)), read


def from_codes(recipe: Recipe, leaves: Sequence[Tensor]) -> tuple[Recipe, list[Tensor]]:
    """The same with those values, computed."""
    small, read = downstream(recipe)
    program, given = recipe.program, range(recipe.program.leaves)
    after = set(dependents(program, recipe.codes))
    before = [i for i in range(program.leaves, max(read) + 1) if i not in after]
    place = {index: i for i, index in enumerate([*given, *before])}
    values: Sequence[Any] = leaves
    if before:
        kept = {place[index] for index in read}
        values = Evaluation(program.part(given, before), leaves, kept).values
    return small, [values[place[index]] for index in read]


def first_rows(
    recipe: Recipe, leaves: Sequence[Tensor], rows: int
) -> tuple[Recipe, list[Tensor]] | None:
    """The slice for its first rows only, of the first of stacked weights; None where it falls apart
    in no such way, or is small."""
    cut = rowwise.cut(recipe, leaves)
    if cut is None:
        return None
    if recipe.batch > 1:
        first = cut.rows(leaves, 0, 1)
        return first_rows(*first, rows) or first
    rows = _rounded(rows, cut.step)
    return cut.rows(leaves, 0, rows) if recipe.n >= 2 * rows else None


def _rounded(rows: int, step: int) -> int:
    return max(rows // step, 1) * step
