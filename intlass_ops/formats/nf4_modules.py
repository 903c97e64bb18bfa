"""4-bit linears of bitsandbytes in memory (`Linear4bit`), for `prepare_`: codes and scales as ours.

Lives here: `converted`. A table of sixteen numbers is no arithmetic that a graph would show, so
these modules are read by what they hold: a weight of type `Params4bit`, whose `quant_state` has the
tensors that files have (bitsandbytes_nf4.py). Not here: modules that are traced (modules.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nf4_linear import Nf4Linear
from ..ops.problem import GROUP_STEP
from .bitsandbytes_nf4 import HALVES, is_nf4, swapped, unnested
from .fp8 import smallest_dtype


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a linear of bitsandbytes' 4 bits, of any kind."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and type(weight).__name__ == "Params4bit"


@torch.no_grad()
def converted(module: Any) -> Nf4Linear | str:
    """An `Nf4Linear` of the same weight; or why there is none."""
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet, as bitsandbytes does when it is moved to a device"
    if state.quant_type != "nf4" or not is_nf4(state.code.float()):
        return f"codes of bitsandbytes' {state.quant_type}: of its 4 bits, NF4 is read"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has laid its weight out for this CPU, and rounded its scales: call "
            "prepare_ before the first forward"
        )
    n, k = state.shape
    block = state.blocksize
    if k % block or (block != k and block % GROUP_STEP):
        return f"K={k} with blocksize={block}: blocks that run on into the next row are not read"
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = unnested(absmax, inner.code, inner.absmax, inner.blocksize, state.offset)
    bias = None if module.bias is None else module.bias.detach()
    scales = absmax.float().view(n, k // block)
    return Nf4Linear(swapped(weight.detach(), n), scales.to(smallest_dtype(scales, HALVES)), bias)
