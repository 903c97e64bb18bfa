"""Quantised activations: the integer codes, scale and zero point behind a GEMM's operand.

Lives here: `match`, which finds an 8-bit node the operand is an affine function of, and which
nodes of the graph are its scale and zero point, by evaluating the few operations in between with
the codes replaced by 0 and 1. The graph's own quantiser is kept, so the codes are exactly the
graph's; only the roundings of the dequantised activation disappear. Not here: weights (weights.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .editor import CAST, Editor, aten
from .gemms import same_size, shape_of
from .integers import SPANS, span
from .leaves import LeafMeta, synthetic
from .program import Evaluation, NotASlice, extract, is_pure, walk

# A dequantisation is a handful of operations; a longer path is something else.
MAX_STEPS = 24
# Nothing checks an activation again at run time, so only operations that are affine for every value
# count (a clamp might bite on a real one).
_AFFINE = (
    "aten._to_copy.",
    "aten._unsafe_view.",
    "aten.add.Tensor",
    "aten.alias.",
    "aten.clone.",
    "aten.detach.",
    "aten.div.Tensor",
    "aten.expand.",
    "aten.mul.Tensor",
    "aten.reshape.",
    "aten.squeeze.",
    "aten.sub.Tensor",
    "aten.unsqueeze.",
    "aten.view.default",
    "prims.convert_element_type.",
    "quantized_decomposed.dequantize_per_tensor.",
    "quantized_decomposed.dequantize_per_token.",
)


@dataclass(frozen=True)
class Activation:
    """x = (codes - zero) * scale; scale and zero are nodes, numbers, or None (1 and 0).

    `codes` is int8, uint8 or a floating node of integers (see `span`). A str for zero is the
    caller's own mark (linears.SHIFTED).
    """

    codes: Node
    scale: Node | float | None
    zero: Node | float | str | None

    @property
    def unsigned(self) -> bool:
        return span(self.codes) == SPANS[torch.uint8]


def match(edit: Editor, x: Node) -> Activation | None:
    """The codes `x` was dequantised from, or None if it is a plain activation."""
    if span(x) is not None:
        return Activation(x, None, None)
    codes = _codes_behind(x)
    if codes is None:
        return None
    inner, leaves = _between(codes, x)
    if not inner or not all(str(node.target).startswith(_AFFINE) for node in inner):
        return None
    try:
        program, _ = extract([codes, *leaves], inner)
    except NotASlice:
        return None
    sizes: dict[Any, int] = {}
    with edit.undisturbed(), torch.no_grad():
        return _solve(program, codes, leaves, x, sizes)


def _codes_behind(x: Node) -> Node | None:
    """The nearest node of 8-bit integers with as many elements as `x`."""
    frontier, seen = [x], {x}
    for _ in range(MAX_STEPS):
        following: list[Node] = []
        for node in frontier:
            if node.op != "call_function" or not is_pure(node.target):
                continue
            for each in node.all_input_nodes:
                value = each.meta.get("val")
                if each in seen or not isinstance(value, Tensor):
                    continue
                if not same_size(value.numel(), x.meta["val"].numel()):
                    continue
                if span(each) is not None:
                    return each
                seen.add(each)
                following.append(each)
        frontier = following
    return None


def _between(codes: Node, x: Node) -> tuple[list[Node], list[Node]]:
    """Nodes from `codes` to `x` that depend on the codes, and what else they read."""
    depends: dict[Node, bool] = {codes: True}
    inner: list[Node] = []

    def visit(node: Node, depth: int) -> bool:
        if node in depends:
            return depends[node]
        depends[node] = False
        if depth > MAX_STEPS or node.op != "call_function" or not is_pure(node.target):
            return False
        # Every input is visited, also after the first that depends.
        answers = {visit(each, depth + 1) for each in node.all_input_nodes}
        if True in answers:
            depends[node] = True
            inner.append(node)
        return depends[node]

    visit(x, 0)
    leaves: dict[Node, None] = {}
    for node in inner:
        for each in node.all_input_nodes:
            if not depends[each]:
                leaves[each] = None
    return inner, list(leaves)


def small(value: Any, sizes: dict[Any, int]) -> int:
    """A size with its symbols replaced by small numbers: structure does not depend on M."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        sizes.setdefault(symbol, 3 + len(sizes))
    return int(expression.xreplace({s: sizes[s] for s in expression.free_symbols}))


def _leaf(node: Node, seed: int, sizes: dict[Any, int]) -> Any:
    value = node.meta.get("val")
    limits = span(node)
    if limits is not None and isinstance(value, Tensor):
        generator = torch.Generator().manual_seed(seed)
        size = [small(each, sizes) for each in value.shape]
        return torch.randint(limits[0], limits[1] + 1, size, generator=generator).to(value.dtype)
    if isinstance(value, (int, torch.SymInt)):
        return small(value, sizes)
    if isinstance(value, (float, bool)):
        return value
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise NotASlice("an input that is not a tensor")
    shape = tuple(small(size, sizes) for size in value.shape)
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    meta = LeafMeta(shape, tuple(strides), value.dtype, None)
    return synthetic(meta, 1 << 62, seed, torch.device("cpu"), small=True)


_SOLVED: dict[tuple[Any, ...], tuple[Any, Any] | None] = {}
_LOCK = threading.Lock()


def _solve(
    program: Any, codes: Node, leaves: Sequence[Node], x: Node, sizes: dict[Any, int]
) -> Activation | None:
    values = [node.meta.get("val") for node in (codes, *leaves)]
    dtypes = [str(getattr(value, "dtype", value)) for value in values]
    signature = (*dtypes, *(str(shape_of(node)) for node in (codes, *leaves)))
    key = (program.text, signature)
    with _LOCK:
        known = key in _SOLVED
        answer = _SOLVED.get(key)
    if not known:
        try:
            both = []
            for seed in (2000, 5000):
                made = [_leaf(node, seed + i, sizes) for i, node in enumerate((codes, *leaves))]
                both.append(_evaluate(program, made))
            # A number that other leaves would change is no constant.
            answer = both[0] if both[0] == both[1] else None
        except Exception:
            # Whatever cannot be evaluated on its own is no dequantisation we know.
            answer = None
        with _LOCK:
            _SOLVED[key] = answer
    if answer is None:
        return None
    scale, zero = (leaves[each] if isinstance(each, int) else each for each in answer)
    if isinstance(zero, Node) and _is_zero(zero, codes, sizes):
        zero = None
    return Activation(codes, scale, zero)


def _is_zero(node: Node, codes: Node, sizes: dict[Any, int]) -> bool:
    """Whether a zero point is spelled out of constants and always 0 (a symmetric quantiser)."""

    def known(each: Node) -> bool:
        size = isinstance(each.meta.get("val"), (int, torch.SymInt))
        return each.op == "get_attr" or (each.op == "placeholder" and size)

    try:
        sources, inner = walk(node, known)
        if not inner:
            return False
        values: list[Any] = [
            getattr(e.graph.owning_module, str(e.target))
            if e.op == "get_attr"
            else small(e.meta["val"], sizes)
            for e in sources
        ]
        # The codes come first only to say where to compute.
        program, _ = extract([codes, *sources], inner)
        result = Evaluation(program, [torch.zeros(1), *values]).weight()
        return result.numel() > 0 and bool((result == 0).all())
    except Exception:
        return False


def _evaluate(program: Any, values: Sequence[Any]) -> tuple[Any, Any] | None:
    """(scale, zero), each an index into the leaves, a float constant, or None."""
    evaluation = Evaluation(program, values)
    x = evaluation.weight()
    source = values[0].double()
    offset = evaluation.with_codes(0, torch.zeros_like(source))
    scale = evaluation.with_codes(0, torch.ones_like(source)) - offset
    if not bool((scale != 0).all()) or not bool(torch.isfinite(scale).all()):
        return None
    raw = (evaluation.with_codes(0, source) - offset) / scale
    if not torch.allclose(raw.flatten(), source.flatten(), rtol=0, atol=1e-6):
        return None
    zero = -offset / scale
    eps, tiny = 0.0, 0.0
    if x.dtype.is_floating_point:
        eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    bound = 2 * eps * (raw.abs() + zero.abs()) * scale.abs() + tiny
    if not bool(((raw - zero) * scale - x.double()).abs().le(bound).all()):
        return None
    k = x.shape[-1]
    per_row = [t.reshape(-1, k) for t in (scale, zero)]
    if any(bool((t != t[:, :1]).any()) for t in per_row):
        return None
    found = [_name(t[:, 0], values[1:], unit) for t, unit in zip(per_row, (1.0, 0.0), strict=True)]
    return None if "unknown" in found else (found[0], found[1])


def _name(rows: Tensor, leaves: Sequence[Any], unit: float) -> Any:
    """Which leaf, or which number, holds one value per row."""
    nearest = rows.round()
    rows = torch.where((rows - nearest).abs() < 1e-9, nearest, rows)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.numel() not in (1, rows.numel()):
            continue
        if torch.equal(leaf.double().flatten().expand(rows.numel()), rows):
            return i
    if bool((rows == rows[0]).all()):
        number = float(rows[0])
        return None if number == unit else number
    return "unknown"


def signed(edit: Editor, codes: Node) -> Node:
    """int8 codes: unsigned ones shifted by -128, bit for bit."""
    dtype = codes.meta["val"].dtype
    if dtype == torch.int8:
        return codes
    if dtype.is_floating_point:
        if span(codes) == SPANS[torch.uint8]:
            codes = edit.call(aten.sub.Tensor, edit.call(CAST, codes, torch.float32), 128)
        return edit.call(CAST, codes, torch.int8)
    flipped = edit.call(aten.bitwise_xor.Scalar, codes, 128)
    return edit.call(aten.view.dtype, flipped, torch.int8)
