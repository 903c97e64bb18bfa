"""A measured weight in the storage of our kernels.

Lives here: `Packed` and `pack_all` (leaves to storage: one weight, or several joined into one).
Not here: when that happens and how long it is kept (runtime.py), how codes are found (weights.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import lut4
from ..cuda import launch_store_rows
from . import blocks, lookups
from .fp8 import CODES
from .program import Evaluation, device_of
from .weights import Measured, NotAffine, Recipe, as_nk, evaluate_real, planes

INT4 = "int4"
INT8 = "int8"
INT4_PAIR = "int4 pair"
FP8 = "fp8"
DENSE = "dense"
# Of recipes in one text. No JSON holds it, and Inductor may put it into a comment: no line break.
BETWEEN = "\t"


@dataclass(eq=False)
class Packed:
    """One weight in our storage. `order`: the K permutation of an act-order weight.

    kind: one of the above, or a table of lut4.py.
    INT4_PAIR is an 8-bit weight with zeros: w = 16 * scales * high + scales * (low - zeros).
    borrowed: `weight` is the memory of a leaf.
    """

    kind: str
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    high: Tensor | None = None
    high_scales: Tensor | None = None
    order: Tensor | None = None
    reason: str = ""
    borrowed: bool = False

    def tensors(self) -> list[Tensor]:
        values = (getattr(self, each.name) for each in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def rows(self, start: int, end: int) -> Packed:
        """Some of its rows."""
        some: dict[str, Any] = {name: value[start:end] for name, value in _by_name(self)}
        return replace(self, **some)

    def form(self) -> tuple[Any, ...]:
        """What a captured CUDA graph relies on."""
        place = self.weight.data_ptr() if self.borrowed else None
        return (self.kind, place, *((t.shape, t.dtype) for t in self.tensors()))


@functools.lru_cache(maxsize=65536)
def recipes_of(text: str) -> tuple[Recipe, ...]:
    """One recipe, or one for each of the linears fused into one GEMM."""
    return tuple(Recipe.parse(each) for each in text.split(BETWEEN))


def split_leaves(recipes: Sequence[Recipe], leaves: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    parts, start = [], 0
    for recipe in recipes:
        parts.append(leaves[start : start + recipe.program.leaves])
        start += recipe.program.leaves
    return parts


def dense_weight(recipe: Recipe, leaves: Sequence[Tensor]) -> Tensor:
    return as_nk(evaluate_real(recipe, leaves).weight(), recipe)


def pack_all(recipes: Sequence[Recipe], leaves: Sequence[Tensor]) -> list[Packed]:
    """Pack each weight; weights stored alike are joined into one."""
    with torch.no_grad():
        parts = split_leaves(recipes, leaves)
        packed = [_pack(recipe, part) for recipe, part in zip(recipes, parts, strict=True)]
        return packed if len(packed) == 1 or not _alike(packed) else [_join(packed)]


def _pack(recipe: Recipe, leaves: Sequence[Tensor]) -> Packed:
    """Evaluate, prove and pack; a weight that turns out not to be affine is kept dense."""
    try:
        try:
            return _borrowing(_by_rows(recipe, leaves, blocks.measured), leaves)
        except blocks.ColumnsDiffer:
            return _borrowing(_by_rows(recipe, leaves, blocks.whole), leaves)
    except NotAffine as problem:
        # A leaf itself must not be kept alive by its own memo entry: a copy.
        dense = dense_weight(recipe, leaves).clone(memory_format=torch.contiguous_format)
        return Packed(DENSE, dense, reason=str(problem))


def _borrowing(packed: Packed, leaves: Sequence[Tensor]) -> Packed:
    """The same without a copy of FP8 codes that a leaf holds as they are.

    The memory is the leaf's, the tensor is not: its memo entry must not keep a leaf alive.
    """
    weight = packed.weight
    for leaf in leaves if packed.kind == FP8 else ():
        whole = leaf.is_contiguous() and leaf.untyped_storage().nbytes() == weight.nbytes
        if whole and leaf.dtype == weight.dtype and leaf.numel() == weight.numel():
            same = weight.new_empty(0).set_(leaf.untyped_storage(), 0, weight.shape)  # type: ignore[call-overload]
            if torch.equal(same.view(torch.uint8), weight.view(torch.uint8)):
                return replace(packed, weight=same, borrowed=True)
    return packed


def _by_rows(
    recipe: Recipe,
    leaves: Sequence[Tensor],
    measured: Callable[[Recipe, Sequence[Tensor], blocks.Take | None], Iterator[Measured]],
) -> Packed:
    """Rows are stored as they are measured, in the form that the first ones need; if others need a
    wider one, all of them again. A GPU stores the others unmeasured (but for FP8), and asks once if
    that held."""
    form: Form | None = None
    fp8 = any(leaf.dtype == CODES for leaf in leaves)
    measure_all = fp8 or recipe.looked_up
    quick = not measure_all and launch_store_rows.can_store(device_of(leaves))
    while True:
        rows = _Rows(recipe.n * recipe.batch)
        for found in measured(recipe, leaves, rows.take if quick else None):
            own, reduced = _reduced(found)
            wider = own if form is None else form.joined(own)
            if rows.start and wider != form:
                form = wider
                break
            form = wider
            rows.add(_store(reduced, form), form, found)
        else:
            if rows.proved():
                return rows.packed()
            quick = False


class _Rows:
    """Storage of a weight that is filled from its first row on."""

    def __init__(self, n: int) -> None:
        self.n, self.start = n, 0
        self.whole: Packed | None = None
        self.dtypes: dict[str, torch.dtype] = {}
        # Of rows that were taken as the first ones are: how, and what the kernel told of them.
        self.zeros, self.low, self.levels = False, 0, 0
        self.flags: Tensor | None = None

    def add(self, part: Packed, form: Form, found: Measured) -> None:
        rows = part.weight.shape[0]
        if rows == self.n:
            self.whole, self.start = part, rows
            return
        if self.whole is None:
            blank: dict[str, Any] = {name: self._all(name, t) for name, t in _by_name(part)}
            self.whole = replace(part, **blank)
            self.dtypes = {name: t.dtype for name, t in _by_name(part)}
            self.zeros, self.levels = form.zeros, 16 if form.kind == INT4 else 256
            self.low = _least(found.span, self.levels) if form.zeros else -self.levels // 2
        elif not _same_order(self.whole.order, part.order):
            raise blocks.ColumnsDiffer
        # Never held twice: each row goes to its place.
        for name, theirs in _by_name(part):
            getattr(self.whole, name)[self.start : self.start + rows] = theirs
            self.dtypes[name] = torch.promote_types(self.dtypes[name], theirs.dtype)
        self.start += rows

    def _all(self, name: str, some: Tensor) -> Tensor:
        dtype = some.dtype if name in ("weight", "high") else torch.float32
        return some.new_empty((self.n, some.shape[1]), dtype=dtype)

    def take(self, evaluation: Evaluation, recipe: Recipe) -> bool:
        """Store the next rows as the first ones were; `proved` tells later if that was right."""
        whole, dtype = self.whole, evaluation.weight().dtype
        if whole is None or whole.kind == FP8 or dtype not in launch_store_rows.WEIGHTS:
            return False
        if self.flags is None:
            self.flags = torch.zeros(1, dtype=torch.int32, device=whole.weight.device)
        found = planes(evaluation, recipe)
        here = slice(self.start, self.start + found.weight.shape[0])
        into = {name: t[here] for name, t in _by_name(whole)}
        launch_store_rows.store_rows(
            found, whole.order, self.low, self.levels, launch_store_rows.Stored(**into), self.flags
        )
        self.start = here.stop
        return True

    def proved(self) -> bool:
        """Whether all rows that were taken are what they were taken for. Waits for the GPU."""
        if self.flags is None:
            return True
        flags = int(self.flags)
        for name in self.dtypes.keys() - {"weight", "high"}:
            narrowest = launch_store_rows.narrowest(flags, name)
            self.dtypes[name] = torch.promote_types(self.dtypes[name], narrowest)
        return launch_store_rows.was_affine(flags)

    def packed(self) -> Packed:
        assert self.whole is not None
        narrow: dict[str, Any] = {
            name: getattr(self.whole, name).to(dtype) for name, dtype in self.dtypes.items()
        }
        return replace(self.whole, **narrow)


def _by_name(packed: Packed) -> list[tuple[str, Tensor]]:
    """Its tensors of a row each."""
    names = ("weight", "scales", "zeros", "high", "high_scales")
    found = [(name, getattr(packed, name)) for name in names]
    return [(name, value) for name, value in found if value is not None]


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one, other)


def _least(span: tuple[int, int], levels: int) -> int:
    """The least of so many codes, some of which span this."""
    starts = (0, -levels // 2, span[0])
    return next(low for low in starts if low <= span[0] and span[1] < low + levels)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    return torch.cat([value.to(dtype) for value in values])


def _alike(packed: Sequence[Packed]) -> bool:
    first = packed[0]

    def form(each: Packed) -> tuple[Any, ...]:
        columns = [None if t is None else t.shape[1] for t in (each.scales, each.zeros)]
        return (each.kind, each.order is None, *columns)

    plain = first.kind != DENSE and first.order is None and not first.borrowed
    return plain and all(form(each) == form(first) for each in packed)


def _join(packed: Sequence[Packed]) -> Packed:
    joined: dict[str, Any] = {}
    for name in ("weight", "scales", "zeros", "high", "high_scales"):
        values = [getattr(each, name) for each in packed]
        if values[0] is not None:
            joined[name] = _stacked(values)
    return Packed(packed[0].kind, **joined)


@dataclass(frozen=True)
class Form:
    """How some rows can be stored: with which kind, with zero points or not, in which groups."""

    kind: str
    zeros: bool
    group: int

    def joined(self, other: Form) -> Form:
        """One that both can be stored in."""
        group = math.gcd(self.group, other.group)
        kinds = {(each.kind, each.zeros) for each in (self, other)}
        tables = [table for table in lut4.TABLES if (table, False) in kinds]
        if tables and len(kinds) > 1:  # rows of -1, 0 and 1 are in the first table there is
            return Form(tables[-1] if len(tables) == len(kinds) else INT8, False, group)
        wider = kinds - {(INT4, False)} if len(kinds) > 1 else kinds
        kind, zeros = wider.pop() if len(wider) == 1 else (INT4_PAIR, True)
        return Form(kind, zeros, group)


def _reduced(found: Measured) -> tuple[Form, Measured]:
    """The narrowest form of some rows; where that has no zero points, they are in the codes."""
    if found.fp8:
        return Form(FP8, False, found.group_size), found
    if found.looked_up:
        known = lookups.codes_of(found.codes)
        return Form(INT8 if known is None else known[0], False, found.group_size), found
    low, high = found.span
    group, zeros = found.group_size, found.zeros
    if bool((zeros == zeros.round()).all()) and bool((zeros.abs() < 512).all()):
        shifted = found.codes - zeros.to(torch.int16).repeat_interleave(group, dim=1)
        least, most = (int(each) for each in torch.aminmax(shifted))
        narrow = least >= -8 and most <= 7
        if narrow or (high - low > 15 and least >= -128 and most <= 127):
            form = Form(INT4 if narrow else INT8, False, group)
            return form, replace(found, codes=shifted, zeros=torch.zeros_like(zeros))
    if high - low > 255:
        raise NotAffine(f"codes span [{low}, {high}]: more than 8 bits")
    return Form(INT4 if high - low <= 15 else INT4_PAIR, True, group), found


def _store(found: Measured, form: Form) -> Packed:
    """Reduced rows in a form that is theirs or wider."""
    order, codes = found.order, found.codes
    repeats = found.group_size // form.group
    scales, zeros = (t.repeat_interleave(repeats, 1) for t in (found.scales, found.zeros))
    if form.kind == FP8:
        return Packed(FP8, codes, _compact(scales), order=order)
    if form.kind in lut4.TABLES:
        known = lookups.codes_of(codes, form.kind)
        if known is None:
            raise NotAffine(lookups.OTHER)
        return Packed(form.kind, _pack4(known[1]), _compact(scales / known[2]), order=order)
    if found.looked_up:
        integers = lookups.integers(codes)
        if integers is None:
            raise NotAffine(lookups.OTHER)
        codes, scales = integers[0], scales * integers[1]
    if not form.zeros:
        if form.kind == INT4:
            return Packed(INT4, _pack4(codes), _compact(scales), order=order)
        return Packed(INT8, codes.to(torch.int8).contiguous(), _compact(scales), order=order)
    low = int(codes.min())
    zeros, unsigned = zeros - low, codes - low
    if form.kind == INT4:
        return Packed(INT4, _pack4(unsigned), _compact(scales), _compact(zeros), order=order)
    return Packed(
        INT4_PAIR,
        _pack4(unsigned & 15),
        _compact(scales),
        _compact(zeros),
        _pack4(unsigned >> 4),
        _compact(16 * scales),
        order,
    )


def _compact(values: Tensor) -> Tensor:
    """float64 parameters in the smallest floating dtype that holds them exactly, else float32."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.double(), values):
            return narrow
    return values.float()


def _pack4(codes: Tensor) -> Tensor:
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = (codes & 15).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
