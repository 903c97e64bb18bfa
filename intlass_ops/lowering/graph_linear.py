"""`GraphLinear`: a packed weight behind the activation arithmetic of the library it came from.

Lives here: the module that capture.py makes of a graph, and the code it shares with others of its
kind. Not here: how the graph is found (capture.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph

from ..nn import PackedLinear, PackedWeight
from .storage import Packed

# What the code of a graph may name. One dict: torch.compile compares what several have in common.
_NAMES = {
    "torch": torch,
    "device": torch.device,
    "inf": math.inf,
    "nan": math.nan,
    "NoneType": type(None),
}
_UNUSED = {"fx_pytree", "pytree"}  # of graphs that take or give more than tensors


class NotConverted(Exception):
    """The module stays as it is; the message says why."""


@functools.cache
def _function(text: str) -> Callable[[nn.Module, Tensor], Tensor]:
    defined: dict[str, Any] = {}
    exec(compile(text, "<quantised linear>", "exec"), _NAMES, defined)
    return cast(Callable[[nn.Module, Tensor], Tensor], defined["forward"])


class GraphLinear(PackedWeight):
    """y[..., N] = graph(x[..., K]): packed weights behind a library's own activation arithmetic.

    Layers of equal code share one function, and hold their weight themselves: torch.compile checks
    at every call each module, function and attribute that it has seen (docs/notes/lowering.md).
    """

    def __init__(self, owner: nn.Module, graph: Graph, out_features: int) -> None:
        """``graph`` is its owner's, from x [M, K] to y [..., M, N]."""
        first, *others = graph.find_nodes(op="call_module")
        linear = cast(PackedLinear, owner.get_submodule(first.target))
        parts: dict[str, Any] = {k: v for k, v in linear._buffers.items() if k != "bias"}
        super().__init__(Packed(linear.kind, **parts), linear.in_features)
        self.out_features = out_features
        first.target = "multiply"  # this module's own
        for name in dict.fromkeys(str(node.target) for node in others):
            self.add_module(name, owner.get_submodule(name))
        for name in dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")):
            self.register_buffer(name, getattr(owner, name))
        code = graph.python_code("self")
        unknown = code.globals.keys() - _NAMES.keys() - _UNUSED
        if unknown:
            raise NotConverted(f"its graph names {', '.join(sorted(unknown))}")
        self.text = code.src
        self.run = _function(self.text)

    def __getstate__(self) -> dict[str, Any]:
        return {name: each for name, each in self.__dict__.items() if name != "run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.run = _function(self.text)

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self, x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])
