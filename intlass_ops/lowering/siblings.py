"""Work that linears share: one copy of equal computations, one GEMM for linears of one input.

Lives here: `merge_equal` (common subexpressions: without it q, k and v each quantise the same
activation), `fuse` (packed linears with the same activations become one wider GEMM) and `join` (so
do our own `IntLinear`s). Not here: which linears are swapped (linears.py), how fused weights are
packed (runtime.py), what joined ones run (joined.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ..nn import IntLinear, PackedLinear
from . import joined, records
from .editor import CAST, Editor, aten
from .graph_linear import GraphLinear
from .linears import path_of
from .program import is_pure
from .storage import BETWEEN

LINEAR: Any = torch.ops.intlass.linear_from_leaves.default
INT4: Any = torch.ops.intlass.matmul_int4_bf16_tn.default
INT8: Any = torch.ops.intlass.matmul_int8_bf16_tn.default
_LINEARS = tuple(each.__name__ for each in (IntLinear, PackedLinear, GraphLinear))
_SILU: Any = torch.ops.intlass.silu_mul_quantize.default


def _frozen(value: Any) -> Any:
    if isinstance(value, Node):
        return ("node", id(value))
    if isinstance(value, (list, tuple)):
        return ("list", *(_frozen(each) for each in value))
    if isinstance(value, dict):
        return ("dict", *((key, _frozen(value[key])) for key in sorted(value)))
    # 1, 1.0, True and -0.0 are equal or print alike, and mean different things.
    return (type(value).__name__, repr(value))


def _escaping(graph: Graph) -> set[Node]:
    """Nodes the caller gets, or gets a view of: merging two would make his tensors alias."""
    found: set[Node] = set()
    stack = list(next(node for node in graph.nodes if node.op == "output").all_input_nodes)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
            stack.extend(node.all_input_nodes)
    return found


def merge_equal(graph: Graph) -> int:
    """Replace pure nodes by an equal earlier one; returns how many."""
    escaping = _escaping(graph)
    known: dict[Any, Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if not is_pure(node.target):
            schema = getattr(node.target, "_schema", None)
            if schema is None or schema.is_mutable:
                # What follows may read something else under the same name.
                break
            continue
        if node in escaping or "empty" in str(node.target):
            continue
        key = (str(node.target), _frozen(node.args), _frozen(node.kwargs))
        earlier = known.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
            merged += 1
    return merged


def fuse(edit: Editor) -> int:
    """Join packed linears that read the same activations; returns how many GEMMs that saves."""
    families: dict[Any, list[Node]] = {}
    for node in edit.graph.nodes:
        if node.target is not LINEAR:
            continue
        x, leaves, recipe, a_scale, a_zero, bias, dtype = node.args
        batch = str(recipe).split("|", 3)[2]
        movable = all(each.op == "placeholder" for each in (*leaves, *_some(bias)))
        if batch != "1" or not movable:
            continue
        families.setdefault((x, a_scale, a_zero, dtype), []).append(node)
    saved = 0
    for (x, a_scale, a_zero, dtype), family in families.items():
        if len(family) > 1:
            _join(edit, family, x, a_scale, a_zero, dtype)
            saved += len(family) - 1
    return saved


def _some(node: Node | None) -> tuple[Node, ...]:
    return () if node is None else (node,)


def _joined_bias(edit: Editor, family: list[Node]) -> Node | None:
    """The members' biases in one vector, zeros for those without."""
    parts: list[Any] = [node.args[5] for node in family]
    known = [each.meta["val"].dtype for each in parts if each is not None]
    if not known:
        return None
    dtype = functools.reduce(torch.promote_types, known)
    for i, node in enumerate(family):
        value = node.meta["val"]
        if parts[i] is None:
            size = [value.shape[-1]]
            parts[i] = edit.call(aten.full.default, size, 0.0, dtype=dtype, device=value.device)
        elif parts[i].meta["val"].dtype != dtype:
            parts[i] = edit.call(CAST, parts[i], dtype)
    return edit.call(aten.cat.default, parts)


def _join(
    edit: Editor, family: list[Node], x: Node, a_scale: Any, a_zero: Any, dtype: torch.dtype
) -> None:
    """The first member's place is before all uses; leaves are placeholders, before everything."""
    leaves: list[Any] = []
    recipes: list[str] = []
    for node in family:
        leaves.extend(node.args[1])  # type: ignore[arg-type]
        recipes.append(str(node.args[2]))
    with edit.at(family[0]):
        bias = _joined_bias(edit, family)
        wide = edit.call(LINEAR, x, leaves, BETWEEN.join(recipes), a_scale, a_zero, bias, dtype)
        _split(edit, wide, family)


def _split(edit: Editor, wide: Node, family: Sequence[Node]) -> None:
    """The family's results, cut out of a joined one."""
    start = 0
    for node in family:
        n = node.meta["val"].shape[-1]
        part = edit.call(aten.slice.Tensor, wide, -1, start, start + n)
        # It reads rows at any distance; nothing else could fuse a copy into it.
        node.replace_all_uses_with(part, delete_user_cb=lambda user: user.target is _SILU)
        if node.users:
            # Downstream views were traced for a contiguous result; Inductor fuses the copy.
            part = edit.call(aten.clone.default, part, memory_format=torch.contiguous_format)
            node.replace_all_uses_with(part)
        start += n
    for node in family:
        edit.graph.erase_node(node)


def concerns(node: Node) -> bool:
    return node.target in (INT4, INT8)


def join(edit: Editor) -> int:
    """Join `IntLinear`s that read the same activations; returns how many GEMMs that saves.

    Whether their weights lie side by side is seen when the graph runs (joined.py).
    """
    families: dict[Any, list[_Own]] = {}
    for node in edit.graph.nodes:
        own = _own(node) if concerns(node) and is_int_linear(node) else None
        if own is not None:
            families.setdefault((node.target, own.shared), []).append(own)
    saved = 0
    for family in families.values():
        if len(family) > 1:
            _join_own(edit, family)
            saved += len(family) - 1
    return saved


@dataclass(frozen=True)
class _Own:
    """A call of one of our GEMMs: what it shares with those it can be joined to, and its own."""

    node: Node
    shared: tuple[Any, ...]  # forms of its tensors, x, k, a_scale, a_zero, out_dtype
    tensors: tuple[Node | None, ...]  # weight, scales, zeros, bias

    @property
    def rows(self) -> int:
        return int(self.tensors[0].meta["val"].shape[0])  # type: ignore[union-attr]


def is_int_linear(node: Node) -> bool:
    """Whether it is ours: others that call our ops never lay their weights side by side."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    kinds = [getattr(kind, "__name__", str(kind)) for _, kind in stack.values()]
    return bool(kinds) and kinds[-1].rsplit(".", 1)[-1] in _LINEARS


def arguments_of(node: Node) -> dict[str, Any]:
    """What a call of an op gives, by name."""
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _own(node: Node) -> _Own | None:
    given = arguments_of(node)
    int4 = node.target is INT4
    own = ("packed_w", "scales", "zeros", "bias") if int4 else ("b", "b_scale", "", "bias")
    tensors = tuple(given.get(name) for name in own)
    known = [each for each in tensors if each is not None]
    if any(given.get(name) is not None for name in ("alpha", "activation", "residual")) or any(
        each.op != "placeholder" or each.meta["val"].dim() == 0 for each in known
    ):
        return None
    values = [None if each is None else each.meta["val"] for each in tensors]
    forms = tuple(None if value is None else (value.dtype, value.shape[1:]) for value in values)
    shared = (given.get(name) for name in ("a", "k", "a_scale", "a_zero", "out_dtype"))
    return _Own(node, (forms, *shared), tensors)


def _join_own(edit: Editor, family: Sequence[_Own]) -> None:
    _, x, k, a_scale, a_zero, dtype = family[0].shared
    kinds = zip(*(own.tensors for own in family), strict=True)
    lists = [[each for each in kind if each is not None] for kind in kinds]
    width = sum(own.rows for own in family)
    why = "one GEMM with others of the same input, if their weights lie side by side"
    for own in family:
        records.record(decision_of(own.node, why, "siblings", width))
    with edit.at(family[0].node):
        wide = edit.call(joined.OP, x, *lists, k, a_scale, a_zero, dtype)
        _split(edit, wide, [own.node for own in family])


def decision_of(node: Node, why: str, rule: str, within: int | None = None) -> records.Decision:
    """What is told of a call of one of our GEMMs."""
    given, int4 = arguments_of(node), node.target is INT4
    weight, scales, a = (
        given[name].meta["val"]
        for name in (("packed_w", "scales", "a") if int4 else ("b", "b_scale", "a"))
    )
    k = given.get("k") or weight.shape[1] * (2 if int4 else 1)
    a_bits = {torch.int8: 8, torch.uint8: 4}.get(a.dtype, 16)
    return records.Decision(
        node=node.name,
        path=path_of(node),
        gemm=str(node.target),
        outcome=records.SWAPPED,
        scheme=f"w{4 if int4 else 8}a{a_bits}",
        reason=why,
        rule=rule,
        shape=(weight.shape[0], k),
        group_size=k // (scales.shape[1] if scales.dim() > 1 else 1),
        within=within,
    )
