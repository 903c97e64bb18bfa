"""Which nodes of a graph hold 8-bit integers for every input, whatever their dtype.

Lives here: `span`, which tells int8 and uint8 nodes and floating nodes that are a clamp of
something rounded. Not here: what such codes are scaled by (activations.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .editor import CAST, NUMBER, aten

# Longer chains of clamps and casts are something else.
MAX_STEPS = 24
SPANS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
_ROUNDED = (
    aten.round.default,
    aten.floor.default,
    aten.ceil.default,
    aten.trunc.default,
)
_BOUNDS = (
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.clamp.Tensor,
    aten.clamp_min.Tensor,
    aten.clamp_max.Tensor,
    aten.minimum.default,
    aten.maximum.default,
)
_FROM_ABOVE = (aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default)


def span(node: Node) -> tuple[int, int] | None:
    """(-128, 127) or (0, 255) if a node holds integers of that range: by its dtype, or because it
    is a clamp of something rounded (BitLinear and fake quantisation never leave floats)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    if value.dtype in SPANS:
        return SPANS[value.dtype]
    if not value.dtype.is_floating_point or not _integral(node):
        return None
    low, high = _limits(node)
    inside = (each for each in SPANS.values() if each[0] <= low and high <= each[1])
    return next(inside, None)


def _limits(node: Node) -> tuple[float, float]:
    """Bounds that the clamps at `node` enforce."""
    low, high = -math.inf, math.inf
    for _ in range(MAX_STEPS):
        if node.target in _BOUNDS:
            least, most = (*node.args[1:], None, None)[:2]
            if node.target in _FROM_ABOVE:
                least, most = None, least
            least, most = _number(least), _number(most)
            low = max(low, least) if isinstance(least, (int, float)) else low
            high = min(high, most) if isinstance(most, (int, float)) else high
        elif node.target is not CAST and node.target not in _ROUNDED:
            # (Rounding stays inside bounds that are integers.)
            break
        source = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    return low, high


def _number(value: Any) -> Any:
    """A one-element constant of the graph as a number."""
    while isinstance(value, Node) and value.target in (aten.lift_fresh_copy.default, CAST):
        value = value.args[0]
    return value.meta.get(NUMBER, value) if isinstance(value, Node) else value


def _integral(value: Any, depth: int = 8) -> bool:
    """Whether a value is integers whatever its inputs are."""
    value = _number(value)
    if not isinstance(value, Node):
        return isinstance(value, (int, float)) and float(value).is_integer()
    tensor = value.meta.get("val")
    if not isinstance(tensor, Tensor) or depth == 0:
        return False
    if not tensor.dtype.is_floating_point:
        return not tensor.dtype.is_complex
    if value.target in _ROUNDED:
        return True
    if value.target is CAST:
        return _integral(value.args[0], depth - 1)
    if value.target in (aten.add.Tensor, aten.sub.Tensor):
        return not value.kwargs and all(_integral(each, depth - 1) for each in value.args)
    if value.target in _BOUNDS:
        return all(each is None or _integral(each, depth - 1) for each in value.args)
    return False
