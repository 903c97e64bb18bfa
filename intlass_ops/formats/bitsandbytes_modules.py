"""4-bit linears of bitsandbytes in memory (`Linear4bit`), for `prepare_`: codes and scales as ours.

Lives here: `converted`. A table of sixteen numbers is no arithmetic that a graph would show, so
these modules are read by what they hold: a weight of type `Params4bit`, whose `quant_state` has the
tensors that files have (bitsandbytes_4bit.py). Not here: modules that are traced (modules.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..lut4 import BITSANDBYTES
from ..lut4_linear import Lut4Linear
from ..ops.problem import GROUP_STEP
from .bitsandbytes_4bit import HALVES, are_numbers_of, swapped, unnested
from .fp8 import smallest_dtype


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a linear of bitsandbytes' 4 bits, of any kind."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and type(weight).__name__ == "Params4bit"


@torch.no_grad()
def converted(module: Any) -> Lut4Linear | str:
    """A `Lut4Linear` of the same weight; or why there is none."""
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet, as bitsandbytes does when it is moved to a device"
    if state.quant_type not in BITSANDBYTES or not are_numbers_of(
        state.quant_type, state.code.float()
    ):
        return f"codes of bitsandbytes' {state.quant_type} that have numbers of their own"
    table, unit = BITSANDBYTES[state.quant_type]
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
    scales = (absmax.float() / unit).view(n, k // block)
    scales = scales.to(smallest_dtype(scales, HALVES))
    return Lut4Linear(swapped(weight.detach(), n), scales, bias, table)
