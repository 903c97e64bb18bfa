"""What a matched linear becomes: a table of named rules, and the decision for one GEMM.

Lives here: `RULES` (first whose condition holds wins) and `lower`, which reads one GEMM, asks
weights.py and activations.py what its operands mean, and applies a rule. Not here: the graph walk
(graph_pass.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .editor import Editor, Slice, aten
from .gemms import Epilogue, Gemm, epilogue, readings, shape_of
from .program import NotASlice, walk
from .records import DECLINED, DENSE, SWAPPED, Decision
from .weights import NotAffine, WeightForm

A16 = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Match:
    """Everything known about one linear that will be swapped."""

    gemm: Gemm
    piece: Slice
    form: WeightForm
    tail: Epilogue
    x: Node
    a_scale: Node | None
    a_zero: Node | None

    @property
    def out_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tail.last.meta["val"].dtype
        return dtype

    @property
    def scheme(self) -> str:
        activation = 16 if self.x.meta["val"].dtype.is_floating_point else 8
        return f"w{self.form.bits}a{activation}"


@dataclass(frozen=True)
class Rule:
    """name: counted and shown. applies: when. emit: the GEMM's new nodes, [.., M, N]."""

    name: str
    applies: Callable[[Match], bool]
    emit: Callable[[Editor, Match, Node | None], Node]
    why: str


def _is_direct(m: Match) -> bool:
    form = m.form
    return (
        m.gemm.batch == 1
        and form.codes_leaf is not None
        and not form.has_zeros
        and form.scale_value is not None
        and m.piece.node_of(form.scale_value) is not None
    )


def _emit_direct(edit: Editor, m: Match, bias: Node | None) -> Node:
    assert m.form.codes_leaf is not None and m.form.scale_value is not None
    weight = m.piece.node_of(m.form.codes_leaf)
    scale = m.piece.node_of(m.form.scale_value)
    assert weight is not None and scale is not None
    flat = scale.meta["val"].numel()
    if shape_of(scale) not in ((flat,), ()):
        scale = edit.call(aten.reshape.default, scale, [flat])
    return edit.call(
        torch.ops.intlass.matmul_int8_bf16_tn.default,
        m.x,
        weight,
        m.a_scale,
        scale,
        a_zero=m.a_zero,
        bias=bias,
        out_dtype=m.out_dtype,
    )


def _emit_ones(edit: Editor, m: Match, bias: Node | None) -> Node:
    assert m.form.codes_leaf is not None
    weight = m.piece.node_of(m.form.codes_leaf)
    assert weight is not None
    one = edit.call(
        aten.full.default, [], 1.0, dtype=torch.float32, device=m.x.meta["val"].device
    )
    return edit.call(
        torch.ops.intlass.matmul_int8_bf16_tn.default,
        m.x,
        weight,
        m.a_scale,
        one,
        a_zero=m.a_zero,
        bias=bias,
        out_dtype=m.out_dtype,
    )


def _emit_packed(edit: Editor, m: Match, bias: Node | None) -> Node:
    return edit.call(
        torch.ops.intlass.linear_from_leaves.default,
        m.x,
        list(m.piece.leaves),
        m.form.recipe.text(),
        m.a_scale,
        m.a_zero,
        bias,
        m.out_dtype,
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "int8_codes_unscaled",
        lambda m: m.gemm.batch == 1 and m.form.codes_leaf is not None and m.form.codes_are_weight,
        _emit_ones,
        "the int8 leaf is the weight; its scale, if any, stays in the graph",
    ),
    Rule(
        "int8_leaf_read_in_place",
        _is_direct,
        _emit_direct,
        "the int8 leaf already is W[N, K] with one scale per row: nothing to pack",
    ),
    Rule(
        "packed_from_leaves",
        lambda m: True,
        _emit_packed,
        "codes, scales and zeros are recovered from the leaves once and packed",
    ),
)

_INTEGERS = ("quantize", "round", "floor", "trunc", "ceil", "bitwise", "shift")


def _looks_quantised(piece: Slice) -> bool:
    """Whether a slice has integers in it at all: a plain float weight needs no probing."""
    if any(not m.dtype.is_floating_point and m.dtype != torch.bool for m in piece.metas):
        return True
    return any(any(word in op.target for word in _INTEGERS) for op in piece.program.operations)


def path_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return paths[-1] if paths else ""


def lower(edit: Editor, node: Node) -> Decision | None:
    """Rewrite `node` if it is a quantised linear; None if it is no GEMM of a static weight."""
    dense: Decision | None = None
    for gemm in readings(node):
        try:
            walk(gemm.weight, edit.is_leaf)
            piece = edit.slice_of(gemm, ())
        except NotASlice:
            continue
        if not _looks_quantised(piece):
            if all(edit.certain_leaf(leaf) for leaf in piece.leaves):
                dense = dense or _decide(gemm, DENSE, "dense", "a floating-point weight")
            continue
        try:
            return _apply(edit, _match(edit, gemm))
        except (NotASlice, NotAffine) as problem:
            return _decide(gemm, DECLINED, "quantised", str(problem))
    return dense


def _decide(
    gemm: Gemm, outcome: str, scheme: str, reason: str, rule: str = "", group: int | None = None
) -> Decision:
    return Decision(
        node=gemm.node.name,
        path=path_of(gemm.node),
        gemm=str(gemm.node.target),
        outcome=outcome,
        scheme=scheme,
        reason=reason,
        rule=rule,
        shape=(gemm.n, gemm.k),
        group_size=group,
    )


def _match(edit: Editor, gemm: Gemm) -> Match:
    if gemm.node.meta.get("partitioner_tag") == "is_backward":
        raise NotAffine("a gradient GEMM: its groups run along the output")
    x, a_scale, a_zero = gemm.x, None, None
    dtype = x.meta["val"].dtype
    if dtype not in A16:
        raise NotAffine(f"activations are {dtype}")
    tail = epilogue(gemm, rows=False, is_static=edit.is_static)
    piece = edit.slice_of(gemm, tail.column_scales)
    form = edit.probe(gemm, piece)
    if edit.training and not any(
        not meta.dtype.is_floating_point and meta.dtype != torch.bool for meta in piece.metas
    ):
        raise NotAffine("the weight is quantised from a float one that trains: repacked each step")
    return Match(gemm, piece, form, tail, x, a_scale, a_zero)


def _apply(edit: Editor, match: Match) -> Decision:
    rule = next(rule for rule in RULES if rule.applies(match))
    gemm, last = match.gemm, match.tail.last
    with edit.at(last):
        bias = match.tail.bias or gemm.bias
        late_bias: Node | None = None
        if bias is not None and (gemm.flipped or not _is_vector(bias, gemm.n)):
            bias, late_bias = None, bias
        if bias is not None and len(shape_of(bias)) != 1:
            bias = edit.call(aten.reshape.default, bias, [gemm.n])
        if gemm.flipped:
            x = _transposed(edit, match.x)
            match = Match(gemm, match.piece, match.form, match.tail, x, None, None)
        new = rule.emit(edit, match, bias)
        if gemm.flipped:
            new = _transposed(edit, new)
        if late_bias is not None:
            new = edit.call(aten.add.Tensor, new, late_bias)
        for view in match.tail.views:
            new = edit.call(view.target, new, *view.args[1:])
    last.replace_all_uses_with(new)
    decision = _decide(gemm, SWAPPED, match.scheme, rule.why, rule.name, match.form.group_size)
    return decision


def _is_vector(node: Node, n: int) -> bool:
    shape = shape_of(node)
    return bool(shape) and shape[-1] == n and node.meta["val"].numel() == n


def _transposed(edit: Editor, node: Node) -> Node:
    dims = list(range(len(shape_of(node))))
    dims[-1], dims[-2] = dims[-2], dims[-1]
    return edit.call(aten.permute.default, node, dims)


def is_swapped(node: Any) -> bool:
    return isinstance(node, Node) and "intlass." in str(node.target)
