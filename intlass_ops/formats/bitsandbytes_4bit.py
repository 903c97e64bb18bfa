"""bitsandbytes in safetensors, as transformers saves it: NF4, QLoRA's, and FP4 (`load_in_4bit`).

    weight                   bytes [N·K/2, 1], of two codes the first in the HIGH nibble; or what a
                             view of them in another type is (`bnb_4bit_quant_storage`)
    weight.absmax            float32 [B], B = N·K/blocksize; w = quant_map[q] · absmax
    weight.quant_map         float32 [16], the sixteen numbers; its kernels have them by heart
    weight.quant_state.bitsandbytes__nf4    uint8: JSON of shape [N, K], blocksize, quant_type, …;
                             or …__fp4

With double quantisation (`bnb_4bit_use_double_quant`):

    weight.absmax            uint8 [B]; absmax = nested_quant_map[q] · nested_absmax + offset
    weight.nested_absmax     float32 [ceil(B/nested_blocksize)]
    weight.nested_quant_map  float32 [256]; nested_blocksize and nested_offset are in the JSON

Blocks run along the flattened weight, so K must be a multiple of theirs. Which layers are quantised
their tensors say: those of `llm_int8_skip_modules` are floating. bitsandbytes rounds a weight to
the dtype it was made of before it multiplies; here it is not rounded. FP4's numbers
are 192nds, which scales take in: scale = absmax / 192.
Not here: LLM.int8 (bitsandbytes.py), modules in memory (bitsandbytes_modules.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import lut4
from ..nn import Activation
from ..ops.problem import GROUP_STEP
from . import FormatError
from .checkpoint import CACHE_SCALES, Checkpoint, Layer
from .fp8 import smallest_dtype
from .lut4 import StoredLut4

_STATE = "quant_state.bitsandbytes__"
_MAX_JSON_BYTES = 1 << 16
_MAX_SIZE = 1 << 31
# What the bytes of codes may be stored as, all the same.
_STORAGE = (
    torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
# What holds scales of weights that were bf16 or fp16.
HALVES = (torch.bfloat16, torch.float16)


class BitsAndBytes4Bit:
    """Reader of one checkpoint; ``config`` is its quantization_config."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if kind not in lut4.BITSANDBYTES:
            raise FormatError(
                f"{checkpoint.directory}: bnb_4bit_quant_type is {kind!r}; expected "
                f"{' or '.join(map(repr, lut4.BITSANDBYTES))}, the 4 bits of bitsandbytes"
            )
        self.checkpoint = checkpoint
        # A weight of bytes whose parts are lost is no floating one, either.
        codes = [
            path for path in checkpoint.layers("weight")
            if checkpoint.tensors[f"{path}.weight"].dtype == torch.uint8
        ]  # fmt: skip
        marks = ("absmax", *(_STATE + kind for kind in lut4.BITSANDBYTES))
        of_parts = (path for mark in marks for path in checkpoint.layers(f"weight.{mark}"))
        self.paths = list(dict.fromkeys([*of_parts, *codes]))

    def activation(self, path: str) -> Activation:
        return None

    def stored(self, path: str) -> StoredLut4:
        layer = Layer(self.checkpoint, path)
        kind = next(
            (kind for kind in lut4.BITSANDBYTES if layer.has(f"weight.{_STATE}{kind}")), "nf4"
        )
        table, unit = lut4.BITSANDBYTES[kind]
        state = _state(layer, kind)
        n, k = _sizes(layer, state)
        block = _size(layer, state, "blocksize")
        if k % block:
            raise layer.fail(
                f"K={k} is not a multiple of blocksize={block}: blocks that run on into the next "
                "row are not read"
            )
        if block != k and block % GROUP_STEP:
            raise layer.fail(f"blocksize={block} is not a multiple of {GROUP_STEP}")
        storage = layer.shape("weight", 2, _STORAGE)
        dtype = layer.checkpoint.tensors[f"{path}.weight"].dtype
        assert dtype is not None
        if storage[1] != 1 or storage[0] * dtype.itemsize * 2 != n * k:
            raise layer.fail(f"weight is {dtype} {list(storage)}; expected {n * k // 2} bytes")
        numbers = layer.take("weight.quant_map", (16,), (torch.float32,))
        if not are_numbers_of(kind, numbers):
            raise layer.fail(
                f"quant_map has other numbers than {kind.upper()}: such codes are not read"
            )
        absmax = _absmax(layer, state, n * k // block)
        scale_dtype = smallest_dtype(absmax() / unit, HALVES)

        def codes() -> Tensor:
            return swapped(layer.take("weight", storage, _STORAGE), n)

        def read_scales() -> Tensor:
            return (absmax() / unit).view(n, k // block).to(scale_dtype)

        return StoredLut4(path, table, (n, k), k // block, scale_dtype, codes, read_scales)


def swapped(weight: Tensor, n: int) -> Tensor:
    """The bytes of bitsandbytes, in any type, as ours, [N, K/2]: the first of two codes low."""
    octets = weight.contiguous().view(torch.uint8).view(n, -1)
    return (octets >> 4) | (octets << 4)


def are_numbers_of(kind: str, quant_map: Tensor) -> bool:
    """Whether a quant_map is that of a kind, up to what bitsandbytes takes for the same."""
    table, unit = lut4.BITSANDBYTES[kind]
    numbers = lut4.numbers(table, device=quant_map.device) / unit
    return quant_map.shape == numbers.shape and torch.allclose(
        quant_map, numbers, rtol=0, atol=1e-6
    )


def unnested(codes: Tensor, table: Tensor, largest: Tensor, block: int, offset: Tensor) -> Tensor:
    """The scales that double quantisation has stored, in float32 as bitsandbytes computes them."""
    blocks = torch.arange(codes.numel(), device=codes.device) // block
    return table[codes.flatten().int()] * largest[blocks] + offset


def _state(layer: Layer, kind: str) -> dict[str, Any]:
    """What is no tensor of a layer, of which its other tensors must be those that are known."""
    own_name = _STATE + kind
    name = f"weight.{own_name}"
    size = layer.shape(name, 1, (torch.uint8,))
    if size[0] > _MAX_JSON_BYTES:
        raise layer.fail(f"{own_name} has {size[0]} bytes, too many for its JSON")
    try:
        state = json.loads(bytes(layer.take(name, size, (torch.uint8,)).tolist()))
    except (ValueError, RecursionError) as problem:
        raise layer.fail(f"{own_name} is not JSON ({problem})") from None
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        found = state.get("quant_type") if isinstance(state, dict) else state
        raise layer.fail(f"quant_type is {found!r}; expected {kind!r}")
    nested = {"nested_absmax", "nested_quant_map"}
    known = {"absmax", "quant_map", *(nested if _is_nested(layer) else ())}
    parts = layer.checkpoint.parts
    more = parts.get(layer.path, set()) - {"weight", "bias", *CACHE_SCALES}
    more |= {f"weight.{part}" for part in parts.get(f"{layer.path}.weight", set()) - known}
    own = parts.get(f"{layer.path}.weight.quant_state", set())
    more |= {f"weight.quant_state.{part}" for part in own - {own_name.rpartition(".")[2]}}
    if more:
        names = ", ".join(sorted(more))
        raise layer.fail(f"{names} of an {kind.upper()} layer: this is not read")
    return state


def _is_nested(layer: Layer) -> bool:
    header = layer.checkpoint.tensors.get(f"{layer.path}.weight.absmax")
    return header is not None and header.dtype == torch.uint8


def _sizes(layer: Layer, state: Mapping[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < _MAX_SIZE for size in shape)
    ):
        return shape[0], shape[1]
    raise layer.fail(f"shape is {shape!r}; expected two positive integers: [N, K]")


def _size(layer: Layer, state: Mapping[str, Any], name: str) -> int:
    size = state.get(name)
    if type(size) is not int or not 0 < size < _MAX_SIZE:
        raise layer.fail(f"{name} is {size!r}; expected a positive integer")
    return size


def _absmax(layer: Layer, state: Mapping[str, Any], blocks: int) -> Callable[[], Tensor]:
    """How to get the scale of each block, in float32; what it is made of is checked."""
    single, name = (torch.float32,), "weight.absmax"
    if not _is_nested(layer):
        layer.require(name, (blocks,), single)
        return lambda: layer.scales(name, (blocks,))
    block = _size(layer, state, "nested_blocksize")
    largest, table = "weight.nested_absmax", "weight.nested_quant_map"
    groups = (-(-blocks // block),)
    layer.require(name, (blocks,), (torch.uint8,))
    layer.require(largest, groups, single)
    layer.require(table, (256,), single)
    if state.get("nested_dtype") != "float32":
        raise layer.fail(f"nested_dtype is {state.get('nested_dtype')!r}; expected 'float32'")
    offset: Any = state.get("nested_offset")
    number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
    if not number or not abs(offset) < torch.finfo(torch.float32).max:
        raise layer.fail(f"nested_offset is {offset!r}; expected a finite number")

    def scales() -> Tensor:
        codes = layer.take(name, (blocks,), (torch.uint8,))
        parts = layer.scales(table, (256,)), layer.scales(largest, groups)
        values = unnested(codes, *parts, block, torch.tensor(float(offset)))
        if not bool(torch.isfinite(values).all()):
            raise layer.fail("nested_absmax gives an infinity; the file is damaged")
        return values

    return scales
