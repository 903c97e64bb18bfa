"""Reading and editing one graph: which nodes are static, slices of weights, new nodes.

Lives here: `Editor`. It knows fx, not Inductor: graph_pass.py tells it which placeholders are
weights and which fake mode new nodes get their shapes from. Not here: what to rewrite (linears.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .fp8 import is_code_type
from .gemms import Gemm, column_like, shape_of, static_shape
from .leaves import LeafMeta, synthetic
from .probing import WeightForm, probe
from .program import MAX_CONSTANT, Evaluation, NotASlice, Program, device_of, extract, walk
from .weights import NotAffine, Recipe

aten: Any = torch.ops.aten
NUMBER = "intlass_number"
CAST = torch.ops.prims.convert_element_type.default

# Operations whose integer operand is an index into operand 0, not codes.
_INDEXING = (
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
    aten.index_put.default,
)
_TRANSPARENT = (
    CAST,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    torch.ops.prims.device_put.default,
)


_SHAPES = (
    *_TRANSPARENT,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.cat.default,
)


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


_INTEGERS = ("quantize", "round", "floor", "trunc", "ceil", "bitwise", "shift")


def looks_quantised(leaves: Iterable[Node], inner: Iterable[Node]) -> bool:
    """Whether a slice has codes in it at all: a plain float weight needs no probing."""
    return any(leaf.op != "get_attr" and _codes(leaf) for leaf in leaves) or any(
        any(word in str(node.target) for word in _INTEGERS) or _made_codes(node) for node in inner
    )


def _codes(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and is_code_type(value.dtype)


def _made_codes(node: Node) -> bool:
    """Whether a cast makes codes of floats."""
    source = node.args[0] if node.target in (CAST, aten._to_copy.default) else None
    if not isinstance(source, Node) or not _codes(node):
        return False
    return bool(source.meta["val"].dtype.is_floating_point)


@dataclass(frozen=True)
class Slice:
    """A weight operand as a program over static leaves."""

    program: Program
    leaves: tuple[Node, ...]
    metas: tuple[LeafMeta, ...]
    nodes: dict[Node, int]  # value index of each node of the slice

    def node_of(self, index: int) -> Node | None:
        return next((node for node, i in self.nodes.items() if i == index), None)


class Editor:
    """One graph being rewritten."""

    def __init__(
        self,
        graph: Graph,
        static: frozenset[Node],
        fake_mode: contextlib.AbstractContextManager[Any] | None,
        undisturbed: Callable[[], contextlib.AbstractContextManager[Any]],
        *,
        training: bool,
    ) -> None:
        self.graph = graph
        self.static = static
        self.training = training
        self._fake_mode = fake_mode
        self.undisturbed = undisturbed
        self._is_static: dict[Node, bool] = {}
        self._note_numbers()

    def _note_numbers(self) -> None:
        """Write the value of one-element constants beside them: fake mode hides it later on."""
        for node in self.graph.find_nodes(op="get_attr"):
            constant = getattr(node.graph.owning_module, str(node.target), None)
            if isinstance(constant, torch.Tensor) and constant.numel() == 1:
                with self.undisturbed():
                    if not isinstance(constant, torch.nn.Parameter):
                        node.meta[NUMBER] = constant.item()

    def is_leaf(self, node: Node) -> bool:
        """Static placeholders and constants, and other placeholders of a fixed shape."""
        return node.op == "get_attr" or (
            node.op == "placeholder"
            and isinstance(node.meta.get("val"), torch.Tensor)
            and static_shape(node) is not None
        )

    def certain_leaf(self, node: Node) -> bool:
        return node.op == "get_attr" or node in self.static

    def is_static(self, node: Node) -> bool:
        """Whether a node depends on weights and constants alone."""
        if node not in self._is_static:
            try:
                walk(node, self.certain_leaf)
                self._is_static[node] = True
            except NotASlice:
                self._is_static[node] = False
        return self._is_static[node]

    def quantised(self, node: Node) -> bool:
        """Whether a node depends on weights and constants alone, and codes among them."""
        if not self.is_static(node):
            return False
        return looks_quantised(*walk(node, self.certain_leaf))

    def quantised_at_length(self, node: Node) -> bool:
        """`quantised` of what is too long for a slice."""
        stack, seen = [node], {node}
        leaves: list[Node] = []
        while stack:
            each = stack.pop()
            if each.op != "call_function":
                leaves.append(each)
                continue
            stack.extend(source for source in each.all_input_nodes if source not in seen)
            seen.update(each.all_input_nodes)
        return all(map(self.certain_leaf, leaves)) and looks_quantised(leaves, ())

    def picked(self, node: Node) -> bool:
        """Whether a computed index picks a node out of quantised weights: experts of each token."""
        by_index = quantised = False
        stack, seen = [node], {node}
        while stack:
            each = stack.pop()
            if self.is_static(each):
                quantised |= self.quantised(each)
                continue
            sources = each.all_input_nodes
            if each.target in _INDEXING and each.target is not aten.index_put.default:
                by_index, sources = True, sources[:1]
            elif each.target not in _SHAPES and not _is_pointwise(each):
                return False
            stack.extend(source for source in sources if source not in seen)
            seen.update(sources)
        return by_index and quantised

    def slice_of(
        self, gemm: Gemm, column_scales: Sequence[tuple[Node, bool]], zero: Node | None = None
    ) -> Slice:
        """The weight operand, less the zero points and times the scales that follow the product."""
        made: list[Node] = []
        root = gemm.weight
        steps: list[tuple[Any, Node]] = [] if zero is None else [(aten.sub.Tensor, zero)]
        steps += [(aten.div.Tensor if d else aten.mul.Tensor, each) for each, d in column_scales]
        with self.graph.inserting_before(gemm.node):
            for operation, value in steps:
                wide = self.graph.call_function(CAST, (root, torch.float32))
                made.append(wide)
                if column_like(value, gemm.n) and len(shape_of(value)) > 0:
                    size = [gemm.n] if gemm.layout == "kn" else [gemm.n, 1]
                    value = self.graph.call_function(aten.reshape.default, (value, size))
                    made.append(value)
                root = self.graph.call_function(operation, (wide, value))
                made.append(root)
        try:
            leaves, inner = walk(root, self.is_leaf)
            constants = self._constants(leaves)
            leaves = [leaf for leaf in leaves if leaf not in constants]
            if not leaves:
                raise NotASlice("its weight is made of constants alone")
            with self.undisturbed():
                program, nodes = extract(leaves, inner, constants)
            if not inner:
                program, nodes = _identity(leaves)
            uncertain = {leaf for leaf in leaves if not self.certain_leaf(leaf)}
            if uncertain:
                self._only_codes(gemm, leaves, uncertain)
            into = _index_sizes(inner)
            metas = tuple(_leaf_meta(leaf, into.get(leaf)) for leaf in leaves)
        finally:
            for node in reversed(made):
                self.graph.erase_node(node)
        nodes = {node: i for node, i in nodes.items() if node not in made}
        return Slice(program, tuple(leaves), metas, nodes)

    def _constants(self, leaves: Sequence[Node]) -> dict[Node, torch.Tensor]:
        """The leaves that the graph itself holds, which Inductor lets no op of ours read."""
        found: dict[Node, torch.Tensor] = {}
        for leaf in leaves:
            if leaf.op != "get_attr":
                continue
            value = getattr(leaf.graph.owning_module, str(leaf.target), None)
            if not isinstance(value, torch.Tensor) or value.dtype.is_complex:
                raise NotASlice(f"constant {leaf.name} is not a real tensor")
            if value.numel() > MAX_CONSTANT:
                raise NotASlice(f"a constant of {value.numel()} numbers that is no buffer")
            found[leaf] = value
        return found

    def values_of(self, *nodes: Node) -> tuple[torch.Tensor, ...]:
        """Static nodes evaluated on one common set of synthetic leaves (CPU)."""
        known: dict[Node, torch.Tensor] = {}
        results = []
        with self.undisturbed(), torch.no_grad():
            for node in nodes:
                leaves, inner = walk(node, self.is_leaf)
                constants = self._constants(leaves) if inner else {}
                leaves = [leaf for leaf in leaves if leaf not in constants]
                program, _ = extract(leaves, inner, constants) if inner else _identity(leaves)
                for leaf in leaves:
                    if leaf not in known:
                        meta = _leaf_meta(leaf, None)
                        known[leaf] = synthetic(meta, 0, 3000 + len(known), torch.device("cpu"))
                results.append(Evaluation(program, [known[leaf] for leaf in leaves]).weight())
        return tuple(results)

    def _only_codes(self, gemm: Gemm, leaves: Sequence[Node], uncertain: set[Node]) -> None:
        """A tensor that is no parameter may still be a weight (a closure, an argument) if the
        operand is made from codes of a fixed shape, and not also of what it multiplies;
        otherwise it is an activation."""
        values = [leaf.meta["val"] for leaf in leaves]
        bits = sum(8 * v.numel() * v.element_size() for v in values if is_code_type(v.dtype))
        few = bits < 2 * gemm.batch * gemm.n * gemm.k
        if gemm.flipped or few or uncertain & _inputs_of(gemm.x):
            raise NotASlice("depends on an input that is not a parameter, buffer or codes")

    def probe(self, gemm: Gemm, piece: Slice) -> WeightForm:
        recipe = Recipe(piece.program, 0, gemm.layout, gemm.batch, gemm.n, gemm.k)
        device = device_of([leaf.meta["val"] for leaf in piece.leaves])
        # Synthetic values may be indices out of range.
        risky = piece.program.indexes
        if device.type == "cuda" and (risky or not torch.cuda.is_available()):
            device = torch.device("cpu")
        with self.undisturbed(), torch.no_grad():
            try:
                return probe(piece.metas, recipe, device)
            except torch.OutOfMemoryError:
                return probe(piece.metas, recipe, torch.device("cpu"))

    @contextlib.contextmanager
    def at(self, node: Node) -> Iterator[None]:
        """Insert new nodes before `node`, marked as coming from the same module and line."""
        self._like = node
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "original_aten", "seq_nr", "partitioner_tag"):
            if key in self._like.meta:
                node.meta[key] = self._like.meta[key]
        values = torch.fx.node.map_arg((args, kwargs), lambda each: each.meta["val"])
        with self._fake_mode or contextlib.nullcontext():
            node.meta["val"] = target(*values[0], **values[1])
        return node


def _inputs_of(node: Node) -> set[Node]:
    """The placeholders that a node is computed from."""
    seen, stack = {node}, [node]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each not in seen:
                seen.add(each)
                stack.append(each)
    return {each for each in seen if each.op == "placeholder"}


def _identity(leaves: Sequence[Node]) -> tuple[Program, dict[Node, int]]:
    """A slice that is a leaf itself still needs one operation, to have a result."""
    text = '[1,[["aten.alias.default",[{"v":0}],{"k":{}}]]]'
    return Program(text), {leaves[0]: 0}


def _leaf_meta(leaf: Node, index_into: int | None) -> LeafMeta:
    value = leaf.meta.get("val")
    if not isinstance(value, torch.Tensor):
        owner = leaf.graph.owning_module
        value = getattr(owner, str(leaf.target), None)
    if not isinstance(value, torch.Tensor):
        raise NotASlice(f"constant {leaf.name} is not a tensor")
    if value.layout is not torch.strided or value.dtype.is_complex:
        raise NotASlice(f"{leaf.name} is not a strided real tensor")
    return LeafMeta(tuple(value.shape), tuple(value.stride()), value.dtype, index_into)


def _index_sizes(inner: Sequence[Node]) -> dict[Node, int]:
    """Leaves used as indices, and the size they must stay below."""
    found: dict[Node, int] = {}
    for node in inner:
        if node.target not in _INDEXING:
            continue
        data, *rest = node.args
        shape = shape_of(data) if isinstance(data, Node) else ()
        pairs: list[tuple[Any, Any]]
        if node.target in (aten.index.Tensor, aten.index_put.default):
            pairs = [(index, dim) for dim, index in enumerate(list(rest[0]))]  # type: ignore[arg-type]
        elif node.target is aten.embedding.default:
            pairs = [(rest[0], 0)]
        else:
            pairs = [(rest[1], rest[0])]
        for index, dim in pairs:
            while isinstance(index, Node) and index.target in _TRANSPARENT:
                index = index.args[0]
            if isinstance(index, Node) and isinstance(dim, int) and shape:
                found[index] = min(found.get(index, shape[dim]), shape[dim])
    return found


__all__ = ["CAST", "Editor", "NotASlice", "NotAffine", "Slice", "aten"]
