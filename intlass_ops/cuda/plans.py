"""What the plans of all ops share: signatures, the memory of plans, allocation of outputs.

A plan holds what a call's signature (dtypes, shapes, strides, alignment) decides: the kernel, its
grid and every argument but the pointers. The first call of a signature makes it, checks included;
the next ones allocate the output, fill in pointers, and launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import config
from . import jit

TYPE = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
ZERO_TYPE = {**TYPE, torch.int32: "int", torch.int8: "signed char", torch.uint8: "unsigned char"}
ALIGNMENT = 16
_MAX_PLANS = 4096  # one a number of tokens: a server would otherwise collect them for ever

Key = tuple[Any, ...]
Plan = TypeVar("Plan")


def signature(t: Tensor | None) -> Key | None:
    """What of a tensor a plan depends on, but for the alignment of its pointer."""
    return None if t is None else (t.dtype, t.shape, t.stride(), t.get_device())


def remember(plans: dict[Key, Plan], key: Key, plan: Plan) -> Plan:
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


# What Inductor's generated code allocates with (PyTorch 2.11 and 2.13), in half the time of
# torch.empty.
_fast_empty: Callable[..., Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def empty(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised contiguous tensor."""
    if _fast_empty is not None and _current_device() == device.index:
        return _fast_empty(shape, strides, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def aligned(t: Tensor) -> bool:
    """Whether its rows start where 16 bytes are read at once."""
    row = t.stride(0) * t.element_size()
    return row % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))


@lru_cache
def device_of(index: int) -> config.Device:
    properties = torch.cuda.get_device_properties(index)
    device = config.device_of(jit.arch_of(index), properties.multi_processor_count)
    return replace(device, name=properties.name)
