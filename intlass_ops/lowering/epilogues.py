"""What follows a swapped linear and its kernel can do before it rounds: an activation, a residual.

Lives here: `fuse`. An activation is recognised by what it computes, not by its spelling: whatever
elementwise nodes lie between a linear and the first result that anything else reads are evaluated
on samples, and compared. It is taken if nothing else reads the linear, so from no linear that was
joined with others (siblings.py), and not where a quantiser has taken it in (quantisers.py).

A residual is taken only where the sum goes into our own fused norm (`rms_norm_quantize`), which
leaves the addition a kernel of its own. Elsewhere Inductor adds while it computes the norm, for
nothing. Not here: what the kernels do (cuda/epilogue.cuh).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import reference
from . import records, siblings
from .editor import CAST, Editor, aten
from .gemms import FLOATS, VIEWS, shape_of
from .program import is_pure

_GEMMS = (siblings.INT4, siblings.INT8, siblings.LINEAR)
_NORM: Any = torch.ops.intlass.rms_norm_quantize.default
_POINTWISE = (
    CAST,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.exp.default,
    aten.erf.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
)
_MOST_NODES = 24  # of an activation
_CLOSE = 1e-7  # relative: some spell their constants with ten digits
_STEEPEST = 1.13  # the largest slope of an activation: an error before is at most so much after


def fuse(edit: Editor) -> int:
    """Returns how many activations and residuals were taken in."""
    fused = 0
    for node in [node for node in edit.graph.nodes if _is_linear(node)]:
        linear = node
        found = _activation(edit, linear)
        if found is not None:
            name, last, rounded = found
            linear = _take(edit, linear, last, linear, activation=name)
            _tell(linear, f"{name} in its epilogue", rounded)
            fused += 1
        total, residual = _residual(linear)
        if total is not None:
            linear = _take(edit, linear, total, total, residual=residual)
            _tell(linear, "a residual in its epilogue", 1)
            fused += 1
    return fused


def _is_linear(node: Node) -> bool:
    """A linear that we put there, or one of our modules; not the ops in somebody's own code."""
    if node.target not in _GEMMS or node.meta["val"].dtype not in FLOATS:
        return False
    given = siblings.arguments_of(node)
    taken = given.get("activation") is not None or given.get("residual") is not None
    return not taken and (records.META in node.meta or siblings.is_int_linear(node))


def _views(node: Node) -> list[Node]:
    """The views of a linear's result that are all that reads it, one after the other."""
    views: list[Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in VIEWS or shape_of(user)[-1:] != shape_of(node)[-1:]:
            break
        views.append(user)
        node = user
    return views


def _take(edit: Editor, linear: Node, last: Node, place: Node, **more: Any) -> Node:
    """The linear with ``more``, before ``place``, and in the stead of ``last`` its result."""
    views = _views(linear)
    with edit.at(place):
        residual = more.get("residual")
        if residual is not None and views:
            more["residual"] = edit.call(aten.reshape.default, residual, _sizes(linear))
        new = edit.call(linear.target, *linear.args, **{**linear.kwargs, **more})
        new.meta.update((key, value) for key, value in linear.meta.items() if key != "val")
    result = new
    with edit.at(last):  # sizes of views may be computed after the linear
        for view in views:
            result = edit.call(view.target, result, *view.args[1:])
    last.replace_all_uses_with(result)
    for old in (last, *reversed(views), linear):
        if not old.users:
            edit.graph.erase_node(old)
    return new


def _sizes(node: Node) -> list[int]:
    """The shape of a linear's result as a view names it."""
    return [size if isinstance(size, int) else -1 for size in shape_of(node)]


def _activation(edit: Editor, linear: Node) -> tuple[str, Node, int] | None:
    """Its name, the node that has its result, and how often the graph rounds until there."""
    start = [linear, *_views(linear)][-1]
    dtype = start.meta["val"].dtype
    nodes = _pointwise_from(start)
    for last in reversed(nodes[1:]):
        if last.meta["val"].dtype != dtype:
            continue
        inner = _between(nodes, start, last)
        if inner is None:
            continue
        name = _name_of(edit, start, inner)
        if name is not None:
            rounded = sum(each.meta["val"].dtype == dtype for each in inner)
            return name, last, rounded
    return None


def _pointwise_from(start: Node) -> list[Node]:
    """The elementwise nodes that depend on a node and on numbers alone, each after its inputs."""
    found = [start]
    for node in found:
        for user in node.users:
            inputs = user.all_input_nodes
            if (
                user not in found
                and len(found) <= _MOST_NODES
                and user.target in _POINTWISE
                and all(each in found for each in inputs)
                and user.meta["val"].dtype in FLOATS
            ):
                found.append(user)
    return found


def _between(nodes: Sequence[Node], start: Node, last: Node) -> list[Node] | None:
    """What ``last`` is computed by, it included; None if others read a part of it."""
    inner, stack = {start}, [last]
    while stack:
        node = stack.pop()
        if node not in inner:
            inner.add(node)
            stack.extend(node.all_input_nodes)
    if any(user not in inner for node in inner - {last} for user in node.users):
        return None
    return [node for node in nodes[1:] if node in inner]


def _name_of(edit: Editor, start: Node, inner: Sequence[Node]) -> str | None:
    """The activation that these nodes compute of ``start``, were there no rounding."""
    with edit.undisturbed(), torch.no_grad():
        far = torch.tensor([-1e3, -100.0, -30.0, 30.0, 100.0, 1e3], dtype=torch.float64)
        v = torch.cat([torch.linspace(-12, 12, 241, dtype=torch.float64), far])
        values: dict[Node, Tensor] = {start: v}
        for node in inner:
            compute: Any = node.target
            of: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: values[each])
            values[node] = of[0][0] if compute is CAST else compute(*of[0], **of[1])
        y = values[inner[-1]]
        for name, activation in reference.ACTIVATIONS.items():
            if bool(((y - activation(v)).abs() <= _CLOSE * v.abs()).all()):
                return name
    return None


def _residual(linear: Node) -> tuple[Node | None, Node | None]:
    """The sum of a linear and something else that our norm reads, and what is added."""
    start = [linear, *_views(linear)][-1]
    total = next(iter(start.users), None)
    if total is None or total.target is not aten.add.Tensor or len(start.users) != 1:
        return None, None
    if total.kwargs or not any(each.target is _NORM for each in total.users):
        return None, None
    left, right = total.args[:2]
    other = right if left is start else left
    if not isinstance(other, Node) or other is start:
        return None, None
    values = [each.meta["val"] for each in (start, other, total)]
    alike = len({(v.dtype, tuple(map(str, v.shape))) for v in values}) == 1
    nameable = start is linear or _sizes(linear).count(-1) <= 1
    return (total, other) if alike and nameable and _unchanged(linear, total) else (None, None)


def _unchanged(first: Node, last: Node) -> bool:
    """Whether nothing in between writes to what the first one reads."""
    node = first.next
    while node is not last:
        if node.op == "call_function" and not is_pure(node.target):
            return False
        node = node.next
    return True


def _tell(linear: Node, what: str, rounded: int) -> None:
    """Each time the graph rounded on the way counts as half an eps, like the linear's own."""
    eps = torch.finfo(linear.meta["val"].dtype).eps
    more = (rounded + 1) * eps / 2
    before = linear.meta.get(records.META)
    if before is None:
        before = siblings.decision_of(linear, what, "epilogue")
        after = replace(before, bound=_STEEPEST * more)
        records.record(after)
    else:
        bound = None if before.bound is None else _STEEPEST * (before.bound + more)
        after = replace(before, reason=f"{before.reason}; {what}", bound=bound)
        records.amend(before, after)
    linear.meta[records.META] = after
