"""State dicts of torchao in safetensors, as transformers and torchao flatten them.

    <module>._weight_qdata       int8 [N, K]
    <module>._weight_scale       [N, K/g] or [N, 1], floating
    <module>._weight_zero_point  like scale, integer or floating; w = (q - z) · scale
    metadata of the file         "<module>.weight" to JSON: _type, target_dtype, activations

Read are IntxUnpackedToInt8Tensor (4 and 8 bits, weight only) and Int8Tensor (weight only, or with
activations quantised symmetrically per row, by our op in torchao's arithmetic). The other types are
layouts of one kernel; `prepare_` reads several from a model.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from .. import packing
from ..nn import Activation
from .checkpoint import Checkpoint, Layer
from .stored import StoredWeight, group_size_of, unsigned

MARKER = "_weight_qdata"
_TYPES = ("IntxUnpackedToInt8Tensor", "Int8Tensor")
_PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}


class Torchao:
    """Reader of one checkpoint; the files' metadata describe every layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.paths = checkpoint.layers(MARKER)

    def _described(self, layer: Layer) -> tuple[str, dict[str, Any]]:
        """Type and attributes of a weight."""
        text = self.checkpoint.metadata.get(f"{layer.path}.weight", "")
        try:
            value = json.loads(text)
            kind, data = value["_type"], value["_data"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise layer.fail(f"metadata {text[:60]!r} do not describe a torchao tensor") from None
        if kind not in _TYPES or not isinstance(data, dict):
            raise layer.fail(
                f"the weight is a {kind!r}; read are {', '.join(_TYPES)} (load the model with "
                "torchao and call intlass_ops.prepare_ on it)"
            )
        return kind, data

    def activation(self, path: str) -> Activation:
        layer = Layer(self.checkpoint, path)
        kind, data = self._described(layer)
        scheme = data.get("activation_quantization" if kind == _TYPES[0] else "act_quant_kwargs")
        if scheme is None:
            return None
        found = scheme.get("_data") if isinstance(scheme, dict) else None
        if (
            isinstance(found, dict)
            and found.get("granularity") == _PER_ROW
            and found.get("mapping_type") == _SYMMETRIC
        ):
            return "int8_full_range"
        raise layer.fail(
            f"activations {scheme!r} are not read (symmetric INT8 per row are); load the model "
            "with torchao and call intlass_ops.prepare_ on it"
        )

    def stored(self, path: str) -> StoredWeight:
        layer = Layer(self.checkpoint, path)
        kind, data = self._described(layer)
        bits = 8
        if kind == _TYPES[0]:
            target = data.get("target_dtype")
            name = target.get("_data") if isinstance(target, dict) else None
            if name not in ("int4", "int8"):
                raise layer.fail(f"target_dtype is {target!r}; expected int4 or int8")
            bits = 4 if name == "int4" else 8
        if layer.has("_weight_act_pre_scale") or layer.has("_weight_act_quant_scale"):
            raise layer.fail("scaled activations are not read; use intlass_ops.prepare_")
        n, k = layer.shape(MARKER, 2, (torch.int8,))
        floats = (torch.float16, torch.bfloat16, torch.float32)
        rows, groups = layer.shape("_weight_scale", 2, floats)
        if rows not in (1, n):
            raise layer.fail(f"_weight_scale has {rows} rows; expected N={n}")
        group_size_of(layer, k, groups)
        scales = layer.scales("_weight_scale", (rows, groups)).expand(n, groups).contiguous()

        def codes() -> Tensor:
            q = layer.take(MARKER, (n, k), (torch.int8,))
            if bits == 8:
                return q.view(torch.uint8) ^ 0x80
            if bool((q < packing.S4_MIN).any()) or bool((q > packing.S4_MAX).any()):
                raise layer.fail("_weight_qdata leaves [-8, 7], but target_dtype is int4")
            return packing.pack(q + 8)

        zeros = self._zeros(layer, bits, rows, groups)
        if zeros is not None:
            zeros = zeros.expand(n, groups).contiguous()
        return unsigned(path, bits, (n, k), scales, zeros, None, codes)

    def _zeros(self, layer: Layer, bits: int, rows: int, groups: int) -> Tensor | None:
        """Zero points of the unsigned codes; None: the middle."""
        header = self.checkpoint.tensors.get(f"{layer.path}._weight_zero_point")
        if header is None:
            return None
        middle = 1 << (bits - 1)
        if header.dtype is not None and header.dtype.is_floating_point:
            return layer.scales("_weight_zero_point", (rows, groups)).float() + middle
        values = layer.take("_weight_zero_point", (rows, groups), (torch.int8, torch.int32))
        values = values.to(torch.int64)
        if bool((values < -middle).any()) or bool((values >= middle).any()):
            raise layer.fail(f"_weight_zero_point leaves the {bits}-bit codes")
        return values + middle
