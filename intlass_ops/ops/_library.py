"""The `intlass` torch.library namespace and what every op shares: definition, error style.

`define` registers one op completely: schema, fake, CPU and CUDA kernels. Autograd and vmap are
registered next to the op they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "intlass"
# Lives as long as the process: dropping it would unregister the ops.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
) -> str:
    """Register the op of ``schema``; returns its qualified name. Ops neither alias nor mutate."""
    name = schema.split("(", 1)[0]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    LIBRARY.define(schema, tags=tags)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    return f"{NAMESPACE}::{name}"


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_dtype(op: str, name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        names = ", ".join(type_name(d) for d in allowed)
        raise TypeError(f"{op}: {name} has dtype {type_name(dtype)}; expected one of {names}")


def require_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the input on {first.device}")
