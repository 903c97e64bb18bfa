"""bitsandbytes in safetensors, as transformers saves it: LLM.int8 (`load_in_8bit`).

    weight         int8 [N, K]      w[n, k] = weight[n, k] · SCB[n] / 127
    SCB            float32 [N]      the largest magnitude of each row
    weight_format  uint8 []         0: rows, as here; absent: the same

LLM.int8 quantises activations too, but for their outliers. Here they stay in 16 bits, which is more
exact. Which layers are quantised their tensors say: those of `llm_int8_skip_modules` are floating.
Not here: `load_in_4bit` (bitsandbytes_4bit.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn import Activation
from . import FormatError
from .bitsandbytes_4bit import BitsAndBytes4Bit
from .checkpoint import Checkpoint, Layer
from .stored import StoredWeight

_LARGEST = 127  # code of the largest magnitude


def open_bitsandbytes(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> BitsAndBytes4Bit | LlmInt8:
    """The reader of a checkpoint, by what its config was loaded in."""
    where = f"{checkpoint.directory}: bitsandbytes config"
    if config.get("load_in_4bit") is True:
        return BitsAndBytes4Bit(checkpoint, config)
    if config.get("load_in_8bit") is not True:
        raise FormatError(
            f"{where}: load_in_8bit is {config.get('load_in_8bit')!r}; expected true, or "
            "load_in_4bit"
        )
    return LlmInt8(checkpoint)


class LlmInt8:
    """Reader of one checkpoint of LLM.int8."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        every = checkpoint.layers("weight")
        # A weight of codes whose scales are lost is no floating one, either.
        self.paths = [
            path for path in every
            if checkpoint.tensors[f"{path}.weight"].dtype == torch.int8
            or f"{path}.SCB" in checkpoint.tensors
        ]  # fmt: skip

    def activation(self, path: str) -> Activation:
        return None

    def stored(self, path: str) -> StoredWeight:
        layer = Layer(self.checkpoint, path)
        n, k = layer.shape("weight", 2, (torch.int8,))
        if layer.has("weight_format"):
            form = int(layer.take("weight_format", (), (torch.uint8,)))
            if form != 0:
                raise layer.fail(f"weight_format is {form}; expected 0, rows of the weight")
        layer.require("SCB", (n,), (torch.float32,))
        scales = (layer.scales("SCB", (n,)) / _LARGEST).unsqueeze(1)

        def codes() -> Tensor:
            return layer.take("weight", (n, k), (torch.int8,))

        return StoredWeight(path, 8, (n, k), scales, None, None, codes)
