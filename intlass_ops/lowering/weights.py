"""Weight slices: which integer codes, scales, zeros and groups a program computes.

Lives here: `measure` (evaluate a slice with its codes replaced by 0 and 1: the differences are
zero and scale of every element, whatever the packing or spelling) and `probe` (do so on synthetic
leaves at compile time, so that the decision depends on no value). The same `measure` runs on the
real leaves when a weight is packed (runtime.py): each packing proves itself again.
Not here: graphs (graph_pass.py), evaluation (program.py), storage (runtime.py).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .program import Evaluation, NotASlice, Program, needed_for

# Each measured candidate costs a few evaluations of the slice.
MAX_CANDIDATES = 12
GROUP_STEP = 16


class NotAffine(Exception):
    """The slice is not (codes - zeros) * scales in groups along K; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What a rewritten graph carries for one weight, next to its leaves.

    layout: "nk" if the program's result is W[N, K], "kn" if it is W transposed.
    batch: independent weights stacked in front (experts); N and K are those of one of them.
    """

    program: Program
    codes: int
    layout: str
    batch: int
    n: int
    k: int

    @property
    def rows(self) -> int:
        return self.batch * self.n

    def text(self) -> str:
        head = f"{self.codes}|{self.layout}|{self.batch}|{self.n}|{self.k}"
        return f"{head}|{self.program.text}"

    @staticmethod
    def parse(text: str) -> Recipe:
        codes, layout, batch, n, k, program = text.split("|", 5)
        return Recipe(Program(program), int(codes), layout, int(batch), int(n), int(k))


@dataclass(frozen=True)
class Measured:
    """w[:, order] = (codes - zeros) * scales, group_size columns sharing one zero and one scale.

    codes [N, K] int16; scales, zeros [N, K / group_size] float64; order [K] or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    order: Tensor | None

    @property
    def span(self) -> tuple[int, int]:
        low, high = torch.aminmax(self.codes)
        return int(low), int(high)


@dataclass(frozen=True)
class WeightForm:
    """What `probe` proved about a slice, for any values of its leaves."""

    recipe: Recipe
    group_size: int
    span: tuple[int, int]
    has_zeros: bool
    codes_are_weight: bool  # no scale inside the slice: it comes later, as an epilogue
    codes_leaf: int | None  # the leaf that already is int8 W[N, K], if one is
    scale_value: int | None  # a value of the program equal to the per-channel scales

    @property
    def bits(self) -> int:
        return 4 if self.span[1] - self.span[0] < 16 else 8


def as_nk(weight: Tensor, recipe: Recipe) -> Tensor:
    """The result of a slice as W[batch * N, K]."""
    rows, columns = (recipe.k, recipe.n) if recipe.layout == "kn" else (recipe.rows, recipe.k)
    if weight.shape[-2:] != (rows, columns) or weight.numel() != recipe.rows * recipe.k:
        raise NotAffine(f"the weight has shape {tuple(weight.shape)}, not {(rows, columns)}")
    stacked = weight.reshape(recipe.batch, rows, columns)
    if recipe.layout == "kn":
        stacked = stacked.transpose(1, 2)
    return stacked.reshape(recipe.rows, recipe.k)


def measure(evaluation: Evaluation, recipe: Recipe) -> Measured:
    """Codes, scales and zeros of the evaluated slice, verified against its own weight."""

    def downstream(codes: Tensor) -> Tensor:
        result = evaluation.with_codes(recipe.codes, codes)
        return as_nk(result.double(), recipe)

    true_codes = evaluation.values[recipe.codes].double()
    offset = downstream(torch.zeros_like(true_codes))
    scale = downstream(torch.ones_like(true_codes)) - offset
    live = scale != 0
    if not bool((live | (offset == 0)).all()):
        raise NotAffine("part of the weight does not depend on the codes")
    raw = torch.where(live, (downstream(true_codes) - offset) / scale, 0.0)
    codes = raw.round()
    if not bool(((raw - codes).abs() <= 1e-6 * (1 + codes.abs())).all()):
        raise NotAffine("the weight is not an affine function of the codes (a look-up table?)")
    zero = torch.where(live, -offset / scale, 0.0)
    nearest = zero.round()
    zero = torch.where((zero - nearest).abs() <= 1e-9 * (1 + zero.abs()), nearest, zero)
    _verify(evaluation.weight(), recipe, codes, scale, zero)
    if bool((codes.abs() > 32767).any()):
        raise NotAffine("the codes need more than 16 bits")
    return _grouped(codes.to(torch.int16), scale, zero)


def _verify(weight: Tensor, recipe: Recipe, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
    """(codes - zero) * scale must be the graph's own weight up to the roundings of its dtype.

    The graph may round q - z, the product and a shift separately: four half-ulps of the largest
    intermediate cover every spelling, and none of that hides a wrong code.
    """
    eps, tiny = 0.0, 0.0
    if weight.dtype.is_floating_point:
        info = torch.finfo(weight.dtype)
        eps, tiny = info.eps, info.smallest_normal * info.eps
    graph = as_nk(weight, recipe).double()
    bound = 2 * eps * (codes.abs() + zero.abs()) * scale.abs() + 2 * tiny
    if not bool((((codes - zero) * scale - graph).abs() <= bound + 1e-12 * graph.abs()).all()):
        raise NotAffine("(codes - zeros) * scales does not reproduce the weight")


def _boundaries(scale: Tensor, zero: Tensor) -> int:
    """Largest group size such that scale and zero are constant in every group along K."""
    k = scale.shape[1]
    change = ((scale[:, 1:] != scale[:, :-1]) | (zero[:, 1:] != zero[:, :-1])).any(dim=0)
    at = (torch.nonzero(change).flatten() + 1).tolist()
    return math.gcd(k, *at)


def _usable(group: int, k: int) -> bool:
    return group == k or group % GROUP_STEP == 0


def _grouped(codes: Tensor, scale: Tensor, zero: Tensor) -> Measured:
    k = codes.shape[1]
    group = _boundaries(scale, zero)
    order = None
    if not _usable(group, k):
        order = _column_order(scale, zero)
        group = _boundaries(scale[:, order], zero[:, order])
        if not _usable(group, k):
            rows = _boundaries(scale.t(), zero.t())
            along_n = rows > 1 and rows % GROUP_STEP == 0
            raise NotAffine(
                "groups run along N, not along K"
                if along_n
                else f"scales change every {group} columns, not in groups of {GROUP_STEP}"
            )
        codes, scale, zero = codes[:, order], scale[:, order], zero[:, order]
    first = slice(None, None, group)
    return Measured(
        codes.contiguous(), scale[:, first].contiguous(), zero[:, first].contiguous(), group, order
    )


def _column_order(scale: Tensor, zero: Tensor) -> Tensor:
    """Columns with equal scales and zeros brought together (act-order), first seen first."""
    mix = torch.linspace(0.5, 1.5, scale.shape[0], dtype=torch.float64, device=scale.device)
    key = mix @ scale + math.pi * (mix.flip(0) @ zero)
    _, inverse = torch.unique(key, return_inverse=True)
    return torch.argsort(inverse, stable=True)


@dataclass(frozen=True)
class LeafMeta:
    """What probing needs to know about a leaf: never its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    index_into: int | None  # the leaf is used as an index into a dimension of this size


def synthetic(meta: LeafMeta, numel: int, seed: int, device: torch.device) -> Tensor:
    """Random contents for a leaf: full-range integers, weight-like or scale-like floats."""
    generator = torch.Generator().manual_seed(seed)
    extent = 1 + sum((s - 1) * t for s, t in zip(meta.shape, meta.stride, strict=True) if s)
    extent = 0 if 0 in meta.shape else extent
    if meta.index_into is not None:
        values = torch.arange(extent) * meta.index_into // max(extent, 1)
        flat = values.to(meta.dtype)
    elif meta.dtype == torch.bool:
        flat = torch.randint(0, 2, (extent,), generator=generator).bool()
    elif meta.dtype.is_floating_point:
        if 2 * math.prod(meta.shape) >= numel:
            flat = torch.randn(extent, generator=generator).to(meta.dtype)
        else:
            flat = (torch.rand(extent, generator=generator) + 0.5).to(meta.dtype)
    else:
        bytes_ = torch.randint(
            0, 256, (extent * meta.dtype.itemsize,), dtype=torch.uint8, generator=generator
        )
        # No byte may look like the exponent of an infinity: scales are often stored as bytes.
        bytes_ = torch.where((bytes_ & 0x7C) == 0x7C, bytes_ ^ 0x40, bytes_)
        flat = bytes_.view(meta.dtype)
    return flat.to(device).as_strided(meta.shape, meta.stride)


_PROBED: dict[tuple[object, ...], WeightForm | str] = {}
_LOCK = threading.Lock()


def probe(
    metas: Sequence[LeafMeta],
    shape: Recipe,
    device: torch.device,
) -> WeightForm:
    """Find the codes of a slice and prove its structure on synthetic leaves.

    `shape` is a recipe whose codes are still unknown. Raises NotAffine. Equal slices (the layers of a model) are probed once.
    """
    key = (shape.text(), tuple(metas))
    with _LOCK:
        known = _PROBED.get(key)
    if known is None:
        try:
            known = _probe(metas, shape, device)
        except (NotAffine, NotASlice) as problem:
            known = str(problem)
        with _LOCK:
            _PROBED[key] = known
    if isinstance(known, str):
        raise NotAffine(known)
    return known


def _probe(
    metas: Sequence[LeafMeta],
    shape: Recipe,
    device: torch.device,
) -> WeightForm:
    leaves = [synthetic(meta, shape.rows * shape.k, 1000 + i, device) for i, meta in enumerate(metas)]
    try:
        evaluation = Evaluation(shape.program, leaves)
    except Exception as problem:
        raise NotAffine(f"the slice cannot be evaluated on its own: {problem}") from problem
    if evaluation.weight().dtype.is_complex or evaluation.weight().dtype == torch.bool:
        raise NotAffine(f"the weight is {evaluation.weight().dtype}")
    best: tuple[tuple[int, ...], Recipe, Measured] | None = None
    reason = "no integer-valued tensor of the weight's size"
    tried = 0
    for index in _candidates(evaluation, shape.rows * shape.k):
        tried += 1
        if tried > MAX_CANDIDATES:
            break
        recipe = replace(shape, codes=index)
        try:
            found = measure(evaluation, recipe)
        except (NotAffine, NotASlice) as problem:
            reason = str(problem)
            continue
        except IndexError:
            reason = "the codes index a table: not integers times a scale"
            continue
        except Exception as problem:
            # Some candidates are inputs of bit operations, which float64 codes cannot enter.
            reason = f"{type(problem).__name__} downstream of the codes"
            continue
        if not _same_codes(found.codes, evaluation.values[index]):
            reason = "the weight keeps only part of its codes (a clamp?)"
            continue
        low, high = found.span
        levels = high - low + 1
        rank = (0 if found.order is None else 1, 4 if levels <= 16 else 8 if levels <= 256 else 9)
        rank = (*rank, -found.group_size)
        if best is None or rank < best[0]:
            best = (rank, recipe, found)
        if rank[:2] == (0, 4):
            break
    if best is None:
        raise NotAffine(reason)
    _, recipe, found = best
    low, high = found.span
    if high - low > 255:
        raise NotAffine(f"codes span [{low}, {high}]: more than 8 bits")
    return _describe(evaluation, recipe, found)


def _same_codes(found: Tensor, source: Tensor) -> bool:
    """Whether the recovered codes are the source's own values, in whatever order."""
    ours = torch.sort(found.flatten()).values
    return torch.equal(ours.double(), torch.sort(source.flatten().double()).values)


def _candidates(evaluation: Evaluation, numel: int) -> list[int]:
    """Integer-valued values with as many elements as the weight, nearest to the weight first."""
    found = []
    for index in range(evaluation.program.result, -1, -1):
        value = evaluation.values[index]
        if not isinstance(value, Tensor) or value.numel() != numel or value.dtype == torch.bool:
            continue
        if value.dtype.is_complex:
            continue
        if value.dtype.is_floating_point and not (
            bool((value == value.round()).all()) and bool((value != value.flatten()[0]).any())
        ):
            continue
        found.append(index)
    return found


def _describe(evaluation: Evaluation, recipe: Recipe, found: Measured) -> WeightForm:
    leaf = scale_value = None
    per_channel = found.group_size == recipe.k and found.order is None
    for i in range(evaluation.program.leaves):
        value = evaluation.values[i]
        if (
            value.dtype == torch.int8
            and tuple(value.shape) == (recipe.rows, recipe.k)
            and value.is_contiguous()
            and torch.equal(value.to(torch.int16), found.codes)
        ):
            leaf = i
    if per_channel:
        scales = found.scales[:, 0]
        for i, value in enumerate(evaluation.values):
            if (
                isinstance(value, Tensor)
                and value.dtype.is_floating_point
                and value.numel() in (1, recipe.rows)
                and torch.equal(value.double().flatten().expand(recipe.rows), scales)
            ):
                scale_value = i
                break
    return WeightForm(
        recipe=recipe,
        group_size=found.group_size,
        span=found.span,
        has_zeros=bool((found.zeros != 0).any()),
        codes_are_weight=bool((found.scales == 1).all()) and not bool((found.zeros != 0).any()),
        codes_leaf=leaf,
        scale_value=scale_value,
    )


def evaluate_real(recipe: Recipe, leaves: Sequence[Tensor]) -> Evaluation:
    """The slice on its real leaves, keeping only what `measure` needs."""
    return Evaluation(recipe.program, leaves, needed_for(recipe.program, recipe.codes))


