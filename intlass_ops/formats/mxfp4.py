"""MXFP4, as gpt-oss is published: fused experts of e2m1 codes, a power of two for 32 of them.

    <path>_blocks  uint8 [experts, N, K/32, 16]  two codes a byte, the first one in the low bits
    <path>_scales  uint8 [experts, N, K/32]      e8m0: 2^(scale - 127)

These are the bytes of an `Fp4ExpertLinear`. Not here: MXFP4 of other libraries, which have a linear
for each expert (fp4.py, experts.py), what the layer computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..fp4_linear import GROUPS, MXFP4
from . import fp4
from .checkpoint import Checkpoint, Layer
from .layers import LayerSpec, fp4_spec

_GROUP = GROUPS[MXFP4]


class Mxfp4:
    """The fused experts of a checkpoint; it has no single linears that are quantised."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        end = "_blocks"
        self.paths = [name.removesuffix(end) for name in checkpoint.tensors if name.endswith(end)]

    def names(self, path: str) -> tuple[str, str]:
        """Of the tensors that a layer is made of."""
        return f"{path}_blocks", f"{path}_scales"

    def experts(self, path: str) -> tuple[LayerSpec, dict[str, Callable[[], Tensor]]]:
        """Spec of an `Fp4ExpertLinear`, and how to get each of its tensors."""
        parent, _, name = path.rpartition(".")
        layer, u8 = Layer(self.checkpoint, parent), (torch.uint8,)
        blocks = layer.shape(f"{name}_blocks", 4, u8)
        experts, n, groups, size = blocks
        if 2 * size != _GROUP:
            raise layer.fail(f"{name}_blocks has {2 * size} codes a block; expected {_GROUP}")
        scales = experts, n, groups
        layer.require(f"{name}_scales", scales, u8)
        return fp4_spec(MXFP4, (experts, n, groups * _GROUP)), {
            "weight": lambda: layer.take(f"{name}_blocks", blocks, u8).flatten(2),
            "scales": lambda: fp4.take_scales(layer, f"{name}_scales", scales, MXFP4),
        }
