"""bitsandbytes' operations on 4 bits, spelled out: numbers by a look-up, times their scales.

Lives here: `gemm` and `gemv` (products that are one operation), and `spelled_out`, for products of
a weight that another operation of the library dequantises. From there on they are matched, proved
and packed like any other linear. Not here: that; modules of the library
(formats/bitsandbytes_modules.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from .. import lut4
from .editor import CAST, Editor, aten
from .gemms import Gemm, static_shape
from .program import NotASlice, target_name, walk
from .weights import NotAffine

_CODE_BLOCK = 256  # of gemm_4bit's scales that have scales
_DEQUANTIZE = "bitsandbytes.dequantize_4bit.default"
_DEQUANTIZE_SCALES = "bitsandbytes.dequantize_blockwise.default"


def gemm(edit: Editor, node: Node) -> Gemm:
    """op(x, bytes, [N, K], absmax, blocksize, type, bias, absmax_8bit, absmax_code, offset)."""
    x, packed, shape, absmax, block, kind, *rest = _arguments(node, 10)
    bias, codes, code, offset = rest
    with edit.at(node):
        scales = absmax
        if codes is not None:
            scales = _scales(edit, codes, absmax, code, _CODE_BLOCK)
            scales = edit.call(aten.add.Tensor, scales, offset)
        table = _table(edit, kind, absmax.meta["val"].device)
        weight = _weight(edit, packed, shape, scales, block, table, x.meta["val"].dtype)
    n, k = shape
    return Gemm(node, x, weight, "nk", 1, n, k, bias)


def gemv(edit: Editor, node: Node) -> Gemm:
    """op(x, bytes, [N, K], absmax, table, blocksize): older versions, one token."""
    x, packed, shape, absmax, table, block = _arguments(node, 6)
    with edit.at(node):
        weight = _weight(edit, packed, shape, absmax, block, table, x.meta["val"].dtype)
    n, k = shape
    return Gemm(node, x, weight, "nk", 1, n, k)


def spelled_out(edit: Editor, product: Gemm) -> Gemm:
    """The same with a weight of ordinary operations, where the library dequantises it."""
    try:
        _, inner = walk(product.weight, edit.is_leaf)
    except NotASlice:
        return product
    if not any(target_name(node.target) == _DEQUANTIZE for node in inner):
        return product
    new: dict[Node, Node] = {}
    with edit.at(product.node):
        for node in inner:
            args, kwargs = _mapped((node.args, node.kwargs), new)
            if target_name(node.target) == _DEQUANTIZE:
                packed, absmax, block, kind, shape, dtype = args
                table = _table(edit, kind, absmax.meta["val"].device)
                new[node] = _weight(edit, packed, shape, absmax, block, table, dtype)
            elif target_name(node.target) == _DEQUANTIZE_SCALES:
                codes, absmax, code, block, dtype = args
                new[node] = _scales(edit, codes, absmax, code, block, dtype)
            else:
                new[node] = edit.call(node.target, *args, **kwargs)
    return replace(product, weight=new[product.weight])


def _mapped(value: Any, new: dict[Node, Node]) -> Any:
    return torch.fx.node.map_arg(value, lambda each: new.get(each, each))


def _arguments(node: Node, count: int) -> list[Any]:
    """All arguments in the order of the schema."""
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return [given.get(name) for name in names[:count]]


def _table(edit: Editor, kind: str, device: torch.device) -> Node:
    if kind not in lut4.BITSANDBYTES:
        raise NotAffine(f"codes of bitsandbytes' {kind}, which is not known")
    table, unit = lut4.BITSANDBYTES[kind]
    like: dict[str, Any] = {"dtype": torch.float32, "device": device}
    numbers = [number / unit for number in lut4.TABLES[table]]
    each = [edit.call(aten.full.default, [1], number, **like) for number in numbers]
    return edit.call(aten.cat.default, each)


def _look_up(edit: Editor, table: Node, codes: Node) -> Node:
    return edit.call(aten.index.Tensor, table, [edit.call(CAST, codes, torch.int32)])


def _static(node: Node) -> tuple[int, ...]:
    shape = static_shape(node)
    if shape is None:
        raise NotAffine("its scales have a dynamic shape")
    return shape


def _scales(
    edit: Editor,
    codes: Node,
    absmax: Node,
    code: Node,
    block: int,
    dtype: torch.dtype = torch.float32,
) -> Node:
    """code[codes] * absmax, one for each block of them."""
    (blocks,), shape = _static(absmax), _static(codes)
    count = math.prod(shape)
    if not 0 < count <= blocks * block:
        raise NotAffine(f"scales of shape {shape} in {blocks} blocks of {block}")
    wide = edit.call(aten.expand.default, edit.call(aten.unsqueeze.default, absmax, 1), [-1, block])
    wide = edit.call(aten.reshape.default, wide, [blocks * block])
    if count < blocks * block:
        wide = edit.call(aten.slice.Tensor, wide, 0, 0, count)
    flat = edit.call(aten.reshape.default, codes, [count])
    scales = edit.call(aten.mul.Tensor, _look_up(edit, code, flat), wide)
    scales = edit.call(aten.reshape.default, scales, list(shape))
    return scales if dtype == torch.float32 else edit.call(CAST, scales, dtype)


def _weight(
    edit: Editor,
    packed: Node,
    shape: Sequence[int],
    absmax: Node,
    block: int,
    table: Node,
    dtype: torch.dtype,
) -> Node:
    """W[N, K]: two codes a byte, the first in the high nibble, a scale for each block of them."""
    if len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        raise NotAffine(f"a weight of shape {tuple(shape)}")
    n, k = shape
    if len(_static(absmax)) != 1:
        raise NotAffine("bitsandbytes has laid its weight out for this CPU")
    if k % block or k % 2 or _static(absmax) != (n * k // block,):
        raise NotAffine(f"K={k} with blocksize={block}: blocks that run on into the next row")
    if packed.meta["val"].dtype != torch.uint8:  # bnb_4bit_quant_storage
        packed = edit.call(aten.view.dtype, packed, torch.uint8)
    pairs = edit.call(aten.reshape.default, packed, [n, k // 2, 1])
    high = edit.call(aten.bitwise_right_shift.Tensor_Scalar, pairs, 4)
    low = edit.call(aten.bitwise_and.Scalar, pairs, 15)
    codes = edit.call(aten.reshape.default, edit.call(aten.cat.default, [high, low], 2), [n, k])
    numbers = edit.call(aten.reshape.default, _look_up(edit, table, codes), [n, k // block, block])
    scales = edit.call(aten.reshape.default, absmax, [n, k // block, 1])
    weight = edit.call(aten.reshape.default, edit.call(aten.mul.Tensor, numbers, scales), [n, k])
    return weight if dtype == torch.float32 else edit.call(CAST, weight, dtype)
