"""What is around an integer product while it still is integers: biases, corrections, padding.

Lives here: `read`, which understands the additions and subtractions of int32 nodes after
`_int_mm` as what they mean for the dequantised product, and `without_padding`, of the rows that it
needs on a GPU. Not here: the floating epilogue (gemms.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .editor import CAST, Editor, aten
from .gemms import Gemm, column_like, row_like, same_size, shape_of


@dataclass(frozen=True)
class IntegerTail:
    """y = x @ w - zero * rowsum(w) - rowsum(x) * weight_zero + K * zero * weight_zero + bias, up to
    node `last`.

    zero: one integer a row (or one in all) to subtract from the activations; weight_zero: one a
    column, to subtract from the weight; bias: int [N].
    crossed: with both zero points, whether their product has been added.
    unshifted: the product was of x + 128, and 128 * rowsum(w) was subtracted again.
    """

    last: Node
    zero: Node | None = None
    bias: Node | None = None
    unshifted: bool = False
    weight_zero: Node | None = None
    crossed: bool = False


def without_padding(gemm: Gemm) -> Gemm:
    """The product of the rows that are kept, where others were added to have more than 16."""
    x, user = gemm.x, next(iter(gemm.node.users), None)
    if not gemm.integer or gemm.flipped or gemm.batch != 1 or len(gemm.node.users) != 1:
        return gemm
    if user is None or user.target is not aten.slice.Tensor or user.args[1:3] not in ((0, 0), (0,)):
        return gemm
    args: Any = x.args
    rows = None
    if x.target is aten.cat.default and args[1:] in ((), (0,)):
        rows = args[0][0]
    elif x.target is aten.constant_pad_nd.default and args[1][:3] == [0, 0, 0]:
        rows = args[0]
    if not isinstance(rows, Node) or len(user.args) > 4 or len(shape_of(x)) != 2:
        return gemm
    kept = same_size(shape_of(user)[0], shape_of(rows)[0])
    return replace(gemm, node=user, x=rows) if kept else gemm


def read(edit: Editor, gemm: Gemm) -> IntegerTail:
    """The longest chain of single-use integer sums after `gemm` that is understood."""
    found = IntegerTail(gemm.node)
    if gemm.batch != 1 or gemm.flipped:
        return found
    while len(found.last.users) == 1:
        user = next(iter(found.last.users))
        if user.target not in (aten.add.Tensor, aten.sub.Tensor) or user.kwargs:
            break
        if user.meta["val"].dtype.is_floating_point or shape_of(user) != shape_of(gemm.node):
            break
        left, right = user.args
        subtracts = user.target is aten.sub.Tensor
        other = right if left is found.last else left
        if not isinstance(other, Node) or (subtracts and left is not found.last):
            break
        longer = _one(edit, gemm, found, user, other, subtracts)
        if longer is None:
            break
        found = longer
    return found


def _one(
    edit: Editor, gemm: Gemm, found: IntegerTail, user: Node, other: Node, subtracts: bool
) -> IntegerTail | None:
    if column_like(other, gemm.n) and edit.is_static(other):
        unsigned = gemm.x.meta["val"].dtype == torch.uint8 and not found.unshifted
        if subtracts and unsigned and _is_row_sum(edit, gemm, other, 128):
            return replace(found, last=user, unshifted=True)
        corrected = _corrected(edit, gemm, found, user, other) if subtracts else None
        return corrected or _biased(edit, found, user, other, subtracts)
    if not subtracts and not found.crossed and _is_cross(gemm, found, other):
        return replace(found, last=user, crossed=True)
    return _corrected(edit, gemm, found, user, other) if subtracts else None


def _biased(
    edit: Editor, found: IntegerTail, user: Node, other: Node, subtracts: bool
) -> IntegerTail:
    """With one more static integer a column."""
    with edit.at(user):
        bias = edit.call(aten.neg.default, other) if subtracts else other
        if found.bias is not None:
            bias = edit.call(aten.add.Tensor, found.bias, bias)
    return replace(found, last=user, bias=bias)


def _corrected(
    edit: Editor, gemm: Gemm, found: IntegerTail, user: Node, other: Node
) -> IntegerTail | None:
    """With what is subtracted if it is a zero point times sums of rows."""
    if other.target is not aten.mul.Tensor:
        return None
    for zero, sums in (other.args, other.args[::-1]):
        if (
            isinstance(sums, Node)
            and isinstance(zero, Node)
            and found.weight_zero is None
            and column_like(zero, gemm.n)
            and edit.is_static(zero)
            and _sums_rows(sums, gemm.x)
        ):
            return replace(found, last=user, weight_zero=zero)
    for zero, sums in (other.args, other.args[::-1]):
        if (
            isinstance(sums, Node)
            and isinstance(zero, Node)
            and found.zero is None
            and column_like(sums, gemm.n)
            and row_like(zero, shape_of(gemm.node))
            and edit.is_static(sums)
        ):
            if _is_row_sum(edit, gemm, sums, 1):
                return replace(found, last=user, zero=zero)
            if found.weight_zero is not None and _is_row_sum(
                edit, gemm, sums, 1, found.weight_zero
            ):
                return replace(found, last=user, zero=zero, crossed=True)
    return None


def _is_cross(gemm: Gemm, found: IntegerTail, node: Node) -> bool:
    """Whether `node` is K * zero * weight_zero."""
    if found.zero is None or found.weight_zero is None:
        return False
    number, factors, stack = 1, [], [node]
    while stack:
        each: Any = _before_casts(stack.pop())
        if isinstance(each, int):
            number *= each
        elif isinstance(each, Node) and each.target is aten.mul.Tensor:
            stack.extend(each.args)  # type: ignore[arg-type]
        else:
            factors.append(each)
    zeros = [_before_casts(each) for each in (found.zero, found.weight_zero)]
    return number == gemm.k and factors in (zeros, zeros[::-1])


def _before_casts(each: Any) -> Any:
    while isinstance(each, Node) and each.target is CAST:
        each = each.args[0]
    return each


def _is_row_sum(
    edit: Editor, gemm: Gemm, node: Node, factor: int, zero: Node | None = None
) -> bool:
    """Whether `node` is factor * (sum of each row of the weight, less zero), for any weight."""
    with edit.undisturbed():
        weight, sums, *zeros = edit.values_of(gemm.weight, node, *([] if zero is None else [zero]))
        if gemm.layout == "kn":
            weight = weight.reshape(gemm.k, gemm.n).t()
        weight = weight.reshape(gemm.n, gemm.k).long()
        for each in zeros:
            weight = weight - each.long().reshape(-1, 1)
        # Synthetic zero points are of any size: sums in int32 wrap around.
        return torch.equal(sums.flatten(), (factor * weight.sum(1)).to(sums.dtype))


def _sums_rows(node: Node, x: Node) -> bool:
    """Whether `node` is x.sum(-1, keepdim=True) of the integer operand x [M, K]."""

    if node.meta["val"].dtype not in (torch.int32, torch.int64):
        return False
    node = _before_casts(node)
    if node.target is not aten.sum.dim_IntList or len(node.args) != 3:
        return False
    source, dims, keep = node.args
    last = len(shape_of(x)) - 1
    return bool(dims in ([-1], [last]) and keep and _before_casts(source) is _before_casts(x))


def as_float_bias(
    edit: Editor,
    bias: Node,
    columns: tuple[tuple[Node, bool], ...],
    rows: tuple[tuple[Node, bool], ...],
) -> Node:
    """An integer bias [N] times the scales that follow it, one of each row scale in all."""
    value = edit.call(aten.reshape.default, edit.call(CAST, bias, torch.float32), [-1])
    for scale, divides in (*columns, *rows):
        flat = edit.call(aten.reshape.default, scale, [-1])
        operation = aten.div.Tensor if divides else aten.mul.Tensor
        value = edit.call(operation, value, edit.call(CAST, flat, torch.float32))
    return value
