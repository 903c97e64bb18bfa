"""Graphs that compute a weight's codes, which a GEMM that starts early would read too soon.

cuda/early_launch.py says which kernels start early, and how our own quantisers are known to it.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..ops._library import NAMESPACE
from .fp8 import CODES


def computes_codes(graph: Graph) -> bool:
    """Whether one of our ops takes codes for a weight's that the graph itself computes."""
    # Each op's first input are activations, which no kernel reads early.
    return any(
        _is_codes(each) and not _is_given(each)
        for node in graph.nodes
        if getattr(node.target, "namespace", "") == NAMESPACE
        for each in node.all_input_nodes[1:]
    )


def _is_codes(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8, CODES)


def _is_given(node: Node) -> bool:
    while isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")
