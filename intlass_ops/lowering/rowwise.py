"""Whether a slice computes the rows of its weight one by one, and the slice for some of them.

Lives here: `cut`, which goes from the weight back to the leaves and says, for each value, along
which dimension it holds the rows of the weight (or that all of it is needed for any row), by the
shapes and the meaning of each operation alone; and `Cut.rows`, the program and the leaves of a
range of rows. An operation that is not known here makes a slice that cannot be cut.
Not here: what rows are good for (blocks.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .program import Evaluation, Operation, Program, as_text, inputs_of, resolve
from .weights import Recipe

# All of a value is needed for any row of the weight.
ALL = -1

# Of a table that bytes may index.
MOST_NUMBERS = 256

# For one operation whose result holds rows along a dimension: the dimension of each value it reads.
Needs = list[tuple[int, int]]
Shapes = Sequence[tuple[int, ...]]


class NotRowwise(Exception):
    """Rows of the weight depend on one another, or on where they are."""


def _v(value: Any) -> int:
    if not isinstance(value, dict) or "v" not in value:
        raise NotRowwise("an operand is no tensor")
    index: int = value["v"]
    return index


def _broadcast(values: Sequence[Any], dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    """Operands that are broadcast against one another, last dimensions first."""
    needs = []
    for index in (each["v"] for each in values if isinstance(each, dict) and "v" in each):
        shape = shapes[index]
        own = dim - len(out) + len(shape)
        needs.append((index, ALL if own < 0 or shape[own] == 1 else own))
    return needs


def _elementwise(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    return _broadcast([*op.args, *op.kwargs["k"].values()], dim, out, shapes)


def _same(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    return [(_v(op.args[0]), dim)]


def _bits(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    if dim == len(out) - 1:
        raise NotRowwise("rows share words")
    return _same(op, dim, out, shapes)


def _viewed(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    """What lies before the rows must stay before them."""
    source = _v(op.args[0])
    before, shape = math.prod(out[:dim]), shapes[source]
    at = (i for i, size in enumerate(shape) if size != 1 and math.prod(shape[:i]) == before)
    own = next(at, None)
    if own is None:
        raise NotRowwise("a view mixes rows with what is before them")
    return [(source, own)]


def _permuted(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    order = list(range(len(out)))
    if op.target == "aten.permute.default":
        order = [each % len(out) for each in op.args[1]]
    else:
        a, b = op.args[1:3] if len(op.args) > 1 else (-2, -1)
        order[a], order[b] = order[b], order[a]
    return [(_v(op.args[0]), order[dim])]


def _dim_of(op: Operation, position: int, size: int) -> int:
    given = op.args[position] if len(op.args) > position else op.kwargs["k"].get("dim", 0)
    return int(given) % size


def _along(position: int, *, lists: bool = False) -> Callable[..., Needs]:
    """Operations that leave every dimension in place and work along another than the rows'."""

    def needs(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
        values = op.args[0] if lists else [each for each in op.args if isinstance(each, dict)]
        indices = [each["v"] for each in values if "v" in each]
        if _dim_of(op, position, len(shapes[indices[0]])) == dim:
            raise NotRowwise("an operation along the rows")
        return [(index, dim) for index in indices]

    return needs


def _slice(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    source = _v(op.args[0])
    if _dim_of(op, 1, len(out)) == dim:
        start, end, step = (*op.args[2:], None, None, None)[:3]
        # An end that is their number is past the end of fewer rows.
        every = end is None or (isinstance(end, int) and end >= shapes[source][dim])
        if start not in (None, 0) or not every or step not in (None, 1):
            raise NotRowwise("some of the rows")
    return [(source, dim)]


def _select(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    source = _v(op.args[0])
    return [(source, dim + (dim >= _dim_of(op, 1, len(shapes[source]))))]


def _select_scatter(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    at = _dim_of(op, 2, len(out))
    if at == dim:
        raise NotRowwise("one of the rows")
    return [(_v(op.args[0]), dim), (_v(op.args[1]), dim - (dim > at))]


def _index(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    indices = [(i, _v(each)) for i, each in enumerate(op.args[1]) if each is not None]
    if len(indices) != 1:
        raise NotRowwise("several indices")
    ((at, index),) = indices
    width = len(shapes[index])
    if at <= dim < at + width:
        return _looked_up(_v(op.args[0]), index, dim - at, shapes)
    return [(_v(op.args[0]), dim if dim < at else dim - width + 1), (index, ALL)]


def _looked_up(table: int, index: int, dim: int, shapes: Shapes) -> Needs:
    if len(shapes[table]) != 1 or shapes[table][0] > MOST_NUMBERS:
        raise NotRowwise("rows that are chosen by an index")
    return [(table, ALL), (index, dim)]


def _index_select(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    if _dim_of(op, 1, len(out)) == dim:
        return _looked_up(_v(op.args[0]), _v(op.args[2]), 0, shapes)
    return [(_v(op.args[0]), dim), (_v(op.args[2]), ALL)]


def _flip(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    if dim in [each % len(out) for each in op.args[1]]:
        raise NotRowwise("rows in another order")
    return _same(op, dim, out, shapes)


def _extreme(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    source = _v(op.args[0])
    rank = len(shapes[source])
    dims = sorted(each % rank for each in (op.args[1] if len(op.args) > 1 else range(rank)))
    for each in () if len(out) == rank else dims:
        dim += each <= dim
    if dim in dims or not dims:
        raise NotRowwise("the extreme of all rows")
    return [(source, dim)]


def _made(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    return []


def _constant(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    raise NotRowwise("a constant of all rows")


def _per_channel(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    own = 0 if op.args[3] % len(out) == dim else ALL
    parameters = [each["v"] for each in op.args[1:3] if isinstance(each, dict)]
    return [(_v(op.args[0]), dim), *((index, own) for index in parameters)]


def _per_group(op: Operation, dim: int, out: tuple[int, ...], shapes: Shapes) -> Needs:
    if dim != 0:
        raise NotRowwise("groups along the rows")
    return [(each["v"], 0) for each in op.args[:3] if isinstance(each, dict)]


_SIZED_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
_UNCHANGED = (
    *("aten.alias.default", "aten.detach.default", "aten.empty_like.default"),
    *("aten.lift_fresh_copy.default", "prims.device_put.default", "getitem"),
)
_FULL = ("aten.empty.memory_format", "aten.full.default", "aten.zeros.default", "aten.ones.default")
_RULES: dict[str, Callable[[Operation, int, tuple[int, ...], Shapes], Needs]] = {
    **dict.fromkeys(_SIZED_VIEWS, _viewed),
    **dict.fromkeys(("aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims"), _viewed),
    **dict.fromkeys(_FULL, _made),
    **dict.fromkeys(_UNCHANGED, _same),
    **dict.fromkeys(("aten.permute.default", "aten.transpose.int", "aten.t.default"), _permuted),
    **dict.fromkeys(("aten.amax.default", "aten.amin.default"), _extreme),
    **dict.fromkeys(("aten.split_with_sizes.default", "aten.split.Tensor"), _along(2)),
    "aten.expand.default": lambda op, dim, out, shapes: _broadcast(op.args[:1], dim, out, shapes),
    "aten.copy.default": _elementwise,
    "constant": _constant,
    "aten.view.dtype": _bits,
    "aten.cat.default": _along(1, lists=True),
    "aten.slice.Tensor": _slice,
    "aten.slice_scatter.default": _along(2),
    "aten.select.int": _select,
    "aten.select_scatter.default": _select_scatter,
    "aten.index.Tensor": _index,
    "aten.index_select.default": _index_select,
    "aten.flip.default": _flip,
    "quantized_decomposed.dequantize_per_tensor.default": _elementwise,
    "quantized_decomposed.dequantize_per_tensor.tensor": _elementwise,
    "quantized_decomposed.dequantize_per_channel.default": _per_channel,
    "quantized_decomposed.dequantize_per_channel_group.default": _per_group,
}
_RESIZED = (*_SIZED_VIEWS, "aten.expand.default", *_FULL)


@dataclass(frozen=True)
class Cut:
    """dims: for each value, the dimension that holds the rows, ALL, or None if nothing needs it.
    sizes: of that dimension. For stacked weights (experts), rows are whole weights."""

    recipe: Recipe
    dims: tuple[int | None, ...]
    sizes: tuple[int, ...]

    def rows(self, leaves: Sequence[Tensor], start: int, rows: int) -> tuple[Recipe, list[Tensor]]:
        """The slice for rows [start, start + rows) alone; start a multiple of `step`."""
        small, n, batch = _resized(self, rows), self.recipe.n, self.recipe.batch
        n, batch = (rows, 1) if batch == 1 else (n, rows)
        small_recipe = replace(self.recipe, program=small, n=n, batch=batch)
        return small_recipe, [self._part(i, leaf, start, rows) for i, leaf in enumerate(leaves)]

    @property
    def all(self) -> int:
        return self.recipe.n if self.recipe.batch == 1 else self.recipe.batch

    @property
    def step(self) -> int:
        """Ranges of rows must start at multiples of this, or some value holds parts of a row."""
        return math.lcm(*(self.all // math.gcd(self.all, size) for size in self.sizes if size > 1))

    def size(self, index: int, rows: int) -> int:
        return self.sizes[index] * rows // self.all

    def _part(self, index: int, leaf: Tensor, start: int, rows: int) -> Tensor:
        dim = self.dims[index]
        if not _held(dim):
            return leaf
        part = leaf.narrow(dim, self.size(index, start), self.size(index, rows))
        # A view that the whole leaf allows.
        return part.contiguous() if leaf.is_contiguous() else part


def _held(dim: int | None) -> TypeGuard[int]:
    return dim is not None and dim != ALL


@functools.lru_cache(maxsize=1024)
def _resized(cut: Cut, rows: int) -> Program:
    program = cut.recipe.program
    operations = []
    for i, op in enumerate(program.operations, start=program.leaves):
        args, dim = op.args, cut.dims[i]
        if _held(dim) and op.target in _RESIZED:
            at = 0 if op.target in _FULL else 1
            sizes = list(args[at])
            sizes[dim] = sizes[dim] if sizes[dim] == -1 else cut.size(i, rows)
            args = [*args[:at], sizes, *args[at + 1 :]]
        operations.append((op.target, args, op.kwargs))
    return Program(as_text(program.leaves, operations))


def cut(recipe: Recipe, leaves: Sequence[Tensor]) -> Cut | None:
    """How the slice falls apart into rows, or None."""
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return _cut(recipe, tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves))


@functools.lru_cache(maxsize=1024)
def _cut(recipe: Recipe, metas: tuple[Any, ...]) -> Cut | None:
    program = recipe.program
    try:
        blank = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for shape, stride, dtype in metas
        ]
        values = Evaluation(program, blank).values
        shapes = [_shape(value) for value in values]
        dims = _needed(recipe, shapes)
    except Exception:
        # Also operations that know no meta tensors: the weight is looked at as a whole.
        return None
    sizes = [shapes[i][dim] if _held(dim) else 1 for i, dim in enumerate(dims)]
    return Cut(recipe, tuple(dims), tuple(sizes))


def _shape(value: Any) -> tuple[int, ...]:
    first = value[0] if isinstance(value, (list, tuple)) else value
    return tuple(first.shape)


def _needed(recipe: Recipe, shapes: Shapes) -> list[int | None]:
    program = recipe.program
    dims: list[int | None] = [None] * len(shapes)
    dims[program.result] = len(shapes[-1]) - (
        3 if recipe.batch > 1 else 1 if recipe.layout == "kn" else 2
    )
    if recipe.batch > 1 and shapes[-1][-3] != recipe.batch:
        raise NotRowwise("weights that are stacked otherwise")
    for i in range(program.result, program.leaves - 1, -1):
        dim, op = dims[i], program.operations[i - program.leaves]
        if dim is None:
            continue
        if dim == ALL:
            needs = [(each, ALL) for each in inputs_of(program)[i - program.leaves]]
        else:
            needs = _rule(op)(op, dim, shapes[i], shapes)
        for index, own in needs:
            if dims[index] not in (None, own):
                raise NotRowwise("a value is needed in two ways")
            dims[index] = own
    return dims


def _rule(op: Operation) -> Callable[[Operation, int, tuple[int, ...], Shapes], Needs]:
    rule = _RULES.get(op.target)
    if rule is None and torch.Tag.pointwise in getattr(resolve(op.target), "tags", ()):
        rule = _elementwise
    if rule is None:
        raise NotRowwise(f"{op.target} is not known")
    return rule
