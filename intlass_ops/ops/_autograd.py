"""The autograd kernel of an op: where gradients are recorded, and where none is, straight on.

Instead of torch.library.register_autograd, whose kernels refuse the transforms of torch.func, leave
forward-mode derivatives out without a word, and dispatch a second time where no gradient is wanted.
Not here: the formulas (gradients.py and the ops' own files).

Private API of PyTorch, checked on 2.11 and 2.13: the dispatch keys, and autograd functions of one
level, which are what torch.func itself makes of a torch.autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

# Dispatch keys that come after autograd, and the only one of them that an ordinary tensor has.
_BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset.raw_repr()
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU).raw_repr()
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA).raw_repr()


def autograd_kernel(
    op: torch._ops.OpOverload,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
) -> Callable[..., Any]:
    """What to register for "Autograd", with its keyset; the formulas are as in register_autograd.

    Dispatching a second time costs as much as the first. Ordinary tensors, none of which wants a
    gradient, are spared it: a keyset without anything between autograd and the device means no
    mode, no subclass and no transform.
    """
    name = op._schema.name.partition("::")[2]
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    kernels = {_CPU: cpu, _CUDA: cuda}

    def beyond(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Differentiable(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            *args, keyset = given
            # A Function turns both off; the levels of torch.func around this one want them.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = beyond(keyset, tuple(args))
            setup_context(ctx, (*args, *defaults[len(args) :]), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(
                f"{name}: no forward-mode derivative is defined; take a reverse-mode one "
                "(backward, torch.func.vjp, jacrev)"
            )

    differentiable: Any = Differentiable

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        try:
            wanted = torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args)
            if wanted or forward_ad._current_level >= 0:
                with enable_single_level_autograd_function():
                    return differentiable.apply(*args, keyset)
            at_once = kernels.get(keyset.raw_repr() & _BELOW_AUTOGRAD)
            return beyond(keyset, args) if at_once is None else at_once(*args)
        except AttributeError:
            _require_tensors(op, args)
            raise

    return kernel


def _require_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """PyTorch lets None pass for a tensor of the schema; here it is refused by name."""
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if value is None and isinstance(argument.type, torch.TensorType):
            name = op._schema.name.partition("::")[2]
            raise TypeError(f"{name}: {argument.name} is None; expected a tensor")
