"""The `intlass` torch.library namespace and what every op shares: definition, error style.

`define` registers one op completely: schema, fake, CPU and CUDA kernels, gradient. vmap is
registered next to the op it belongs to.

Private API of PyTorch, checked on 2.11 and 2.13: torch._C._autograd._profiler_enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._autograd import autograd_kernel

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
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> str:
    """Register the op of ``schema``; returns its qualified name. Ops neither alias nor mutate.

    ``backward`` and ``setup_context`` are those of torch.library.register_autograd; ``tags`` come
    on top of those that every op has.
    """
    name = schema.split("(", 1)[0]
    every = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    LIBRARY.define(schema, tags=(*every, *tags))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    implement(LIBRARY, name, cpu=cpu, cuda=cuda)
    if backward is not None:
        op = getattr(torch.ops.intlass, name).default
        assert setup_context is not None
        kernel = autograd_kernel(op, setup_context, backward, cpu, cuda)
        LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return f"{NAMESPACE}::{name}"


def implement(
    library: torch.library.Library, name: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any]
) -> None:
    """Register an op's kernels, and let compiled code call them without the dispatcher.

    That is by the overload's attributes ``cpu`` and ``cuda`` (lowering/graph_pass.py writes them
    into Inductor's code). Under a profiler, which would not see such a call, they dispatch.
    """
    op = getattr(torch.ops.intlass, name).default
    for device, kernel in (("cpu", cpu), ("cuda", cuda)):
        library.impl(name, kernel, device.upper())
        setattr(op, device, _without_dispatcher(op, kernel))


def _without_dispatcher(
    op: torch._ops.OpOverload, kernel: Callable[..., Any]
) -> Callable[..., Any]:
    is_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs) if is_profiled() else kernel(*args, **kwargs)

    return call


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_dtype(op: str, name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        names = ", ".join(type_name(d) for d in allowed)
        raise TypeError(f"{op}: {name} has dtype {type_name(dtype)}; expected one of {names}")


def require_module(op: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")


def require_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the input on {first.device}")


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which `torch.autocast` does not round products that are meant in float32."""
    return torch.autocast("cuda" if device.type == "cuda" else "cpu", enabled=False)
