"""A measured weight in the storage of our kernels.

Lives here: `Packed` and `pack_all` (leaves to storage: one weight, or several joined into one).
Not here: when that happens and how long it is kept (runtime.py), how codes are found (weights.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .blocks import measure_rows
from .weights import Measured, NotAffine, Recipe, as_nk, evaluate_real

INT4 = "int4"
INT8 = "int8"
INT4_PAIR = "int4 pair"
DENSE = "dense"


@dataclass(eq=False)
class Packed:
    """One weight in our storage. `order`: the K permutation of an act-order weight.

    INT4_PAIR is an 8-bit weight with zeros: w = 16 * scales * high + scales * (low - zeros).
    """

    kind: str
    weight: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    high: Tensor | None = None
    high_scales: Tensor | None = None
    order: Tensor | None = None
    reason: str = ""

    def tensors(self) -> list[Tensor]:
        values = (getattr(self, each.name) for each in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def form(self) -> tuple[Any, ...]:
        """What a captured CUDA graph relies on."""
        return (self.kind, *((t.shape, t.dtype) for t in self.tensors()))


@functools.lru_cache(maxsize=65536)
def recipes_of(text: str) -> tuple[Recipe, ...]:
    """One recipe, or one per line for linears fused into one GEMM."""
    return tuple(Recipe.parse(line) for line in text.split("\n"))


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
        return _store(measure_rows(recipe, leaves))
    except NotAffine as problem:
        # A leaf itself must not be kept alive by its own memo entry: a copy.
        dense = dense_weight(recipe, leaves).clone(memory_format=torch.contiguous_format)
        return Packed(DENSE, dense, reason=str(problem))


def _alike(packed: Sequence[Packed]) -> bool:
    first = packed[0]

    def form(each: Packed) -> tuple[Any, ...]:
        columns = [None if t is None else t.shape[1] for t in (each.scales, each.zeros)]
        return (each.kind, each.order is None, *columns)

    plain = first.kind != DENSE and first.order is None
    return plain and all(form(each) == form(first) for each in packed)


def _join(packed: Sequence[Packed]) -> Packed:
    joined: dict[str, Any] = {}
    for name in ("weight", "scales", "zeros", "high", "high_scales"):
        values = [getattr(each, name) for each in packed]
        if values[0] is not None:
            dtype = functools.reduce(torch.promote_types, (v.dtype for v in values))
            joined[name] = torch.cat([v.to(dtype) for v in values])
    return Packed(packed[0].kind, **joined)


def _store(found: Measured) -> Packed:
    codes, zeros, group, order = found.codes, found.zeros, found.group_size, found.order
    low, high = found.span
    # Integer zeros vanish into the codes where the difference still fits.
    if bool((zeros == zeros.round()).all()) and bool((zeros.abs() < 512).all()):
        shifted = codes - zeros.to(torch.int16).repeat_interleave(group, dim=1)
        least, most = (int(each) for each in torch.aminmax(shifted))
        if least >= -8 and most <= 7:
            return Packed(INT4, _pack4(shifted), _compact(found.scales), order=order)
        if high - low > 15 and least >= -128 and most <= 127:
            codes8 = shifted.to(torch.int8).contiguous()
            return Packed(INT8, codes8, _compact(found.scales), order=order)
    zeros, unsigned = zeros - low, codes - low
    if high - low <= 15:
        return Packed(INT4, _pack4(unsigned), _compact(found.scales), _compact(zeros), order=order)
    if high - low > 255:
        raise NotAffine(f"codes span [{low}, {high}]: more than 8 bits")
    return Packed(
        INT4_PAIR,
        _pack4(unsigned & 15),
        _compact(found.scales),
        _compact(zeros),
        _pack4(unsigned >> 4),
        _compact(16 * found.scales),
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
