"""Work that linears share: one copy of equal computations, one GEMM for linears of one input.

Lives here: `merge_equal` (common subexpressions: without it q, k and v each quantise the same
activation) and `fuse` (packed linears with the same activations become one wider GEMM). Not here:
which linears are swapped (linears.py), how fused weights are packed (runtime.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from .editor import CAST, Editor, aten
from .program import is_pure

LINEAR: Any = torch.ops.intlass.linear_from_leaves.default


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
        wide = edit.call(LINEAR, x, leaves, "\n".join(recipes), a_scale, a_zero, bias, dtype)
        start = 0
        for node in family:
            n = node.meta["val"].shape[-1]
            part = edit.call(aten.slice.Tensor, wide, -1, start, start + n)
            # Downstream views were traced for a contiguous result; Inductor fuses the copy.
            part = edit.call(aten.clone.default, part, memory_format=torch.contiguous_format)
            node.replace_all_uses_with(part)
            start += n
    for node in family:
        edit.graph.erase_node(node)
