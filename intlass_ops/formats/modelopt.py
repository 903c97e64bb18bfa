"""NVIDIA ModelOpt's checkpoints: NVFP4 and FP8, as config.json or hf_quant_config.json names them.

    weight          uint8 [N, K/2]    NVFP4: e2m1, the even k in the low nibble
    weight_scale    e4m3 [N, K/16]
    weight_scale_2  float32 []        w = code · weight_scale · weight_scale_2

    weight          e4m3 [N, K]       FP8
    weight_scale    float32 []        w = code · weight_scale; MXFP8: uint8 [N, K/32], e8m0

    input_scale     float32 []        of quantised activations; here they stay in 16 bits

Scales of a quantised cache of keys and values (k_proj.k_scale, v_proj.v_scale) are not used either.
Which of the two a layer is its weight says, also where a checkpoint has both (MIXED_PRECISION).
Not read: AWQ's and SVDQuant's NVFP4, which scale the inputs of a layer too; FP8 in other blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fp4_linear import NVFP4
from ..nn import Activation
from . import FormatError, fp4, fp8
from .checkpoint import Checkpoint, Layer

CONFIG = "hf_quant_config.json"
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "MXFP8")
_MXFP8_BLOCK = 1, 32
_MIXED = "MIXED_PRECISION"
_NAMES = fp4.Names("weight", "weight_scale", "weight_scale_2", False, "input_scale")


class Modelopt:
    """Reader of one checkpoint; ``config`` is its quantization_config."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        where = f"{checkpoint.directory}: ModelOpt's config"
        algorithm = config.get("quant_algo")
        if algorithm not in (*_ALGORITHMS, _MIXED):
            raise FormatError(
                f"{where}: quant_algo is {algorithm!r}; read are {', '.join(_ALGORITHMS)}"
            )
        layers = config.get("quantized_layers", {})
        if not isinstance(layers, dict):
            raise FormatError(f"{where}: quantized_layers is no object")
        self.layers = layers if algorithm == _MIXED else {}
        self.paths = checkpoint.layers(_NAMES.scales)

    def stored(self, path: str) -> fp4.StoredFp4 | fp8.StoredFp8:
        layer = Layer(self.checkpoint, path)
        described = self.layers.get(path)
        if isinstance(described, dict) and described.get("quant_algo") not in _ALGORITHMS:
            raise layer.fail(
                f"quant_algo is {described.get('quant_algo')!r}; read are {', '.join(_ALGORITHMS)}"
            )
        if fp8.is_fp8(layer):
            return fp8.stored(layer, _NAMES.scales, (_MXFP8_BLOCK,))
        return fp4.stored(layer, NVFP4, _NAMES)

    def activation(self, path: str) -> Activation:
        return None


def settings(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The quantization_config that a file of ModelOpt's own stands for."""
    inner = raw.get("quantization")
    if not isinstance(inner, dict):
        raise FormatError(f"{where}: quantization is no object")
    return {"quant_method": "modelopt", **inner}
