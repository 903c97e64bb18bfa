"""Compile-time proof: which value of a slice holds the codes, for any values of its leaves.

Lives here: `probe`, which measures a slice on synthetic leaves, so that the decision depends on no
value and a cached graph serves every weight; what is proved (`WeightForm`). Not here: the
synthetic leaves (leaves.py), the measuring (weights.py), codes in several tensors (parts.py).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import blocks, columns, lookups, parts
from .columns import Columns
from .fp8 import CODES, UNREAD, unread
from .leaves import LeafMeta, synthetic
from .program import Evaluation, NotASlice, Program, dependents
from .weights import Measured, NotAffine, NotGrouped, Recipe, evaluate_real, measure

# Each measured candidate costs a few evaluations of the slice.
MAX_CANDIDATES = 12
# A weight may be cut from a tensor of codes so many times its size.
MAX_PARTS = 64
# Rows looked at when probing, where a slice can be cut; else the whole of it is evaluated.
PROBED_ROWS = 256


@dataclass(frozen=True)
class WeightForm:
    """What `probe` proved about a slice, for any values of its leaves."""

    recipe: Recipe
    group_size: int
    span: tuple[int, int]
    has_zeros: bool
    codes_are_weight: bool  # no scale inside the slice: it comes later, as an epilogue
    fp8: bool  # the codes are float8_e4m3fn
    looked_up: bool  # the codes are numbers of a table
    codes_leaf: int | None  # the leaf that already is int8 W[N, K], if one is
    # values equal to the per-channel scales, nearest to the weight first: one further away may
    # lack a clamp that synthetic scales do not reach
    scale_values: tuple[int, ...]
    eps: float  # of the least precise floating type on the way from the codes to the weight
    columns: Columns | None = None  # of the graph's slice: scales that go to the activations

    @property
    def bits(self) -> int:
        return 4 if self.looked_up or self.span[1] - self.span[0] < 16 else 8


_PROBED: dict[tuple[object, ...], WeightForm | str] = {}
_LOCK = threading.Lock()


def probe(
    metas: Sequence[LeafMeta],
    shape: Recipe,
    device: torch.device,
) -> WeightForm:
    """Find the codes of a slice and prove its structure on synthetic leaves.

    `shape` is a recipe whose codes are still unknown. Raises NotAffine. Equal slices (the layers
    of a model) are probed once.
    """
    key = (shape.text(), tuple(metas))
    with _LOCK:
        known = _PROBED.get(key)
    if known is None:
        try:
            known = _probe(metas, shape, device, small=False)
        except (NotAffine, NotASlice) as problem:
            known = str(problem)
            with contextlib.suppress(NotAffine, NotASlice):
                # A zero point drawn from all of int64 hides the codes behind its size.
                known = _probe(metas, shape, device, small=True)
        with _LOCK:
            _PROBED[key] = known
    if isinstance(known, str):
        raise NotAffine(known)
    return known


def _probe(
    metas: Sequence[LeafMeta],
    shape: Recipe,
    device: torch.device,
    *,
    small: bool,
) -> WeightForm:
    whole = shape
    shape, metas = _first_rows(whole, metas)
    numel = shape.rows * shape.k
    leaves = [synthetic(meta, numel, 1000 + i, device, small=small) for i, meta in enumerate(metas)]
    try:
        evaluation = Evaluation(shape.program, leaves)
    except Exception as problem:
        why = f"cannot be evaluated on its own: {problem}"
        if "out of bounds" in str(problem):
            why = "is put in order by indices whose values compiling does not know"
        raise NotAffine(f"the slice {why}") from problem
    if evaluation.weight().dtype.is_complex or evaluation.weight().dtype == torch.bool:
        raise NotAffine(f"the weight is {evaluation.weight().dtype}")
    found = _nearest(evaluation, shape, _candidates(evaluation, numel))
    if isinstance(found, str):
        freed = _probe_columns(evaluation, leaves, shape, whole)
        if freed is not None:
            return freed
        large = (value.dtype for value in evaluation.values if _large(value, numel))
        found = next((unread(dtype) for dtype in large if dtype in UNREAD), found)
        return _probe_parts(evaluation, leaves, shape, whole, found)
    return _form(evaluation, found, _like(whole, found))


def _probe_columns(
    evaluation: Evaluation, leaves: Sequence[Tensor], shape: Recipe, whole: Recipe
) -> WeightForm | None:
    """The same for a weight whose columns have scales of their own."""
    for found in itertools.islice(columns.candidates(evaluation, shape.k), MAX_CANDIDATES):
        c = evaluation.values[found.index]
        freed = replace(shape, program=columns.without(shape.program, found, c))
        again = Evaluation(freed.program, leaves)
        codes = _nearest(again, freed, _candidates(again, shape.rows * shape.k))
        if isinstance(codes, str) or not columns.proved(evaluation, shape, found):
            continue
        program = columns.without(whole.program, found, c)
        form = _form(again, codes, _like(replace(whole, program=program), codes))
        coarsest = evaluation.coarsest(found.index)
        eps = max(form.eps, 0.0 if coarsest is None else coarsest.eps)
        # Its values are no longer those of the graph's slice.
        return replace(form, scale_values=(), eps=eps, columns=found)
    return None


def _probe_parts(
    evaluation: Evaluation, leaves: Sequence[Tensor], shape: Recipe, whole: Recipe, reason: str
) -> WeightForm:
    """The same for codes that are never in one tensor. `shape` are the first rows of `whole`."""
    best: tuple[_Found, Evaluation, tuple[int, ...]] | None = None
    of = lookups.tables(evaluation)
    for members in parts.joined(evaluation, lambda value: _are_codes(value, of)):
        program, codes = parts.through_one(shape.program, members)
        again = Evaluation(program, leaves)
        found = _nearest(again, replace(shape, program=program), [codes])
        if isinstance(found, str):
            reason = found
        elif not _linear(again, codes):
            reason = "the weight keeps only part of its codes (a clamp?)"
        elif best is None or found.rank < best[0].rank:
            best = found, again, members
    if best is None:
        raise NotAffine(reason)
    of_parts, again, members = best
    program, _ = parts.through_one(whole.program, members)
    form = _form(again, of_parts, _like(replace(whole, program=program), of_parts))
    # Its values are no longer those of the graph's slice.
    return replace(form, scale_values=())


def _linear(evaluation: Evaluation, index: int) -> bool:
    """Whether twice the codes give twice the weight: a clamp of one part would not show in the span
    of all codes."""
    codes = evaluation.values[index].double()
    none, once, twice = (evaluation.with_codes(index, codes * n) for n in range(3))
    return torch.allclose(twice - once, once - none, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class _Found:
    """Codes that were measured, and at which rows."""

    recipe: Recipe
    measured: Measured
    rows: slice

    @property
    def rank(self) -> tuple[int, ...]:
        """The lowest is the best."""
        low, high = self.measured.span
        levels = high - low + 1
        bits = 4 if levels <= 16 else 8 if levels <= 256 else 9
        return (int(self.measured.order is not None), bits, -self.measured.group_size)


def _nearest(evaluation: Evaluation, shape: Recipe, candidates: Sequence[int]) -> _Found | str:
    """The best of the values that may be the codes; why, if none is."""
    best: _Found | None = None
    reason, settled = "no integer-valued tensor of the weight's size", False
    for index in candidates[:MAX_CANDIDATES]:
        recipe = replace(shape, codes=index, looked_up=not _integral(evaluation.values[index]))
        try:
            found = _Found(recipe, *_measured(evaluation, recipe))
            if recipe.looked_up:
                _check_table(evaluation, found.measured.codes)
        except NotGrouped as problem:
            # Nothing nearer the truth will be said about another candidate.
            reason, settled = str(problem), True
            continue
        except (NotAffine, NotASlice) as problem:
            reason = reason if settled else str(problem)
            continue
        except IndexError:
            reason = "the codes index a table: not integers times a scale"
            continue
        except Exception:
            # Some candidates are inputs of bit operations, which float64 codes cannot enter.
            reason = "the codes' bits are picked apart on their way: not integers times a scale"
            continue
        if not _same_codes(found.measured.codes, evaluation.values[index]):
            reason = "the weight keeps only part of its codes (a clamp?)"
            continue
        if best is None or found.rank < best.rank:
            best = found
        if best.rank[:2] == (0, 4):
            break
    return reason if best is None else best


def _check_table(evaluation: Evaluation, numbers: Tensor) -> None:
    """A table that the graph holds itself must be one that can be stored."""
    tables = lookups.tables(evaluation)
    if any(table.constant for table in tables) and not lookups.is_stored(numbers):
        raise NotAffine(lookups.OTHER)


def _like(whole: Recipe, found: _Found) -> Recipe:
    """The whole slice with the codes that were found in its first rows."""
    return replace(whole, codes=found.recipe.codes, looked_up=found.recipe.looked_up)


def _form(evaluation: Evaluation, found: _Found, whole: Recipe) -> WeightForm:
    low, high = found.measured.span
    if high - low > 255 and not found.measured.fp8:
        raise NotAffine(f"codes span [{low}, {high}]: more than 8 bits")
    form = _describe(evaluation, found.recipe, found.measured, found.rows)
    return replace(form, recipe=whole)


def _first_rows(recipe: Recipe, metas: Sequence[LeafMeta]) -> tuple[Recipe, Sequence[LeafMeta]]:
    """The first rows of the slice and of its leaves; all of them where it is small or mixed."""
    blank = [
        torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
        for meta in metas
    ]
    found = blocks.first_rows(recipe, blank, PROBED_ROWS)
    if found is None:
        return recipe, metas
    small, parts = found
    return small, [
        replace(meta, shape=tuple(part.shape), stride=part.stride())
        for meta, part in zip(metas, parts, strict=True)
    ]


def _measured(evaluation: Evaluation, recipe: Recipe) -> tuple[Measured, slice]:
    """Some rows of the weight, and which."""
    if recipe.batch == 1 and recipe.n >= 2 * PROBED_ROWS:
        # The codes are packed across rows: what follows them may still fall apart.
        small, read = blocks.downstream(recipe)
        part = blocks.first_rows(small, [evaluation.values[i] for i in read], PROBED_ROWS)
        if part is not None:
            found = measure(evaluate_real(*part), part[0])
            return found, slice(found.codes.shape[0])
    every = slice(None, None, max(1, recipe.rows // PROBED_ROWS))
    return measure(evaluation, recipe, every), every


def _same_codes(found: Tensor, source: Tensor) -> bool:
    """Whether the recovered codes span what the source spans: a clamp downstream would cut it.

    The rows looked at may miss an extreme value, never a tenth of the range.
    """
    least, most = _extremes(source)
    low, high = _extremes(found)
    return least <= low and high <= most and high - low >= 0.9 * (most - least)


def _extremes(codes: Tensor) -> list[float]:
    wide = codes.float() if codes.dtype == CODES else codes
    return [float(each) for each in torch.aminmax(wide)]


def _candidates(evaluation: Evaluation, numel: int) -> list[int]:
    """Values of integers, or of a table's numbers, with as many elements as the weight, nearest to
    it first; then larger ones, of which it may be a part (one of several stacked or padded)."""
    found: list[tuple[bool, int, int]] = []
    of = lookups.tables(evaluation)
    for index in range(evaluation.program.result, -1, -1):
        value = evaluation.values[index]
        if _large(value, numel) and _are_codes(value, of):
            found.append((value.numel() > numel, len(found), index))
    return [index for *_, index in sorted(found)]


def _large(value: Any, numel: int) -> bool:
    return isinstance(value, Tensor) and numel <= value.numel() <= MAX_PARTS * numel


def _are_codes(value: Tensor, of: Sequence[lookups.Table]) -> bool:
    return _integral(value) or lookups.are_numbers(value, of)


def _integral(value: Tensor) -> bool:
    """Whether a value is integers, and not one integer all over, or codes of FP8."""
    if value.dtype == torch.bool or value.dtype.is_complex:
        return False
    if not value.dtype.is_floating_point or value.dtype == CODES:
        return True
    if value.dtype.itemsize == 1:
        return False
    corner = value[(slice(PROBED_ROWS),) * value.dim()]
    return not bool((corner != corner.round()).any() | (corner == corner.min()).all())


# Between an int8 leaf and a weight these change no code and apply a scale, whatever its values.
_PLAIN = (
    "aten._to_copy.",
    "aten._unsafe_view.",
    "aten.alias.",
    "aten.clone.",
    "aten.detach.",
    "aten.expand.",
    "aten.mul.Tensor",
    "aten.permute.",
    "aten.reshape.",
    "aten.squeeze.",
    "aten.t.",
    "aten.transpose.",
    "aten.unsqueeze.",
    "aten.view.default",
    "prims.convert_element_type.",
)


def _only_scaled(program: Program, leaf: int) -> bool:
    """Whether nothing but casts, views and products lies between a leaf and the weight.

    Only then may the leaf be read in place: there is no packing to prove the values again, and a
    clamp that no synthetic value reaches could bite on a real one.
    """
    path = dependents(program, leaf)
    return all(program.operations[i - program.leaves].target.startswith(_PLAIN) for i in path)


def _describe(evaluation: Evaluation, recipe: Recipe, found: Measured, rows: slice) -> WeightForm:
    program = evaluation.program
    leaf = None
    for i in range(program.leaves):
        value = evaluation.values[i]
        if (
            value.dtype == torch.int8
            and tuple(value.shape) == (recipe.rows, recipe.k)
            and value.is_contiguous()
            and not found.looked_up
            and torch.equal(value[rows].to(torch.int16), found.codes)
            and _only_scaled(program, i)
        ):
            leaf = i
    scale_values: list[int] = []
    if found.group_size == recipe.k and found.order is None:
        scales = found.scales[:, 0]
        for i, value in enumerate(evaluation.values):
            if (
                isinstance(value, Tensor)
                and value.dtype.is_floating_point
                and value.numel() in (1, recipe.rows)
                and torch.equal(value.double().flatten().expand(recipe.rows)[rows], scales)
            ):
                scale_values.append(i)
    coarsest = evaluation.coarsest(recipe.codes)
    eps = 0.0 if coarsest is None else coarsest.eps
    if found.looked_up:
        eps = max(eps, torch.finfo(evaluation.values[recipe.codes].dtype).eps)
    return WeightForm(
        eps=eps,
        recipe=recipe,
        group_size=found.group_size,
        span=found.span,
        has_zeros=bool((found.zeros != 0).any()),
        codes_are_weight=bool((found.scales == 1).all()) and not bool((found.zeros != 0).any()),
        fp8=found.fp8,
        looked_up=found.looked_up,
        codes_leaf=leaf,
        scale_values=tuple(reversed(scale_values)),
    )
