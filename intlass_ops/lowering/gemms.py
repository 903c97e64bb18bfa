"""Matrix products of a graph in one normal form, whatever they are spelled with.

Lives here: `Gemm` and `find` (mm, addmm, bmm, baddbmm, _int_mm, linear and the mul-sum that
Inductor makes of matrix-vector products). Not here: what the operands mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

aten: Any = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_CAST = torch.ops.prims.convert_element_type.default
# What our ops read and write; a wider epilogue stays in the graph.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Gemm:
    """y[batch, M, N] = x[batch, M, K] @ w, one possible reading of `node`.

    layout: "kn" if `weight` is [.., K, N], "nk" if it is [.., N, K].
    flipped: the weight is the left operand, so `node` is yT and `x` is xT [K, M].
    vector: `node` is a mul-sum of a single row; x is [K] or [1, K] spelled with extra dimensions.
    """

    node: Node
    x: Node
    weight: Node
    layout: str
    batch: int
    n: int
    k: int
    bias: Node | None = None
    flipped: bool = False

    @property
    def integer(self) -> bool:
        return not self.node.meta["val"].dtype.is_floating_point


def shape_of(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def static_shape(node: Node) -> tuple[int, ...] | None:
    """The shape if every size is a plain number."""
    shape = shape_of(node)
    return shape if all(isinstance(size, int) for size in shape) else None


def _operand(
    node: Node, x: Node, weight: Node, bias: Node | None, *, left: bool, linear: bool = False
) -> Gemm | None:
    while weight.target in (*VIEWS, aten.expand.default) and len(shape_of(weight)) == 3:
        inner = weight.args[0]
        if weight.target in VIEWS and isinstance(inner, Node):
            if shape_of(inner) != shape_of(weight):
                break
            weight = inner
            continue
        # One weight seen by a whole batch: leading dimensions of x, not stacked weights.
        if not isinstance(inner, Node) or shape_of(inner)[-2:] != shape_of(weight)[-2:]:
            break
        weight = inner
    shape = static_shape(weight)
    if shape is None or len(shape) not in (2, 3) or 0 in shape:
        return None
    batch = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:]
    if left or linear:
        layout, n, k = "nk", rows, columns
    else:
        layout, n, k = "kn", columns, rows
    return Gemm(node, x, weight, layout, batch, n, k, bias, left)


def readings(node: Node) -> Iterator[Gemm]:
    """The ways `node` may be read as activations times a weight: weight right, then left."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    args: tuple[Any, ...] = node.args
    target = node.target
    bias: Node | None = None
    if target in (aten.mm.default, aten.bmm.default, aten._int_mm.default):
        a, b = args[0], args[1]
    elif target in (aten.addmm.default, aten.baddbmm.default):
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return
        bias, a, b = args[0], args[1], args[2]
    elif target is aten.linear.default:
        found = _operand(
            node, args[0], args[1], args[2] if len(args) > 2 else None, left=False, linear=True
        )
        if found is not None:
            yield found
        return
    elif target is aten.sum.dim_IntList:
        yield from _vector_product(node)
        return
    else:
        return
    for found in (
        _operand(node, a, b, bias, left=False),
        _operand(node, b, a, bias, left=True),
    ):
        if found is not None:
            yield found


def _vector_product(node: Node) -> Iterator[Gemm]:
    """(x[1, K, 1] * w[1, K, N]).sum(1): what Inductor makes of a one-row mm when it tunes."""
    product = node.args[0]
    if node.args[1:] != ([1],) or node.kwargs:
        return
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return
    left, right = product.args
    if not (
        isinstance(left, Node)
        and isinstance(right, Node)
        and left.target is right.target is aten.unsqueeze.default
        and (left.args[1], right.args[1]) == (2, 0)
    ):
        return
    x, weight = left.args[0], right.args[0]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if len(shape_of(x)) != 2 or len(shape_of(weight)) != 2 or shape_of(x)[0] != 1:
        return
    x, weight = (uncast(each) for each in (x, weight))
    found = _operand(node, x, weight, None, left=False)
    if found is not None:
        yield found


def uncast(node: Node) -> Node:
    """Before a widening to float32, which changes no value."""
    source = node.args[0] if node.target is _CAST else None
    narrow = isinstance(source, Node) and source.meta["val"].dtype in (
        torch.bfloat16,
        torch.float16,
    )
    if narrow and node.meta["val"].dtype == torch.float32:
        assert isinstance(source, Node)
        return source
    return node


def is_gemm(node: Node) -> bool:
    return next(readings(node), None) is not None


@dataclass(frozen=True)
class Epilogue:
    """What follows a GEMM and can be folded into it: views to replay, scales, a bias.

    last: the node whose value the fused op (after `views`) takes over.
    """

    last: Node
    views: tuple[Node, ...] = ()
    column_scales: tuple[tuple[Node, bool], ...] = ()  # (per-channel node, whether it divides)
    row_scales: tuple[tuple[Node, bool], ...] = ()
    bias: Node | None = None


def column_like(node: Any, n: int) -> bool:
    """Whether `node` broadcasts against [..., N] as one value per column."""
    shape = shape_of(node) if isinstance(node, Node) else ()
    return (
        bool(shape)
        and shape[-1] == n
        and isinstance(shape[-1], int)
        and all(isinstance(size, int) and size == 1 for size in shape[:-1])
    )


def row_like(node: Any, output: tuple[Any, ...]) -> bool:
    """Whether `node` holds one value per row of `output` [..., M, N], or one in all."""
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    shape = shape_of(node)
    if all(isinstance(size, int) for size in shape) and math.prod(shape) == 1:
        return True
    return (
        len(shape) == len(output)
        and isinstance(shape[-1], int)
        and shape[-1] == 1
        and all(same_size(s, t) for s, t in zip(shape[:-1], output[:-1], strict=True))
    )


def _unexpanded(node: Node) -> Node:
    """Before a broadcast along N that keeps the number of dimensions: one value a row."""
    inner = node.args[0] if node.target is aten.expand.default else None
    if isinstance(inner, Node) and len(shape_of(inner)) == len(shape_of(node)) > 0:
        return inner
    return node


def _factors(node: Node, output: tuple[Any, ...]) -> list[Node]:
    """A scale for every element of the output spelled as (one a row) * (one a column), in parts."""
    if node.target is not aten.mul.Tensor or len(shape_of(node)) != len(output):
        return [node]
    whole = all(same_size(s, t) for s, t in zip(shape_of(node), output, strict=True))
    parts = [_unexpanded(each) for each in node.args if isinstance(each, Node)]
    return parts if whole and len(parts) == 2 and parts[0] is not parts[1] else [node]


def _on_columns(node: Node, n: int) -> bool:
    return column_like(node, n) or _single(node)


def _single(node: Node) -> bool:
    shape = static_shape(node)
    return "val" in node.meta and shape is not None and math.prod(shape) == 1


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal whatever their symbols are. Comparing these would add a guard."""
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return bool(one.node.expr == other.node.expr)


def _rounds(wide: Node, cast: Node) -> bool:
    """Whether a cast rounds float32, as the fused op rounds its own result."""
    return bool(wide.meta["val"].dtype == torch.float32 != cast.meta["val"].dtype)


def epilogue(
    gemm: Gemm,
    *,
    rows: bool,
    is_static: Callable[[Node], bool],
    start: Node | None = None,
) -> Epilogue:
    """Follow the single users of a GEMM through views, casts, scales, a bias and a last rounding.

    start: a node to take for the GEMM's result instead of the GEMM itself.
    """
    first = start or gemm.node
    found = Epilogue(first)
    pending: list[Node] = []
    columns: list[tuple[Node, bool]] = []
    row_scales: list[tuple[Node, bool]] = []
    current = first
    if gemm.flipped or gemm.batch != 1:
        return found
    while len(current.users) == 1:
        user = next(iter(current.users))
        shape = shape_of(user)
        if user.op != "call_function" or not shape or not same_size(shape[-1], gemm.n):
            break
        if user.target in VIEWS:
            pending.append(user)
            current = user
            continue
        if user.meta["val"].dtype not in FLOATS:
            break
        if user.target is _CAST:
            current = user
            if gemm.integer and not (row_scales or columns or found.bias):
                # The first float after an integer sum: at worst the fused op ends here.
                found = Epilogue(user, tuple(pending))
            elif found.last is not first and _rounds(found.last, user):
                found = replace(found, last=user, views=tuple(pending))
            continue
        if user.target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor) or found.bias:
            break
        left, right = user.args[:2]
        other = right if left is current else left
        if not isinstance(other, Node) or other is current or user.kwargs:
            break
        other = _unexpanded(other)
        if user.target is aten.add.Tensor:
            if gemm.bias is not None or not column_like(other, gemm.n):
                break
            found = Epilogue(user, tuple(pending), tuple(columns), tuple(row_scales), other)
            current = user
            continue
        divides = user.target is aten.div.Tensor
        if divides and left is not current:
            break
        if gemm.bias is not None:
            break
        factors = _factors(other, shape)
        on_columns = [each for each in factors if _on_columns(each, gemm.n) and is_static(each)]
        on_rows = [each for each in factors if each not in on_columns]
        if on_rows and not (rows and all(row_like(each, shape) for each in on_rows)):
            break
        columns.extend((each, divides) for each in on_columns)
        row_scales.extend((each, divides) for each in on_rows)
        current = user
        found = Epilogue(user, tuple(pending), tuple(columns), tuple(row_scales), None)
    return found
