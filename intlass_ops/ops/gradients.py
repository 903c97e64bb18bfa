"""Gradients and vmap of the matmul ops, in the common order of their arguments.

dX = alpha * dY @ w and dbias = sum of dY; scales and zero points have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def setup(
    op: str,
    ctx: Any,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    ctx.refusal = None
    names = ("scales", "zeros", "a_scale", "a_zero", "alpha")
    for name, t in zip(names, (scales, zeros, a_scale, a_zero, alpha), strict=True):
        if t is not None and t.requires_grad:
            ctx.refusal = (
                f"{op}: {name} requires a gradient, which this op does not define; detach it"
            )
    ctx.save_for_backward(w, scales, zeros, alpha)
    ctx.a_dtype, ctx.k = a.dtype, a.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def of_activations_and_bias(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(dX, dbias) for the context that `setup` left.

    w is dequantised to the dtype of x, unless a GPU multiplies by its INT4 codes as they lie.
    """
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    w, scales, zeros, alpha = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        ops, grad_y = torch.ops.intlass, grad.to(ctx.a_dtype)
        if w.dtype == torch.uint8 and w.is_cuda:
            grad_a = ops.matmul_int4_nn(grad_y, w, scales, zeros, ctx.k, alpha)
        else:
            grad_a = grad_y @ ops.dequantize(w, scales, zeros, ctx.k, ctx.a_dtype)
            if alpha is not None:
                grad_a = grad_a * alpha.to(grad_a.dtype)
    if ctx.bias_dtype is not None:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_a, grad_bias


def batched_activations(name: str) -> Any:
    """vmap over `a` alone is one GEMM with one more leading dimension."""
    op = getattr(torch.ops.intlass, name)
    arguments = [argument.name for argument in op.default._schema.arguments]
    per_token = [arguments.index(name) for name in ("a_scale", "a_zero") if name in arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        alone = in_dims[0] is not None and all(d is None for d in in_dims[1:])
        # scales of a batch entry's tokens would have to be repeated for the others
        given = [args[i] for i in per_token if i < len(args) and args[i] is not None]
        if alone and all(t.numel() == 1 for t in given):
            return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        slices = (
            [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([op(*s) for s in slices]), 0

    return rule
