"""FP8 linears of libraries whose forward is a kernel of theirs, or that have none, for `prepare_`.

Lives here: `spelled_out`, which recognises such a module and gives a stand-in: dequantise,
multiply. What it computes is then read, proved and packed like any other graph. Not here: stand-ins
of integer weights (formats/modules.py), FP8 in files (formats/fp8.py).

    weight                          float8_e4m3fn [N, K]
    weight_scale, weight_scale_inv  one number, [N], [N, 1], [N, G] or [ceil(N/bn), ceil(K/bk)];
                                    weights are multiplied by it, whatever its name is; bytes are
                                    those of e8m0 (MXFP8)

Read are compressed-tensors, transformers' FP8Linear (DeepSeek, Qwen, MiniMax) and FbgemmFp8Linear.
Most of them quantise activations to FP8 as well, which our kernels do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fp8 import CODES

ACTIVATIONS = (
    "it quantises its activations to FP8, ours stay floats: intlass_ops.load_pretrained reads such "
    "files so, and prepare_(model, same_codes=False) converts this layer"
)


class _StandIn(nn.Module):
    """Holds the module it stands for; its tensors stay where they are."""

    def __init__(self, module: Any, block: Sequence[int] | None) -> None:
        super().__init__()
        self.module, self.block = module, block

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        w = m.weight.float() * _spread(_scale(m).float(), m.weight.shape, self.block)
        bias = m.bias if m.bias is None else m.bias.to(x.dtype)
        return functional.linear(x, w.to(x.dtype), bias)


def _scale(module: Any) -> Tensor:
    name = "weight_scale_inv" if hasattr(module, "weight_scale_inv") else "weight_scale"
    found: Tensor = getattr(module, name)
    return found.view(torch.float8_e8m0fnu) if found.dtype == torch.uint8 else found


def _spread(scale: Tensor, shape: Sequence[int], block: Sequence[int] | None) -> Tensor:
    """A number for each row, or for each element, of a weight [N, K]."""
    n, k = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.dim() == 1:
        return scale.reshape(n, 1)
    rows, columns = block or (1, k // scale.shape[1])
    return scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


@dataclass(frozen=True)
class SpelledOut:
    """A module in ordinary operations. activations: whether the library quantises those too."""

    make: Callable[[], nn.Module]
    activations: bool


def spelled_out(module: Any) -> SpelledOut | None:
    """None for modules whose own forward says it all, or that are no such linear."""
    weight, kind = getattr(module, "weight", None), type(module).__name__
    if not isinstance(weight, Tensor) or weight.dtype != CODES or weight.dim() != 2:
        return None
    scheme = getattr(module, "quantization_scheme", None)
    of_file = getattr(scheme, "weights", None)
    if of_file is not None and hasattr(module, "weight_scale"):
        block = getattr(of_file, "block_structure", None)
        activations = scheme.input_activations is not None  # type: ignore[union-attr]
    elif kind == "FP8Linear" and hasattr(module, "weight_scale_inv"):
        block, activations = module.block_size, True
    elif kind == "FbgemmFp8Linear":
        block, activations = None, True
    else:
        return None
    return SpelledOut(lambda: _StandIn(module, block), activations)
