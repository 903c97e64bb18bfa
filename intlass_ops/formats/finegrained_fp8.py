"""FP8 as DeepSeek, Qwen and MiniMax publish it (quant_method "fp8"), and FBGEMM's ("fbgemm_fp8").

    weight            e4m3 [N, K]
    weight_scale_inv  float32 or e8m0 [ceil(N/bn), ceil(K/bk)]  of blocks, weight_block_size
                      [bn, bk]; the name says "inverse", but weights are multiplied by it:
                      w = code · scale
    weight_scale      the same; or one number of the whole tensor; or [N, 1] (FBGEMM)

Which layers are FP8 their tensors say: those that a config leaves out have floating weights.
Activations stay in 16 bits: what is said of their scales is not used. Not here: the same tensors in
files of compressed-tensors and ModelOpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..nn import Activation
from . import fp8
from .checkpoint import Checkpoint, Layer

# Names of scales, by method.
_SCALES = {"fp8": ("weight_scale_inv", "weight_scale"), "fbgemm_fp8": ("weight_scale",)}
METHODS = tuple(_SCALES)


class FinegrainedFp8:
    """Reader of one checkpoint; ``config`` is its quantization_config."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.scales = _SCALES[config["quant_method"]]
        size = config.get("weight_block_size")
        where = f"{checkpoint.directory}: weight_block_size"
        self.blocks = [] if size is None else [fp8.block_of(size, where)]
        every = checkpoint.layers(fp8.WEIGHT)
        self.paths = [path for path in every if fp8.is_fp8(Layer(checkpoint, path))]

    def stored(self, path: str) -> fp8.StoredFp8:
        layer = Layer(self.checkpoint, path)
        scale = next((name for name in self.scales if layer.has(name)), self.scales[0])
        return fp8.stored(layer, scale, self.blocks)

    def activation(self, path: str) -> Activation:
        return None
