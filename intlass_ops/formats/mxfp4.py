"""MXFP4, as gpt-oss is published: fused experts of e2m1 codes, a power of two for 32 of them.

    <path>_blocks  uint8 [experts, N, K/32, 16]  two codes a byte, the first one in the low bits
    <path>_scales  uint8 [experts, N, K/32]      e8m0: 2^(scale - 127)

Twice an e2m1 code is an integer, so such a weight is INT8 in groups of 32, exactly; at twice the
size. Not here: what multiplies FP4 as it is (ops/block_scaled.py), which has no experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import fp4, packing
from ..lowering.storage import INT8
from .checkpoint import Checkpoint, Layer
from .layers import LayerSpec

_GROUP = 32
_NOT_A_NUMBER = 255


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
        """Spec of an `IntExpertLinear`, and how to get each of its tensors."""
        parent, _, name = path.rpartition(".")
        layer, u8 = Layer(self.checkpoint, parent), (torch.uint8,)
        experts, n, groups, size = layer.shape(f"{name}_blocks", 4, u8)
        if 2 * size != _GROUP:
            raise layer.fail(f"{name}_blocks has {2 * size} codes a block; expected {_GROUP}")
        k = groups * _GROUP

        def codes() -> Tensor:
            blocks = layer.take(f"{name}_blocks", (experts, n, groups, size), u8)
            found = torch.empty(experts, n, k, dtype=torch.int8)
            # One after the other: between codes and integers they take many times as much.
            for each, to in zip(blocks, found, strict=True):
                pairs = packing.unpack(each.reshape(n, k // 2), k, signed=False)
                to.copy_(2 * fp4.decode_e2m1(pairs))
            return found

        def scales() -> Tensor:
            stored = layer.take(f"{name}_scales", (experts, n, groups), u8)
            if bool((stored == _NOT_A_NUMBER).any()):
                raise layer.fail(f"{name}_scales holds a NaN; the file is damaged")
            # half of it, for codes that are twice theirs: bf16 has all of them, subnormal ones too
            return (fp4.e8m0_values(stored) / 2).to(torch.bfloat16)

        layer.shape(f"{name}_scales", 3, u8)
        tensors = (
            ("weight", torch.int8, (experts, n, k)),
            ("scales", torch.bfloat16, (experts, n, groups)),
        )
        return LayerSpec(INT8, k, None, tensors), {"weight": codes, "scales": scales}
