"""`StoredFp8`: the FP8 weight of a linear that is known but not yet read.

    weight      e4m3 [N, K]
    its scales  one number; [N, 1]; or one for each block of bn rows and bk columns:
                [ceil(N/bn), ceil(K/bk)], groups along K being blocks of one row. Floating, or the
                bytes of e8m0 (MXFP8: blocks of one row and 32 columns)

Lives here: what the libraries have in common, tensor by tensor. Not here: which layers are FP8
(their readers; finegrained_fp8.py), experts (experts.py), what an `Fp8Linear` computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fp4 import e8m0_values
from ..fp8_linear import CODES, Fp8Linear, has_nan
from ..ops.problem import GROUP_STEP
from . import FormatError
from .checkpoint import CACHE_SCALES, Layer

Block = tuple[int, int]  # rows, columns that share a scale
WEIGHT = "weight"
# Of quantised activations, which stay in 16 bits here.
_INPUTS = ("input_scale", "activation_scale", "input_scale_ub")
_E8M0 = torch.uint8, torch.float8_e8m0fnu
_SCALES = (torch.float16, torch.bfloat16, torch.float32, *_E8M0)


@dataclass(frozen=True)
class StoredFp8:
    """Shape of a weight and of its scales; ``read()`` and ``read_scales()`` bring them.

    Scales are those of an `Fp8Linear`, [N, groups]: each row has its own.
    """

    name: str
    shape: tuple[int, int]
    groups: int
    scale_dtype: torch.dtype
    read: Callable[[], Tensor]
    read_scales: Callable[[], Tensor]

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.groups

    def load(self) -> Fp8Linear:
        """The weight with its codes."""
        return Fp8Linear(self.read(), self.read_scales())


def is_fp8(layer: Layer) -> bool:
    """Whether the weight is 8-bit floating point, of any type."""
    header = layer.checkpoint.tensors.get(f"{layer.path}.{WEIGHT}")
    return header is not None and header.stored.startswith("F8")


def stored(layer: Layer, scale: str, blocks: Collection[Block]) -> StoredFp8:
    """The weight of ``layer``, everything about it checked by the headers.

    ``scale``: what its scales are called. ``blocks``: which the config knows.
    FormatError for a tensor that does not fit, is missing, or has no meaning here.
    """
    n, k = layer.shape(WEIGHT, 2, (CODES,))
    known = {WEIGHT, scale, "bias", *_INPUTS, *CACHE_SCALES}
    more = sorted(layer.checkpoint.parts[layer.path] - known)
    if more:
        raise layer.fail(f"{', '.join(more)} of an FP8 layer: this is not read")
    header = layer.checkpoint.tensors.get(f"{layer.path}.{scale}")
    if header is not None and len(header.shape) < 2:  # of the whole tensor
        shape, block = header.shape and (1,), (n, k)
        layer.require(scale, shape, _SCALES)
    else:
        shape = layer.shape(scale, 2, _SCALES)
        block = _block(layer, scale, (n, k), shape, blocks)
    group = math.gcd(block[1], k)  # a last block that is short divides the others
    if group != k and group % GROUP_STEP:
        raise layer.fail(
            f"blocks of {block[1]} columns cut K={k} into groups of {group}, which is not a "
            f"multiple of {GROUP_STEP}"
        )

    def scales() -> Tensor:
        rows, columns = torch.arange(n) // block[0], torch.arange(0, k, group) // block[1]
        values = _values(layer, scale, shape).to(dtype)
        return values.reshape(-1, -(-k // block[1]))[rows][:, columns]

    dtype = smallest_dtype(_values(layer, scale, shape))
    return StoredFp8(layer.path, (n, k), k // group, dtype, lambda: _codes(layer, (n, k)), scales)


def _values(layer: Layer, scale: str, shape: Sequence[int]) -> Tensor:
    header = layer.checkpoint.tensors.get(f"{layer.path}.{scale}")
    if header is None or header.dtype not in _E8M0:
        return layer.scales(scale, shape)
    values = e8m0_values(layer.take(scale, shape, _E8M0).view(torch.uint8))
    if bool(values.isnan().any()):
        raise layer.fail(f"{scale} holds a NaN; the file is damaged")
    return values.float()


def smallest_dtype(
    scales: Tensor, halves: Sequence[torch.dtype] = (torch.bfloat16,)
) -> torch.dtype:
    """One of ``halves`` that holds them exactly, as bf16 does powers of two: the kernels' faster
    way."""
    exact = (half for half in halves if torch.equal(scales.to(half).to(scales.dtype), scales))
    return next(exact, scales.dtype)


def _block(
    layer: Layer, scale: str, size: Block, shape: tuple[int, ...], blocks: Collection[Block]
) -> Block:
    """The block that scales [rows, columns] of a weight of this size are for."""
    n, k = size
    rows_and_all = (1, k), (n, k)
    # Beyond the weight there is nothing to tell blocks apart by.
    known = {(min(rows, n), min(columns, k)) for rows, columns in (*rows_and_all, *blocks)}
    grids = {each: (-(-n // each[0]), -(-k // each[1])) for each in known}
    found = [each for each, grid in grids.items() if grid == shape]
    if not found:
        expected = " or ".join(str(list(grid)) for grid in sorted(set(grids.values())))
        raise layer.fail(f"{scale} has shape {list(shape)}; expected {expected}")
    if len(found) > 1:
        raise layer.fail(f"{scale} {list(shape)} fits blocks of several sizes: {sorted(found)}")
    return found[0]


def _codes(layer: Layer, shape: Block) -> Tensor:
    codes = layer.take(WEIGHT, shape, (CODES,))
    if has_nan(codes):
        raise layer.fail(f"{WEIGHT} holds a NaN; the file is damaged")
    return codes


def block_of(value: Any, where: str) -> Block:
    """Sizes of blocks as configs have them; FormatError for anything but two positive integers."""
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and size > 0 for size in value)
    ):
        return value[0], value[1]
    raise FormatError(f"{where} is {value!r}; expected two positive integers: [rows, columns]")
