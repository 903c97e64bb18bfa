"""Weights that are tensor subclasses enter a compiled graph as the tensors they are made of.

Lives here: `take_apart`, which gives a captured graph an input for each of those tensors and puts
the weight together again where the graph is traced. Before version 2.13 PyTorch asks each such
weight at every call, in Python, what it is made of: for the 57 linears of eight Llama layers
quantised by torchao that took as long as the layers themselves.
Not here: what PyTorch attaches to the inputs of a graph (graph_pass.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node


class Whole(nn.Module):
    """A tensor subclass, put together from the tensors that its `__tensor_flatten__` named."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        names, self.context = value.__tensor_flatten__()
        self.kind, self.names = type(value), tuple(names)
        self.size, self.stride_ = tuple(value.shape), tuple(value.stride())

    def forward(self, *parts: Tensor) -> Any:
        inner = dict(zip(self.names, parts, strict=True))
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride_)


class Sources(Protocol):
    """What PyTorch attaches to a captured graph and its inputs."""

    def is_weight(self, node: Node) -> bool:
        """Whether an input is a parameter or a buffer."""

    def copy(self, old: Node, new: Node, part: str = "") -> None:
        """Attach to an input what another has, which it is the copy or a part of."""

    def copy_graph(self, old: GraphModule, new: GraphModule) -> None: ...


# For each input of a graph the names of its parts, none for one that stays whole.
Parts = Sequence[tuple[str, ...]]


def take_apart(
    gm: GraphModule, inputs: Sequence[Any], sources: Sources
) -> tuple[GraphModule, list[Any], Parts]:
    """A copy of a graph, its inputs, and of which parts of the old ones they are.

    A weight that trains, or is made of subclasses itself, stays whole.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    pairs = list(zip(placeholders, inputs, strict=True))
    parts = [_names(value) if sources.is_weight(node) else () for node, value in pairs]
    if not any(parts):
        return gm, list(inputs), parts
    graph = Graph()
    copies: dict[Node, Node] = {}
    pieces: list[list[Node]] = []
    for (node, value), names in zip(pairs, parts, strict=True):
        if not names:
            copies[node] = graph.node_copy(node)
            sources.copy(node, copies[node])
        pieces.append([graph.placeholder(f"{node.name}_{name}") for name in names])
        for piece, name in zip(pieces[-1], names, strict=True):
            piece.meta["example_value"] = getattr(value, name)
            sources.copy(node, piece, name)
    owned: dict[str, Any] = {
        str(node.target): operator.attrgetter(str(node.target))(gm)
        for node in gm.graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    for i, (node, value) in enumerate(pairs):
        if parts[i]:
            name = f"whole_{i}"
            owned[name] = Whole(value)
            copies[node] = graph.call_module(name, tuple(pieces[i]))
    graph.output(graph.graph_copy(gm.graph, copies))
    graph.lint()
    new = GraphModule(owned, graph)
    sources.copy_graph(gm, new)
    return new, _flat(inputs, parts), parts


def _names(value: Any) -> tuple[str, ...]:
    """The tensors that a weight is made of."""
    if not hasattr(value, "__tensor_flatten__") or value.requires_grad:
        return ()
    names, _ = value.__tensor_flatten__()
    sizes = (*value.shape, *value.stride())
    plain = all(not hasattr(getattr(value, name), "__tensor_flatten__") for name in names)
    return tuple(names) if plain and all(type(size) is int for size in sizes) else ()


def given_whole(compiled: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    """The compiled graph, called with whole weights."""
    if not any(parts):
        return compiled

    def run(*inputs: Any) -> Any:
        return compiled(*_flat(inputs, parts))

    return run


def _flat(inputs: Sequence[Any], parts: Parts) -> list[Any]:
    flat: list[Any] = []
    for value, names in zip(inputs, parts, strict=True):
        if names:
            flat += [getattr(value, name) for name in names]
        else:
            flat.append(value)
    return flat
