"""What a transformer computes just before our own quantiser, computed by the quantiser itself.

Lives here: `fuse`, for `intlass::quantize_dynamic` per token of an RMS norm or of silu(gate) * up.
A fused op rounds where the graph rounds and nowhere else, so a norm is taken only if it is rounded
after its weight (as torch.nn.RMSNorm is) or both before and after (as transformers' are), and silu
only if it and the product are rounded one after the other. What is left is the order in which the
norm sums its squares in fp32, which no compiled graph promises.
Not here: the ops (ops/quantize_after.py), quantisers of other libraries (activations.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .editor import CAST, Editor, aten
from .gemms import FLOATS, shape_of

QUANTIZE: Any = torch.ops.intlass.quantize_dynamic.default
NORM: Any = torch.ops.intlass.rms_norm_quantize.default
SILU: Any = torch.ops.intlass.silu_mul_quantize.default


def concerns(node: Node) -> bool:
    return node.target is QUANTIZE


def fuse(edit: Editor) -> int:
    """Returns how many quantisers now start one step earlier."""
    fused = 0
    for node in edit.graph.find_nodes(op="call_function", target=QUANTIZE):
        x, bits, granularity, _, symmetric, seed, *more = node.args
        # Somebody else needs the result too: it is computed anyway.
        if node.kwargs or granularity != "token" or seed is not None or len(x.users) != 1:
            continue
        with edit.at(node):
            new = _silu_mul(edit, x, bits, symmetric, *more) or _norm(
                edit, x, bits, symmetric, *more
            )
        if new is not None:
            node.replace_all_uses_with(new)
            edit.graph.erase_node(node)
            fused += 1
    return fused


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _args(node: Any, *targets: Any) -> tuple[Any, ...] | None:
    """The arguments of a call of one of these."""
    found = isinstance(node, Node) and node.target in targets and not node.kwargs
    return node.args if found else None


def _narrow(node: Any, dtype: torch.dtype) -> Node | None:
    """The tensor of this dtype that a node is, or was widened from, as fp32."""
    if _dtype(node) == dtype:
        return node  # type: ignore[no-any-return]
    args = _args(node, CAST)
    return args[0] if args and _dtype(node) == torch.float32 and _dtype(args[0]) == dtype else None


def _before_rounding(node: Any, dtype: torch.dtype) -> Any:
    """What is rounded to `dtype` at a node: a value in fp32."""
    args = _args(node, CAST) if dtype != torch.float32 else None
    return args[0] if args and _dtype(args[0]) == torch.float32 else node


def _silu_mul(edit: Editor, x: Node, bits: Any, symmetric: Any, *more: Any) -> Node | None:
    dtype, product = _dtype(x), _args(x, aten.mul.Tensor)
    if dtype not in FLOATS or product is None:
        return None
    for activated, up in (product, product[::-1]):
        inner = _before_rounding(activated, dtype)
        wide, divisor = _args(inner, aten.div.Tensor) or (None, None)
        power, one = _args(divisor, aten.add.Tensor) or (None, None)
        (negative,) = _args(power, aten.exp.default) or (None,)
        gate = _narrow(wide, dtype)
        if one != 1 or gate is None or _args(negative, aten.neg.default) != (wide,):
            continue
        if (
            _dtype(inner) == torch.float32
            and _dtype(up) == dtype
            and shape_of(up) == shape_of(gate)
        ):
            return edit.call(SILU, gate, up, bits, symmetric, *more)
    return None


def _norm(edit: Editor, x: Node, bits: Any, symmetric: Any, *more: Any) -> Node | None:
    dtype = _dtype(x)
    if dtype not in FLOATS:
        return None
    whole = _before_rounding(x, dtype)
    product = _args(whole, aten.mul.Tensor)
    if product is None:
        return None
    weights = ((product[0], product[1]), (product[1], product[0]), (whole, None))
    for scaled, weight in weights:
        rounded = None if dtype == torch.float32 else _narrow(scaled, dtype)
        if rounded is not None:  # before it is multiplied by the weight too
            scaled = _before_rounding(rounded, dtype)
        elif _dtype(whole) != torch.float32:
            continue
        if _dtype(scaled) != torch.float32:
            continue
        factors = _args(scaled, aten.mul.Tensor)
        if factors is None or (weight is not None and not _is_weight(weight, x, dtype)):
            continue
        for wide, root in (factors, factors[::-1]):
            source, eps = _narrow(wide, dtype), _eps(root, wide)
            if source is not None and eps is not None:
                weight = None if weight is None else _narrow(weight, dtype)
                first = rounded is not None
                return edit.call(NORM, source, weight, eps, bits, symmetric, first, *more)
    return None


def _is_weight(node: Any, x: Node, dtype: torch.dtype) -> bool:
    narrow = _narrow(node, dtype)
    return narrow is not None and shape_of(narrow) == shape_of(x)[-1:]


def _eps(root: Any, wide: Any) -> float | None:
    """eps of rsqrt(mean(wide ** 2, -1) + eps)."""
    (summed,) = _args(root, aten.rsqrt.default) or (None,)
    mean, eps = _args(summed, aten.add.Tensor, aten.add.Scalar) or (None, None)
    square, dims, *keep = _args(mean, aten.mean.dim) or (None, None)
    squared = _args(square, aten.pow.Tensor_Scalar, aten.mul.Tensor)
    last = len(shape_of(wide)) - 1 if isinstance(wide, Node) else None
    if squared not in ((wide, 2), (wide, wide)) or dims not in ([-1], [last]) or keep != [True]:
        return None
    return float(eps) if isinstance(eps, (int, float)) else None
