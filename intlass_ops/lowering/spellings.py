"""Rare spellings of a product with a quantised weight, respelled as the ones that linears.py reads.

Lives here: `SPELLINGS` (name, what it recognises and rewrites) and `respell`. Only products of a
static quantised weight are touched: dense ones stay exactly as they were. Not here: products of
the usual spellings (gemms.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .editor import CAST, Editor, aten
from .gemms import shape_of, static_shape, uncast

_RESHAPES = (aten.view.default, aten.reshape.default)


def _matrix_vector(edit: Editor, node: Node) -> Node | None:
    """sum(W[N, K] * x[K], 1), which torch.mv is decomposed to."""
    if node.target is not aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs:
        return None
    product = node.args[0]
    if node.args[1] not in ([1], [-1]) or not isinstance(product, Node):
        return None
    if product.target is not aten.mul.Tensor or product.kwargs:
        return None
    left, right = product.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    weight, x = (left, right) if len(shape_of(left)) == 2 else (right, left)
    shape = static_shape(weight)
    if shape is None or len(shape) != 2 or shape_of(x) != shape[1:] or not edit.quantised(weight):
        return None
    narrow = uncast(x).meta["val"].dtype
    dtypes = {getattr(user.meta.get("val"), "dtype", None) for user in node.users}
    if uncast(weight).meta["val"].dtype == narrow and dtypes == {narrow}:
        x, weight = uncast(x), uncast(weight)
    row = edit.call(aten.reshape.default, x, [1, shape[1]])
    y = edit.call(aten.mm.default, row, edit.call(aten.permute.default, weight, [1, 0]))
    y = edit.call(aten.reshape.default, y, [shape[0]])
    return _as(edit, y, node)


def _as(edit: Editor, new: Node, node: Node) -> Node:
    dtype = node.meta["val"].dtype
    return new if new.meta["val"].dtype == dtype else edit.call(CAST, new, dtype)


def _scaled_sum(edit: Editor, node: Node) -> Node | None:
    """addmm and baddbmm with alpha or beta."""
    products = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if node.target not in products or (alpha, beta) == (1, 1) or node.meta["val"].is_complex():
        return None
    added, a, b = node.args
    if not any(isinstance(each, Node) and edit.quantised(each) for each in (a, b)):
        return None
    y = edit.call(products[node.target], a, b)
    y = y if alpha == 1 else edit.call(aten.mul.Tensor, y, alpha)
    if beta == 0:
        return y
    return edit.call(
        aten.add.Tensor, y, added if beta == 1 else edit.call(aten.mul.Tensor, added, beta)
    )


def _repeated_experts(edit: Editor, node: Node) -> Node | None:
    """x[B, E, M, K] @ w[E, K, N]: bmm on B copies of the same experts."""
    if node.target is not aten.bmm.default:
        return None
    x, weight = node.args
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    shape = static_shape(weight)
    if weight.target not in _RESHAPES or shape is None:
        return None
    source = weight.args[0]
    if isinstance(source, Node) and source.target is aten.clone.default:
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not aten.expand.default:
        return None
    inner = source.args[0]
    wide = static_shape(source)
    if not isinstance(inner, Node) or wide is None or len(wide) != 4 or wide[2:] != shape[1:]:
        return None
    repeats, experts, k, n = wide
    known = static_shape(inner)
    if known not in ((experts, k, n), (1, experts, k, n)) or not edit.quantised(inner):
        return None
    if known != (experts, k, n):
        inner = edit.call(aten.reshape.default, inner, [experts, k, n])
    x = edit.call(aten.reshape.default, x, [repeats, experts, -1, k])
    x = edit.call(aten.permute.default, x, [1, 0, 2, 3])
    x = edit.call(aten.reshape.default, x, [experts, -1, k])
    y = edit.call(aten.bmm.default, x, inner)
    y = edit.call(aten.reshape.default, y, [experts, repeats, -1, n])
    y = edit.call(aten.permute.default, y, [1, 0, 2, 3])
    return edit.call(aten.reshape.default, y, [repeats * experts, -1, n])


def _joined_weights(edit: Editor, node: Node) -> Node | None:
    """x @ cat([a, b]).T: a product for each part, whose codes are found one by one."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    x, weight = node.args[-2:]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    transposed = weight.target is aten.permute.default
    joined = weight.args[0] if transposed else weight
    if not isinstance(joined, Node) or joined.target is not aten.cat.default:
        return None
    parts: Any = joined.args[0]
    dim = joined.args[1] if len(joined.args) > 1 else 0
    along_n = 0 if transposed else 1
    if dim not in (along_n, along_n - 2) or edit.is_static(x):
        return None
    if not all(len(shape_of(each)) == 2 and edit.quantised(each) for each in parts):
        return None
    if transposed:
        parts = [edit.call(aten.permute.default, each, [1, 0]) for each in parts]
    y = edit.call(aten.cat.default, [edit.call(aten.mm.default, x, each) for each in parts], 1)
    if node.target is aten.mm.default:
        return y
    return edit.call(aten.add.Tensor, y, node.args[0])


def _pointwise_convolution(edit: Editor, node: Node) -> Node | None:
    """convolution(x[B, K, ..], w[N, K, 1, ..]): a linear of the channels at each point."""
    if node.target is not aten.convolution.default:
        return None
    found: Any = node.args
    x, weight, bias, stride, padding, dilation, transposed, _, groups = found
    shape, (first, k, *points) = static_shape(weight), shape_of(x)
    if shape is None or shape[2:] != (1,) * len(points) or not edit.quantised(weight):
        return None
    plain = {*stride, *dilation} == {1} and not any(padding) and (transposed, groups) == (False, 1)
    if not plain or k != shape[1]:
        return None
    rank = 1 + len(points)
    sizes = [
        size if isinstance(size, int) else edit.call(aten.sym_size.int, x, dim)
        for dim, size in ((0, first), *enumerate(points, start=2))
    ]
    rows = edit.call(aten.permute.default, x, [0, *range(2, rank + 1), 1])
    rows = edit.call(aten.reshape.default, rows, [-1, k])
    weight = edit.call(aten.reshape.default, weight, shape[:2])
    weight = edit.call(aten.permute.default, weight, [1, 0])
    product = [aten.mm.default] if bias is None else [aten.addmm.default, bias]
    y = edit.call(*product, rows, weight)
    y = edit.call(aten.reshape.default, y, [*sizes, shape[0]])
    y = edit.call(aten.permute.default, y, [0, rank, *range(1, rank)])
    if not node.meta["val"].is_contiguous():
        return y  # channels last, as these are
    return edit.call(aten.clone.default, y, memory_format=torch.contiguous_format)


_FAKE_QUANTIZERS = {
    "aten.fake_quantize_per_tensor_affine_cachemask.default": ("scale", "zero", "low", "high"),
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default": (
        *("scale", "zero", "enabled", "low", "high"),
    ),
    "aten.fake_quantize_per_channel_affine_cachemask.default": (
        *("scale", "zero", "axis", "low", "high"),
    ),
}


def _fake_quantize(edit: Editor, node: Node) -> Node | None:
    """(clamp(round(x / scale) + zero, low, high) - zero) * scale, with its codes in sight."""
    source = node.args[0]
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(source, Node):
        return None
    names = _FAKE_QUANTIZERS.get(str(source.target))
    if names is None or source.kwargs or len(source.args) != len(names) + 1:
        return None
    x = source.args[0]
    found: dict[str, Any] = dict(zip(names, source.args[1:], strict=True))
    if not isinstance(x, Node) or "enabled" in found:
        # Switched at run time by a tensor: the product is dense whenever it is off.
        return None
    scale, zero = found["scale"], found["zero"]
    if "axis" in found:
        shape = [1] * len(shape_of(x))
        shape[found["axis"]] = -1
        scale, zero = (edit.call(aten.reshape.default, each, shape) for each in (scale, zero))
        zero = edit.call(CAST, zero, torch.float32)
        inverse: Any = edit.call(aten.reciprocal.default, scale)
    else:
        with edit.undisturbed():  # rounded as PyTorch's kernel does
            inverse = float(1 / torch.tensor(scale, dtype=torch.float32))
    codes = edit.call(aten.mul.Tensor, edit.call(CAST, x, torch.float32), inverse)
    codes = edit.call(aten.add.Tensor, edit.call(aten.round.default, codes), zero)
    codes = edit.call(aten.clamp_min.default, codes, found["low"])  # Inductor knows no clamp
    codes = edit.call(aten.clamp_max.default, codes, found["high"])
    if found["low"] >= -128 and found["high"] <= 127:
        codes = edit.call(CAST, edit.call(CAST, codes, torch.int8), torch.float32)
    shifted = edit.call(aten.sub.Tensor, codes, zero)
    return _as(edit, edit.call(aten.mul.Tensor, shifted, scale), node)


SPELLINGS: dict[str, Callable[[Editor, Node], Node | None]] = {
    "matrix times vector": _matrix_vector,
    "addmm with alpha or beta": _scaled_sum,
    "experts repeated over a batch": _repeated_experts,
    "weights joined along N": _joined_weights,
    "convolution with a kernel of 1": _pointwise_convolution,
    "fake_quantize": _fake_quantize,
}


_TARGETS = (
    aten.sum.dim_IntList,
    aten.mm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.bmm.default,
    aten.convolution.default,
)


def concerns(node: Node) -> bool:
    return node.op == "call_function" and (
        node.target in _TARGETS or node.target is operator.getitem
    )


def respell(edit: Editor) -> int:
    """Apply every spelling to every node once; returns how many were replaced."""
    replaced = 0
    for node in list(edit.graph.nodes):
        if not concerns(node) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        for each in SPELLINGS.values():
            with edit.at(node):
                new = each(edit, node)
            if new is not None:
                node.replace_all_uses_with(new)
                edit.graph.erase_node(node)
                replaced += 1
                break
    return replaced
