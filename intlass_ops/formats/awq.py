"""AWQ checkpoints of the GEMM layout: INT4 with zero points.

qweight int32 [K, N/8]   nibble i of word c is q[8c + ORDER[i], k], lowest bits first
qzeros  int32 [G, N/8]   z in the same order; nothing is added
scales  [G, N]           w[n, k] = scales[g, n] · (q[n, k] - z[n, g]), g = k // group_size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import packing
from . import FormatError
from .checkpoint import Checkpoint, Layer, number
from .stored import StoredWeight, fields, group_size_of, unsigned

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """Reader of one checkpoint; ``config`` is its quantization_config."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        where = f"{checkpoint.directory}: AWQ config"
        self.checkpoint = checkpoint
        number(config, "bits" if "bits" in config else "w_bit", where, 4)
        version = config.get("version", config.get("format", "gemm"))
        if not isinstance(version, str) or version.lower() not in ("gemm", "exllama", "ipex"):
            raise FormatError(
                f"{where}: version is {version!r}; the layout that is read is that of 'gemm'"
            )
        self.paths = checkpoint.layers("qweight")

    def activation(self, path: str) -> None:
        """AWQ keeps activations in floating point."""

    def stored(self, path: str) -> StoredWeight:
        layer = Layer(self.checkpoint, path)
        k, words = layer.shape("qweight", 2, (torch.int32,))
        n = 8 * words
        groups, _ = layer.shape("scales", 2, (torch.float16, torch.bfloat16, torch.float32))
        group_size_of(layer, k, groups)
        scales = layer.scales("scales", (groups, n)).t().contiguous()  # [N, G]
        zeros = _channels(layer.take("qzeros", (groups, words), (torch.int32,))).t().contiguous()

        def codes() -> Tensor:
            q = _channels(layer.take("qweight", (k, words), (torch.int32,)))  # [K, N]
            return packing.pack(q.t())

        return unsigned(path, 4, (n, k), scales, zeros, None, codes)


def _channels(words: Tensor) -> Tensor:
    """int32 [R, N/8] to uint8 [R, N], channels in order."""
    inverse = sorted(range(8), key=ORDER.__getitem__)
    blocks: Tensor = fields(words, 4).unflatten(-1, (-1, 8))
    return blocks[..., inverse].flatten(-2)
