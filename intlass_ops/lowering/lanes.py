"""INT8 activations in the order that hopper.cu takes fastest under INT4 weights (packing.py).

Lives here: `ask`, for quantisers of ours whose codes go into such products alone. Not here: which
products these are (ops/lanes.py), what a layer asks for that is not compiled (nn.py). Products that
find their weight when they run (runtime.py) may have its columns in another order, and take none.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from ..ops.lanes import takes_lanes
from . import joined, quantisers, siblings
from .editor import Editor
from .gemms import shape_of

_QUANTISERS = (quantisers.QUANTIZE, quantisers.NORM, quantisers.SILU)


def ask(edit: Editor) -> int:
    """Returns how many quantisers now write lanes."""
    asked = 0
    for target in _QUANTISERS:
        for node in edit.graph.find_nodes(op="call_function", target=target):
            given = siblings.arguments_of(node)
            results = list(node.users)
            codes = [each for each in results if each.args[1:] == (0,)]
            if given.get("bits", 8) != 8 or given.get("lanes") or len(codes) != 1:
                continue
            users = list(codes[0].users)
            if not users or not all(_takes(user, codes[0]) for user in users):
                continue
            with edit.at(node):
                new = edit.call(target, **{**given, "lanes": True})
                for each in results:
                    part = edit.call(operator.getitem, new, each.args[1])
                    each.replace_all_uses_with(part)
            for each in (*results, node):
                edit.graph.erase_node(each)
            asked += 1
    return asked


def _takes(user: Node, codes: Node) -> bool:
    """Whether all that a node makes of codes are products that take lanes."""
    if user.target not in (siblings.INT4, joined.OP) or user.all_input_nodes.count(codes) != 1:
        return False
    given = siblings.arguments_of(user)
    one = user.target is siblings.INT4
    if given["a" if one else "x"] is not codes or given.get("a_zero") is not None:
        return False
    *lead, k = shape_of(codes)
    names = ("packed_w", "scales", "zeros") if one else ("weights", "scales", "zeros")
    lists: list[list[Any]] = [[given.get(name)] if one else given[name] for name in names]
    weights, scales, zeros = ([each.meta["val"] for each in some if each] for some in lists)
    int4 = all(w.dtype == torch.uint8 for w in weights)
    dtype = given.get("out_dtype") or torch.bfloat16
    return int4 and takes_lanes(
        math.prod(lead), k, weights, scales[0], zeros[0] if zeros else None, dtype
    )
