"""What a matched linear becomes: a table of named rules, and the decision for one GEMM.

Lives here: `RULES` (first whose condition holds wins) and `lower`, which reads one GEMM, asks
weights.py and activations.py what its operands mean, and applies a rule. Not here: the graph walk
(graph_pass.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from . import activations, adapters, integer_sums
from .activations import Activation
from .editor import CAST, Editor, Slice, aten, looks_quantised
from .gemms import Epilogue, Gemm, epilogue, is_gemm, readings, shape_of
from .probing import WeightForm
from .program import NotASlice, walk
from .records import DECLINED, DENSE, SWAPPED, Decision
from .weights import NotAffine

# The unsigned detour was recognised and undone: signed codes, no zero point.
SHIFTED = "shifted"
INTERNAL = "internal error"
A16 = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Match:
    """Everything known about one linear that will be swapped."""

    gemm: Gemm
    piece: Slice
    form: WeightForm
    tail: Epilogue
    activation: Activation | None
    x: Node
    a_scale: Node | None = None
    a_zero: Node | None = None
    integer_bias: Node | None = None

    @property
    def out_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tail.last.meta["val"].dtype
        return dtype

    @property
    def scheme(self) -> str:
        return f"w{self.form.bits}a{16 if self.activation is None else 8}"


@dataclass(frozen=True)
class Rule:
    """name: counted and shown. applies: when. emit: the GEMM's new nodes, [.., M, N]."""

    name: str
    applies: Callable[[Match], bool]
    emit: Callable[[Editor, Match, Node | None], Node]
    why: str


def _scale_node(m: Match) -> Node | None:
    found = (m.piece.node_of(i) for i in m.form.scale_values)
    return next((node for node in found if node is not None), None)


def _is_direct(m: Match) -> bool:
    plain = m.gemm.batch == 1 and m.form.codes_leaf is not None and not m.form.has_zeros
    return plain and _scale_node(m) is not None


def _emit_direct(edit: Editor, m: Match, bias: Node | None) -> Node:
    assert m.form.codes_leaf is not None
    weight, scale = m.piece.node_of(m.form.codes_leaf), _scale_node(m)
    assert weight is not None
    assert scale is not None
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
    one = edit.call(aten.full.default, [], 1.0, dtype=torch.float32, device=m.x.meta["val"].device)
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


# Dynamo names a module as the frame found it: L['self'].layers.0, or ._modules['0'].
_ROOT = re.compile(r"^L\['\w+'\]\.?")
_ITEM = re.compile(r"\.?(?:_modules)?\['?(\w+)'?\]")


def path_of(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return _ITEM.sub(r".\1", _ROOT.sub("", paths[-1])).lstrip(".") if paths else ""


def lower(edit: Editor, node: Node) -> Decision | None:
    """Rewrite `node` if it is a quantised linear; None if it is no GEMM of a static weight."""
    dense: Decision | None = None
    opaque = adapters.opaque_reason(node)
    if opaque is not None:
        return _declined(node, opaque)
    adapter = adapters.ADAPTERS.get(str(node.target))
    if adapter is not None:
        try:
            found = [adapter(edit, node)]
        except NotAffine as problem:
            return _declined(node, str(problem))
    else:
        found = list(readings(node))
    for gemm in found:
        try:
            walk(gemm.weight, edit.is_leaf)
            piece = edit.slice_of(gemm, ())
        except NotASlice:
            continue
        operations = [op.target for op in piece.program.operations]
        if not looks_quantised([meta.dtype for meta in piece.metas], operations):
            if all(edit.certain_leaf(leaf) for leaf in piece.leaves):
                dense = dense or _decide(gemm, DENSE, "dense", "a floating-point weight")
            continue
        try:
            return _apply(edit, _match(edit, gemm))
        except (NotASlice, NotAffine) as problem:
            return _decide(gemm, DECLINED, "quantised", str(problem))
        except Exception as problem:
            # Nothing is replaced before everything is emitted: the graph still is the user's.
            # A compile must not fail for want of a rewrite; tests fail on this reason.
            reason = f"{INTERNAL}: {type(problem).__name__}: {str(problem).splitlines()[:1]}"
            return _decide(gemm, DECLINED, "quantised", reason)
    return dense


def _declined(node: Node, reason: str) -> Decision:
    return Decision(node.name, path_of(node), str(node.target), DECLINED, "quantised", reason)


def concerns(node: Node) -> bool:
    """Whether `lower` has anything to say about a node."""
    if node.op != "call_function":
        return False
    name = str(node.target)
    return name in adapters.ADAPTERS or adapters.opaque_reason(node) is not None or is_gemm(node)


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
    activation = None if gemm.flipped else activations.match(edit, gemm.x)
    dtype = gemm.x.meta["val"].dtype
    if activation is None and dtype not in A16:
        raise NotAffine(f"activations are {dtype}")
    sums = integer_sums.read(edit, gemm) if gemm.integer else None
    if sums is not None and sums.unshifted:
        activation = Activation(gemm.x, None, SHIFTED)
    if sums is not None and sums.zero is not None:
        if activation is None or activation.zero is not None:
            raise NotAffine("the activations have two zero points")
        activation = replace(activation, zero=sums.zero)
    start = None if sums is None else sums.last
    tail = epilogue(gemm, rows=gemm.integer, is_static=edit.is_static, start=start)
    if not tail.last.meta["val"].dtype.is_floating_point:
        raise NotAffine("the integer result is used as integers")
    piece = edit.slice_of(gemm, tail.column_scales)
    form = edit.probe(gemm, piece)
    if edit.training and not any(
        not meta.dtype.is_floating_point and meta.dtype != torch.bool for meta in piece.metas
    ):
        raise NotAffine("the weight is quantised from a float one that trains: repacked each step")
    bias = None if sums is None else sums.bias
    if bias is not None and any(_many(each) for each in tail.row_scales):
        raise NotAffine("an integer bias before a scale per row")
    return Match(gemm, piece, form, tail, activation, gemm.x, integer_bias=bias)


def _many(node: Node) -> bool:
    numel = node.meta["val"].numel()
    return not isinstance(numel, int) or numel != 1


def _operands(edit: Editor, match: Match) -> Match:
    """Emit what the op takes as x, a_scale and a_zero."""
    gemm, found = match.gemm, match.activation
    if gemm.flipped:
        return replace(match, x=_transposed(edit, match.x))
    if found is None:
        return match
    lead = [1, -1] if len(shape_of(match.x)) == 3 and gemm.batch == 1 else [-1]
    if gemm.batch != 1:
        lead = [gemm.batch, -1]
    x = activations.signed(edit, found.codes)
    if len(shape_of(x)) != len(lead) + 1:
        x = edit.call(aten.reshape.default, x, [*lead, gemm.k])
    scale = _parameter(edit, found.scale, lead, x)
    for each in match.tail.row_scales:
        more = _parameter(edit, each, lead, x)
        scale = more if scale is None else edit.call(aten.mul.Tensor, scale, more)
    zero = None
    if found.zero is not SHIFTED:
        zero = _parameter(edit, found.zero, lead, x)
        if found.unsigned:
            zero = (
                _parameter(edit, -128.0, lead, x)
                if zero is None
                else edit.call(aten.sub.Tensor, zero, 128)
            )
    return replace(match, x=x, a_scale=scale, a_zero=zero)


def _parameter(edit: Editor, value: Node | float | str | None, lead: list[int], x: Node) -> Any:
    """A scale or zero point as a float32 [.., M, 1] or one-element node."""
    if value is None:
        return None
    if not isinstance(value, Node):
        device = x.meta["val"].device
        return edit.call(aten.full.default, [1], float(value), dtype=torch.float32, device=device)
    if value.meta["val"].dtype != torch.float32:
        value = edit.call(CAST, value, torch.float32)
    single = value.meta["val"].numel()
    shape = [1] if isinstance(single, int) and single == 1 else [*lead, 1]
    return edit.call(aten.reshape.default, value, shape)


def _apply(edit: Editor, match: Match) -> Decision:
    gemm, last = match.gemm, match.tail.last
    rule = next(rule for rule in RULES if rule.applies(match))
    with edit.at(last):
        bias = match.tail.bias or gemm.bias
        late_bias: Node | None = None
        if bias is not None and (gemm.flipped or not _is_vector(bias, gemm.n)):
            bias, late_bias = None, bias
        if bias is not None and len(shape_of(bias)) != 1:
            bias = edit.call(aten.reshape.default, bias, [gemm.n])
        if match.integer_bias is not None:
            tail = match.tail
            more = integer_sums.as_float_bias(
                edit, match.integer_bias, tail.column_scales, tail.row_scales
            )
            bias = more if bias is None else edit.call(aten.add.Tensor, bias, more)
        match = _operands(edit, match)
        new = rule.emit(edit, match, bias)
        if gemm.flipped:
            new = _transposed(edit, new)
        if late_bias is not None:
            new = edit.call(aten.add.Tensor, new, late_bias)
        for view in match.tail.views:
            new = edit.call(view.target, new, *view.args[1:])
    last.replace_all_uses_with(new)
    return _decide(gemm, SWAPPED, match.scheme, rule.why, rule.name, match.form.group_size)


def _is_vector(node: Node, n: int) -> bool:
    shape = shape_of(node)
    return bool(shape) and shape[-1] == n and node.meta["val"].numel() == n


def _transposed(edit: Editor, node: Node) -> Node:
    dims = list(range(len(shape_of(node))))
    dims[-1], dims[-2] = dims[-2], dims[-1]
    return edit.call(aten.permute.default, node, dims)
