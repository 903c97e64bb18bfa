"""One matrix product of a graph: whether it is a quantised linear, and its replacement.

Lives here: `lower`, which reads one GEMM, asks weights.py and activations.py what its operands
mean, and applies the first rule of rules.py that holds. Not here: the graph walk (graph_pass.py),
what is emitted for the product itself (rules.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from . import activations, adapters, columns, four_bits, full_range, integer_sums
from .activations import Activation
from .editor import CAST, Editor, Slice, aten, looks_quantised
from .fp8 import is_code_type
from .gemms import FLOATS, Epilogue, Gemm, epilogue, is_gemm, readings, shape_of
from .probing import WeightForm
from .program import NotASlice, TooLong, walk
from .records import DECLINED, DENSE, META, SWAPPED, Decision
from .rules import RULES, Match
from .weights import NotAffine

# The unsigned detour was recognised and undone: signed codes, no zero point.
SHIFTED = "shifted"
INTERNAL = "internal error"
PICKED = "a computed index picks its weight (experts of each token?)"

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
    picked: Decision | None = None
    opaque = adapters.opaque_reason(node)
    if opaque is not None:
        return _declined(node, opaque)
    adapter = adapters.ADAPTERS.get(str(node.target))
    try:
        if adapter is not None:
            found = [adapter(edit, node)]
        else:
            found = [four_bits.spelled_out(edit, gemm) for gemm in readings(node)]
    except NotAffine as problem:
        return _declined(node, str(problem))
    except Exception as problem:
        return _declined(node, _internal(problem))
    for gemm in found:
        if edit.is_static(gemm.x):
            continue  # a weight made of two others: no activations to multiply
        try:
            leaves, inner = walk(gemm.weight, edit.is_leaf)
            piece = edit.slice_of(gemm, ())
        except TooLong as problem:
            if edit.quantised_at_length(gemm.weight):
                return _decide(gemm, DECLINED, "quantised", str(problem))
            continue
        except NotASlice:
            if edit.picked(gemm.weight):
                picked = _decide(gemm, DECLINED, "quantised", PICKED)
            continue
        if not looks_quantised(leaves, inner):
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
            return _decide(gemm, DECLINED, "quantised", _internal(problem))
    return dense or picked


def _internal(problem: Exception) -> str:
    return f"{INTERNAL}: {type(problem).__name__}: {str(problem).splitlines()[:1]}"


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
    gemm = integer_sums.without_padding(gemm)
    activation = None if gemm.flipped else activations.match(edit, gemm.x)
    dtype = gemm.x.meta["val"].dtype
    if activation is None and dtype not in FLOATS:
        where = ", right of the weight" if gemm.flipped else ""
        raise NotAffine(f"activations are {dtype}{where}")
    sums = integer_sums.read(edit, gemm) if gemm.integer else None
    if sums is not None and sums.unshifted:
        activation = Activation(gemm.x, None, SHIFTED)
    if sums is not None and sums.zero is not None:
        if activation is None or activation.zero is not None:
            raise NotAffine("the activations have two zero points")
        activation = replace(activation, zero=sums.zero)
    start = None if sums is None else sums.last
    weight_zero = None if sums is None else sums.weight_zero

    def tail_of(is_static: Callable[[Node], bool]) -> Epilogue:
        return epilogue(gemm, rows=gemm.integer, is_static=is_static, start=start)

    def weight_of(tail: Epilogue) -> tuple[Slice, WeightForm]:
        piece = edit.slice_of(gemm, tail.column_scales, weight_zero)
        return piece, edit.probe(gemm, piece)

    tail = tail_of(edit.is_static)
    try:
        piece, form = weight_of(tail)
    except NotAffine:
        if not tail.column_scales:
            raise
        # They may be no scales of codes but made of them, as the norm of the weight is.
        tail = tail_of(lambda _: False)
        piece, form = weight_of(tail)
    if not tail.last.meta["val"].dtype.is_floating_point:
        user = next(iter(tail.last.users), None)
        onto = "an output" if user is None or user.op == "output" else str(user.target)
        raise NotAffine(f"the integer product goes on as integers, to {onto}")
    both = weight_zero is not None and activation is not None and activation.zero is not None
    if both and not (sums is not None and sums.crossed):
        raise NotAffine("zero points of activations and weight without their product")
    if form.columns is not None and activation is not None:
        if dtype not in FLOATS:
            raise NotAffine("scales per column, of activations that are codes")
        activation = None
    if (form.fp8 or form.looked_up) and activation is not None:
        if dtype not in FLOATS:
            weights = "FP8 weights" if form.fp8 else "weights that codes look up"
            raise NotAffine(f"{weights} under activations that are integers")
        activation = None
    if edit.training and not any(is_code_type(meta.dtype) for meta in piece.metas):
        raise NotAffine("the weight is quantised from a float one that trains: repacked each step")
    bias = None if sums is None else sums.bias
    if bias is not None and any(_many(each) for each, _ in tail.row_scales):
        raise NotAffine("an integer bias before a scale per row")
    return Match(gemm, piece, form, tail, activation, gemm.x, integer_bias=bias)


def _many(node: Node) -> bool:
    numel = node.meta["val"].numel()
    return not isinstance(numel, int) or numel != 1


def _operands(edit: Editor, match: Match) -> Match:
    """Emit what the op takes as x, a_scale and a_zero."""
    gemm, found = match.gemm, match.activation
    if match.form.columns is not None:
        c = match.piece.node_of(match.form.columns.index)
        assert c is not None
        flipped = gemm.flipped
        x = columns.of_activations(edit, match.form.columns, c, match.x, flipped=flipped)
        match = replace(match, x=x)
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
    for each, divides in match.tail.row_scales:
        more = _parameter(edit, each, lead, x)
        more = edit.call(aten.reciprocal.default, more) if divides else more
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
    if scale is not None and zero is None and not edit.training:
        source = full_range.source_of(edit, x, scale)
        if source is not None:
            x, scale = full_range.emit(edit, source, x, scale)
            return replace(match, x=x, a_scale=scale, quantised_by_us=True)
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
        if bias is not None and bias.meta["val"].dtype not in FLOATS:
            bias = edit.call(CAST, bias, torch.float32)
        if match.integer_bias is not None:
            tail = match.tail
            more = integer_sums.as_float_bias(
                edit, match.integer_bias, tail.column_scales, tail.row_scales
            )
            bias = more if bias is None else edit.call(aten.add.Tensor, bias, more)
        match = _operands(edit, match)
        made = new = rule.emit(edit, match, bias)
        if gemm.flipped:
            new = _transposed(edit, new)
        if late_bias is not None:
            new = edit.call(aten.add.Tensor, new, late_bias)
        for view in match.tail.views:
            new = edit.call(view.target, new, *view.args[1:])
    last.replace_all_uses_with(new)
    why = rule.why + ("; " + full_range.WHY if match.quantised_by_us else "")
    decision = _decide(gemm, SWAPPED, match.scheme, why, rule.name, match.form.group_size)
    recipe = match.form.recipe.text() if rule.packs else ""
    decision = replace(decision, bound=match.bound, recipe=recipe)
    made.meta[META] = decision
    return decision


def _is_vector(node: Node, n: int) -> bool:
    shape = shape_of(node)
    return bool(shape) and shape[-1] == n and node.meta["val"].numel() == n


def _transposed(edit: Editor, node: Node) -> Node:
    dims = list(range(len(shape_of(node))))
    dims[-1], dims[-2] = dims[-2], dims[-1]
    return edit.call(aten.permute.default, node, dims)
