"""The `intlass` torch.library namespace and what every op shares: definition, error style.

`define` registers one op completely: schema, fake, CPU and CUDA kernels, gradient. vmap is
registered next to the op it belongs to.

Private API of PyTorch, checked on 2.11 and 2.13: torch._library.autograd and the dispatch keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl

NAMESPACE = "intlass"
# Lives as long as the process: dropping it would unregister the ops.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

# Dispatch keys that come after autograd, and the only one of them that an ordinary tensor has.
_BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset.raw_repr()
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU).raw_repr()
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA).raw_repr()


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
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    if backward is not None:
        op = getattr(torch.ops.intlass, name).default
        differentiable = make_autograd_impl(op, Info(backward, setup_context))
        kernel = _with_shortcut(op, differentiable, {_CPU: cpu, _CUDA: cuda})
        LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return f"{NAMESPACE}::{name}"


def _with_shortcut(
    op: torch._ops.OpOverload,
    differentiable: Callable[..., Any],
    kernels: dict[int, Callable[..., Any]],
) -> Callable[..., Any]:
    """``differentiable``, or the kernel itself where that comes to the same.

    What torch.library.register_autograd registers dispatches a second time, at twice the cost of
    the first. Ordinary tensors, none of which wants a gradient, are spared it: a keyset without
    anything between autograd and the device means no mode, no subclass and no transform.
    """

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        kernel = kernels.get(keyset.raw_repr() & _BELOW_AUTOGRAD)
        try:
            if kernel is not None and not (
                torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args)
            ):
                return kernel(*args)
            return differentiable(keyset, *args)
        except AttributeError:
            _require_tensors(op, args)
            raise

    return autograd


def _require_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """PyTorch lets None pass for a tensor of the schema; here it is refused by name."""
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if value is None and isinstance(argument.type, torch.TensorType):
            name = op._schema.name.removeprefix(f"{NAMESPACE}::")
            raise TypeError(f"{name}: {argument.name} is None; expected a tensor")


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
