"""Weight slices: which integer codes, scales, zeros and groups a program computes.

Lives here: `Recipe` (which slice, which codes) and `measure`: evaluate a slice with its codes
replaced by 0 and 1; the differences are zero and scale of every element, whatever the packing or
spelling. It runs on synthetic leaves at compile time (probing.py) and on the real ones when a
weight is packed (storage.py): each packing proves itself again.
Not here: graphs (editor.py), evaluation (program.py), storage (storage.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cuda.launch_store_rows import Planes
from . import lookups
from .fp8 import CODES
from .program import Evaluation, Program, needed_for

GROUP_STEP = 16


class NotAffine(Exception):
    """The slice is not (codes - zeros) * scales in groups along K; the message says why."""


class NotGrouped(NotAffine):
    """Affine, but its scales are not laid out in groups along K."""


@dataclass(frozen=True)
class Recipe:
    """What a rewritten graph carries for one weight, next to its leaves.

    layout: "nk" if the program's result is W[N, K], "kn" if it is W transposed.
    batch: independent weights stacked in front (experts); N and K are those of one of them.
    looked_up: the codes are numbers of a table (lookups.py).
    """

    program: Program
    codes: int
    layout: str
    batch: int
    n: int
    k: int
    looked_up: bool = False

    @property
    def rows(self) -> int:
        return self.batch * self.n

    def text(self) -> str:
        head = f"{self.codes}|{self.layout}|{self.batch}|{self.n}|{self.k}|{self.looked_up:d}"
        return f"{head}|{self.program.text}"

    @staticmethod
    def parse(text: str) -> Recipe:
        codes, layout, *sizes, looked_up, program = text.split("|", 6)
        batch, n, k = map(int, sizes)
        return Recipe(Program(program), int(codes), layout, batch, n, k, looked_up == "1")


@dataclass(frozen=True)
class Measured:
    """w[:, order] = (codes - zeros) * scales, group_size columns sharing one zero and one scale.

    codes [N, K] int16, or float8_e4m3fn or numbers of a table in float32, where zeros are 0;
    scales, zeros [N, K / group_size] float64; order [K] or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int
    order: Tensor | None

    @property
    def span(self) -> tuple[int, int]:
        low, high = torch.aminmax(self.codes.float() if self.fp8 else self.codes)
        return math.floor(low), math.ceil(high)

    @property
    def fp8(self) -> bool:
        return self.codes.dtype == CODES

    @property
    def looked_up(self) -> bool:
        return self.codes.dtype == torch.float32


def as_nk(weight: Tensor, recipe: Recipe) -> Tensor:
    """The result of a slice as W[batch * N, K]."""
    rows, columns = (recipe.k, recipe.n) if recipe.layout == "kn" else (recipe.n, recipe.k)
    if weight.shape[-2:] != (rows, columns) or weight.numel() != recipe.rows * recipe.k:
        raise NotAffine(f"the weight has shape {tuple(weight.shape)}, not {(rows, columns)}")
    stacked = weight.reshape(recipe.batch, rows, columns)
    if recipe.layout == "kn":
        stacked = stacked.transpose(1, 2)
    return stacked.reshape(recipe.rows, recipe.k)


def measure(
    evaluation: Evaluation,
    recipe: Recipe,
    rows: slice = slice(None),
    order: Tensor | None = None,
) -> Measured:
    """Codes, scales and zeros of the evaluated slice, verified against its own weight.

    rows: the rows to look at. Probing looks at some; packing looks at all of them.
    order: of the columns, where other rows of the same weight have told it.
    """

    def some(weight: Tensor) -> Tensor:
        return as_nk(weight, recipe)[rows].double()

    kind = evaluation.coarsest(recipe.codes)
    if kind is not None and kind.bits == 8:
        raise NotAffine("the weight is rounded to FP8 after its scales")
    source = evaluation.values[recipe.codes]
    true_codes = source.to(torch.float64, copy=True)  # what is made of them is written to
    zero = some(evaluation.with_codes(recipe.codes, torch.zeros_like(true_codes))).clone()
    scale = some(evaluation.with_codes(recipe.codes, torch.ones_like(true_codes))) - zero
    raw = some(evaluation.with_codes(recipe.codes, true_codes))
    raw = raw.contiguous() if 0 in raw.stride() else raw
    del true_codes
    solve, dtype = _solve, torch.int16
    if source.dtype == CODES:
        solve, dtype = _solve_fp8, CODES
    elif recipe.looked_up:
        solve, dtype = _solve_numbers, torch.float32
    codes = torch.empty(raw.shape, dtype=dtype, device=raw.device)
    weight = as_nk(evaluation.weight(), recipe)[rows]
    # In blocks that stay in cache.
    block = max(1, _BLOCK_ELEMENTS // max(recipe.k, 1)) if not raw.is_cuda else raw.shape[0]
    for start in range(0, raw.shape[0], max(block, 1)):
        part = slice(start, start + block)
        codes[part] = solve(raw[part], zero[part], scale[part], weight[part], kind)
    if recipe.looked_up:
        codes = lookups.snapped(codes, _coarser(source.dtype, kind))
    return _grouped(codes, scale, zero, order)


def planes(evaluation: Evaluation, recipe: Recipe) -> Planes:
    """What `measure` looks at, for a kernel."""

    def at(codes: Tensor) -> Tensor:
        return as_nk(evaluation.with_codes(recipe.codes, codes), recipe).double()

    source = evaluation.values[recipe.codes]
    return Planes(
        at_zero=at(torch.zeros_like(source, dtype=torch.float64)),
        at_one=at(torch.ones_like(source, dtype=torch.float64)),
        at_code=at(source.double()),
        weight=as_nk(evaluation.weight(), recipe),
        precision=evaluation.coarsest(recipe.codes),
    )


_BLOCK_ELEMENTS = 1 << 17


def _solve(
    raw: Tensor, offset: Tensor, scale: Tensor, weight: Tensor, kind: torch.finfo | None
) -> Tensor:
    """Codes from the weight at the true codes, at 0, and its slope; what was the offset becomes the
    zero points. All in place: this is most of the memory that packing a weight takes.

    A group whose slope is 0 is a constant c whatever its codes are: code 0, zero -c, scale 1.
    """
    constant = (scale == 0) & (offset != 0)
    slope = scale.masked_fill(scale == 0, 1.0)
    exact = raw.sub_(offset).div_(slope)
    codes = exact.round()
    allowed = codes.abs().add_(1).mul_(1e-6)
    if not bool((exact.sub_(codes).abs_() <= allowed).all()):
        raise NotAffine(
            "an element is not an affine function of its own code (a clamp, a table, a rotation?)"
        )
    if bool((allowed > 1e-6 * 32768).any()):
        raise NotAffine("the codes need more than 16 bits")
    zero = offset.div_(slope).neg_()
    nearest = zero.round()
    close = (zero - nearest).abs_() <= nearest.abs().mul_(1e-12)
    torch.where(close, nearest, zero, out=zero)
    scale.masked_fill_(constant, 1.0)
    del slope, allowed, nearest, close
    _verify(weight, codes, scale, zero, kind, exact)
    return codes.to(torch.int16)


def _solve_fp8(
    raw: Tensor, offset: Tensor, scale: Tensor, weight: Tensor, kind: torch.finfo | None
) -> Tensor:
    """The same for codes of FP8, which have no zero points: without codes there is no weight."""
    if bool((offset != 0).any()):
        raise NotAffine("something is added to FP8 codes")
    if bool(raw.isnan().any()):
        raise NotAffine("an FP8 code or a scale is NaN, which the product would not show")
    exact = raw.div_(scale.masked_fill(scale == 0, 1.0))
    codes = exact.to(CODES)
    rounded = codes.double()  # NaN for what is out of range
    if not bool((exact.sub_(rounded).abs_() <= rounded.abs() * 1e-6).all()):
        raise NotAffine("an element is not its own FP8 code times a scale (a clamp, a rotation?)")
    _verify(weight, rounded, scale, offset, kind, exact)
    return codes


def _solve_numbers(
    raw: Tensor, offset: Tensor, scale: Tensor, weight: Tensor, kind: torch.finfo | None
) -> Tensor:
    """The same for numbers of a table, which stand for their codes."""
    if bool((offset != 0).any()):
        raise NotAffine("something is added to numbers that codes look up")
    exact = raw.div_(scale.masked_fill(scale == 0, 1.0))
    numbers = exact.float()
    rounded = numbers.double()
    if not bool((exact.sub_(rounded).abs_() <= rounded.abs() * 1e-9).all()):
        raise NotAffine("an element is not its own number times a scale (a clamp, a rotation?)")
    _verify(weight, rounded, scale, offset, kind, exact)
    return numbers


def _coarser(dtype: torch.dtype, kind: torch.finfo | None) -> torch.dtype:
    found: torch.dtype = dtype if kind is None else getattr(torch, kind.dtype)
    return max(dtype, found, key=lambda each: torch.finfo(each).eps)


def _verify(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    kind: torch.finfo | None,
    error: Tensor,
) -> None:
    """(codes - zero) * scale must be the graph's own weight up to the roundings of its dtypes.

    The graph may round q - z, the product and a shift separately: four half-ulps of the largest
    intermediate, in the coarsest dtype on the way, cover every spelling.
    """
    eps, tiny = (0.0, 0.0) if kind is None else (kind.eps, kind.smallest_normal * kind.eps)
    graph = weight.double()
    torch.sub(codes, zero, out=error).mul_(scale).sub_(graph).abs_()
    bound = codes.abs().add_(zero.abs()).mul_(scale.abs()).mul_(2 * eps).add_(2 * tiny)
    if not bool((error <= bound.add_(graph.abs().mul_(1e-12))).all()):
        raise NotAffine("(codes - zeros) * scales does not reproduce the weight")


def _boundaries(scale: Tensor, zero: Tensor) -> int:
    """Largest group size such that scale and zero are constant in every group along K."""
    k = scale.shape[1]
    change = ((scale[:, 1:] != scale[:, :-1]) | (zero[:, 1:] != zero[:, :-1])).any(dim=0)
    at = (torch.nonzero(change).flatten() + 1).tolist()
    return math.gcd(k, *at)


def _not_grouped(scale: Tensor, zero: Tensor, group: int) -> str:
    rows = _boundaries(scale.t(), zero.t())
    if rows > 1 and rows % GROUP_STEP == 0:
        return "groups run along N, not along K"
    if _usable(_boundaries(scale, zero[:, :1].expand_as(zero)), scale.shape[1]):
        return "what is added to the scaled codes is not constant in groups along K"
    return f"scales change every {group} columns, not in groups of {GROUP_STEP}"


def _usable(group: int, k: int) -> bool:
    return group == k or group % GROUP_STEP == 0


def _grouped(codes: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None) -> Measured:
    k = codes.shape[1]
    group = 0 if order is not None else _boundaries(scale, zero)
    if order is not None or not _usable(group, k):
        order = _column_order(scale, zero) if order is None else order
        group = _boundaries(scale[:, order], zero[:, order])
        if not _usable(group, k):
            raise NotGrouped(_not_grouped(scale, zero, group))
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


def evaluate_real(recipe: Recipe, leaves: Sequence[Tensor]) -> Evaluation:
    """The slice on its real leaves, keeping only what `measure` needs."""
    return Evaluation(recipe.program, leaves, needed_for(recipe.program, recipe.codes))
