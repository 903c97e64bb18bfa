"""Measuring a large weight a few rows at a time, so that its proof needs little memory.

Lives here: `measure_rows` and `first_rows`, which cut the leaves of a slice along N and write the
sizes in its program anew. Nothing is taken on trust: a piece must give the very rows of the whole
weight, bit for bit, or the weight is looked at as a whole. Not here: measuring (weights.py).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .program import Evaluation, NotASlice, Program
from .weights import Measured, NotAffine, Recipe, as_nk, evaluate_real, measure

# A proof takes up to 56 bytes an element.
BLOCK_ELEMENTS = 1 << 21
# A multiple of the rows that share one word of a weight packed along N.
ROW_STEP = 64
_PACKED = (2, 4, 8, 16, 32)
# Operations whose integer arguments may be sizes.
_SIZED = ("empty", "expand", "full", "new_", "ones", "repeat", "reshape", "slice", "view", "zeros")
# Rows that depend on one another, or sizes that mean something else. Whatever is wrong with the
# weight itself, looking at all of it will say.
_MISFITS = (NotAffine, NotASlice, RuntimeError, IndexError, ValueError)


def measure_rows(recipe: Recipe, leaves: Sequence[Tensor]) -> Measured:
    """`measure` on real leaves, in blocks where the weight is large and falls apart into rows."""
    rows = max(BLOCK_ELEMENTS // max(recipe.k, 1) // ROW_STEP, 1) * ROW_STEP
    if rows < recipe.n and _may_be_cut(recipe, leaves):
        found = _in_blocks(recipe, leaves, rows)
        if found is not None:
            return found
    return measure(evaluate_real(recipe, leaves), recipe)


def first_rows(
    recipe: Recipe, leaves: Sequence[Tensor], rows: int
) -> tuple[Recipe, list[Tensor]] | None:
    """The slice for its first rows only, if it gives what the whole one does, there and at the end.

    None where it falls apart in no such way, or is small anyway.
    """
    if recipe.n < 2 * rows or not _may_be_cut(recipe, leaves):
        return None
    try:
        whole = _whole(recipe, leaves)
    except Exception:
        # The caller finds the same, and says so.
        return None
    cut = _find(recipe, leaves, whole, rows)
    return None if cut is None else cut.rows(leaves, 0, rows)


def _may_be_cut(recipe: Recipe, leaves: Sequence[Tensor]) -> bool:
    """An index of the whole may lie outside a part, which on a GPU cannot be tried."""
    on_gpu = any(leaf.is_cuda for leaf in leaves)
    return recipe.batch == 1 and not (on_gpu and recipe.program.indexes)


@dataclass(frozen=True)
class Cut:
    """One way to tell the sizes that hold N from others that merely equal it.

    which: of several such sizes in a shape, 0 the first, -1 the last or None all hold N.
    packed: a size that is N over a power of two holds N too.
    """

    recipe: Recipe
    which: int | None
    packed: bool

    def rows(self, leaves: Sequence[Tensor], start: int, rows: int) -> tuple[Recipe, list[Tensor]]:
        small = replace(self.recipe, program=self._resized(rows), n=rows)
        return small, [self._part(leaf, start, rows) for leaf in leaves]

    def _size(self, value: int, rows: int) -> int:
        n = self.recipe.n
        if 0 < value < 1 << 40 and value % n == 0:
            return value // n * rows
        words = (p for p in _PACKED if self.packed and value * p == n and rows % p == 0)
        word = next(words, None)
        return value if word is None else rows // word

    def _sizes(self, values: Sequence[int], rows: int) -> list[int]:
        at = [i for i, each in enumerate(values) if self._size(each, rows) != each]
        at = at if self.which is None or not at else [at[self.which]]
        return [self._size(each, rows) if i in at else each for i, each in enumerate(values)]

    def _resized(self, rows: int) -> Program:
        def plain(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def sized(value: Any) -> Any:
            if isinstance(value, list) and value and all(plain(each) for each in value):
                return self._sizes(value, rows)
            return self._size(value, rows) if plain(value) else value

        leaves, operations = json.loads(self.recipe.program.text)
        operations = [
            (name, [sized(each) for each in args] if any(w in name for w in _SIZED) else args, rest)
            for name, args, rest in operations
        ]
        return Program(json.dumps([leaves, operations], separators=(",", ":"), sort_keys=True))

    def _part(self, leaf: Tensor, start: int, rows: int) -> Tensor:
        sizes = list(leaf.shape)
        new = replace(self, which=self.which or 0)._sizes(sizes, rows)
        for dim, (before, after) in enumerate(zip(sizes, new, strict=True)):
            if before != after:
                return leaf.narrow(dim, start * before // self.recipe.n, after)
        return leaf


def _whole(recipe: Recipe, leaves: Sequence[Tensor]) -> Tensor:
    return as_nk(Evaluation(recipe.program, leaves, {recipe.program.result}).weight(), recipe)


def _find(recipe: Recipe, leaves: Sequence[Tensor], whole: Tensor, rows: int) -> Cut | None:
    """The first way to cut that gives the whole's own rows, at the end and at the start."""
    for packed, which in itertools.product((False, True), (0, -1, None)):
        cut = Cut(recipe, which, packed)
        try:
            pieces = [(start, *cut.rows(leaves, start, rows)) for start in (recipe.n - rows, 0)]
            if all(
                torch.equal(_whole(small, part), whole[start : start + rows])
                for start, small, part in pieces
            ):
                return cut
        except _MISFITS:
            continue
    return None


def _in_blocks(recipe: Recipe, leaves: Sequence[Tensor], rows: int) -> Measured | None:
    parts = []
    try:
        whole = _whole(recipe, leaves)
        cut = _find(recipe, leaves, whole, ROW_STEP)
        if cut is None:
            return None
        for start in range(0, recipe.n, rows):
            small, part = cut.rows(leaves, start, min(rows, recipe.n - start))
            evaluation = evaluate_real(small, part)
            if not torch.equal(as_nk(evaluation.weight(), small), whole[start : start + small.n]):
                return None
            parts.append(measure(evaluation, small))
            if parts[-1].order is not None:
                return None
    except _MISFITS:
        return None
    group = math.gcd(*(part.group_size for part in parts))
    codes = torch.cat([part.codes for part in parts])
    scales, zeros = (
        torch.cat(
            [getattr(each, name).repeat_interleave(each.group_size // group, 1) for each in parts]
        )
        for name in ("scales", "zeros")
    )
    return Measured(codes, scales, zeros, group, None)
