"""Linears that are one opaque operation: the same product with the weight spelled out.

Lives here: `ADAPTERS`, from the operation's name to a function that writes its weight as ordinary
nodes, and `OPAQUE`, operations known to be quantised products that are declined, with the reason.
From there on they are matched, proved and packed like any other linear. Not here: that matching.

A tile-packed layout is read through the operation itself: multiplied by the identity with unit
scales it returns the codes, on whatever device and in whatever layout it was packed for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from . import four_bits
from .editor import CAST, Editor, aten
from .fp8 import CODES, UNREAD, unread
from .gemms import Gemm, static_shape
from .weights import NotAffine


def _scaled_rows(edit: Editor, node: Node) -> Gemm:
    """op(x, W[N, K] of int8 or FP8 codes, scales [N] or [N, 1])."""
    x, weight, scales = node.args[:3]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    assert isinstance(scales, Node)
    n, k = static_shape(weight) or (0, 0)
    dtype = weight.meta["val"].dtype
    if dtype in UNREAD:
        raise NotAffine(unread(dtype))
    if dtype not in (torch.int8, CODES) or not n:
        raise NotAffine(f"the weight is {dtype}, not int8 codes")
    with edit.at(node):
        column = edit.call(aten.reshape.default, scales, [-1, 1])
        product = edit.call(aten.mul.Tensor, edit.call(CAST, weight, torch.float32), column)
    return Gemm(node, x, product, "nk", 1, n, k)


def _tile_packed(edit: Editor, node: Node) -> Gemm:
    """op(x, packed, group_size, scales_and_zeros [K / g, N, 2]): w = (q - 8) * s + z."""
    x, packed, group, parameters = node.args[:4]
    assert isinstance(x, Node)
    assert isinstance(packed, Node)
    assert isinstance(parameters, Node)
    shape = static_shape(parameters)
    if shape is None or not isinstance(group, int):
        raise NotAffine("scales and zeros have a dynamic shape")
    groups, n, _ = shape
    k = groups * group
    value = parameters.meta["val"]
    like: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    with edit.at(node):
        ones = edit.call(aten.full.default, [groups, n, 1], 1.0, **like)
        none = edit.call(aten.full.default, [groups, n, 1], 0.0, **like)
        unit = edit.call(aten.cat.default, [ones, none], 2)
        eye = edit.call(aten.eye.default, k, **{**like, "dtype": x.meta["val"].dtype})
        codes = edit.call(node.target, eye, packed, group, unit)  # [K, N], exact
        grouped = edit.call(aten.reshape.default, codes, [groups, group, n])
        scale = edit.call(aten.slice.Tensor, parameters, 2, 0, 1)
        zero = edit.call(aten.slice.Tensor, parameters, 2, 1, 2)
        wide = [
            edit.call(CAST, edit.call(aten.reshape.default, each, [groups, 1, n]), torch.float32)
            for each in (scale, zero)
        ]
        weight = edit.call(aten.mul.Tensor, edit.call(CAST, grouped, torch.float32), wide[0])
        weight = edit.call(aten.add.Tensor, weight, wide[1])
        weight = edit.call(aten.reshape.default, weight, [k, n])
    return Gemm(node, x, weight, "kn", 1, n, k)


ADAPTERS: dict[str, Callable[[Editor, Node], Gemm]] = {
    "quanto.qbytes_mm.default": _scaled_rows,
    "aten._weight_int8pack_mm.default": _scaled_rows,
    "aten._weight_int4pack_mm.default": _tile_packed,
    "aten._weight_int4pack_mm_for_cpu.default": _tile_packed,
    "bitsandbytes.gemm_4bit.default": four_bits.gemm,
    "bitsandbytes.gemv_4bit.default": four_bits.gemv,
}

_FP8_ACTIVATIONS = "activations in FP8 too: under FP8 weights, ours stay floats"

# Name prefix or fragment: why it is left alone.
OPAQUE: dict[str, str] = {
    "mslk.": "an opaque kernel with a private weight layout",
    "fbgemm.": "an opaque kernel with a private weight layout",
    "bitsandbytes.int8": "bitsandbytes int8 keeps outlier columns aside",
    "onednn.qlinear": "a prepacked oneDNN linear",
    "aten._scaled_mm": _FP8_ACTIVATIONS,
    "aten._scaled_grouped_mm": _FP8_ACTIVATIONS,
}


def opaque_reason(node: Node) -> str | None:
    name = str(node.target)
    return next((why for start, why in OPAQUE.items() if name.startswith(start)), None)
