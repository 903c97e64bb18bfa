"""Gradients and vmap of the matmul ops, in the common order of their arguments.

dX = alpha * dV @ w and dbias = sum of dV, for V the result before its activation; scales and zero
points have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import FP8, INT4, INT8, table_of

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def refusal(op: str, **constants: Tensor | None) -> str | None:
    """What `backward` must say instead of leaving out the gradient of one of ``constants``."""
    for name, t in constants.items():
        if t is not None and t.requires_grad:
            hint = ", or train with QATLinear" if name == "a_scale" else ""
            return (
                f"{op}: {name} requires a gradient, which this op does not define; detach it{hint}"
            )
    return None


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
    activation: str | None = None,
    residual: Tensor | None = None,
) -> None:
    ctx.refusal = refusal(
        op, scales=scales, zeros=zeros, a_scale=a_scale, a_zero=a_zero, alpha=alpha
    )
    again = (None,) * 4 if activation is None else (a, a_scale, a_zero, bias)
    ctx.save_for_backward(w, scales, zeros, alpha, *again)
    ctx.op, ctx.activation, ctx.given_k = op, activation, k
    ctx.a_dtype, ctx.k = a.dtype, a.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.adds = residual is not None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def of_call(ctx: Any, grad: Tensor) -> Gradients:
    """(dX, dbias, dresidual) for the context that `setup` left.

    w is dequantised to the dtype of x, unless a GPU multiplies by its INT4 codes as they lie.
    """
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    w, scales, zeros, alpha = ctx.saved_tensors[:4]
    grad_residual = grad if ctx.adds else None
    if ctx.activation is not None and (ctx.needs_input_grad[0] or ctx.bias_dtype is not None):
        grad = _before_activation(ctx, grad)
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        ops, grad_y = torch.ops.intlass, grad.to(ctx.a_dtype)
        if ctx.op == INT4 and w.is_cuda:
            grad_a = ops.matmul_int4_nn(grad_y, w, scales, zeros, ctx.k, alpha)
        else:
            grad_a = grad_y @ ops.dequantize(w, scales, zeros, ctx.k, ctx.a_dtype, table_of(ctx.op))
            if alpha is not None:
                grad_a = grad_a * alpha.to(grad_a.dtype)
    if ctx.bias_dtype is not None:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_a, grad_bias, grad_residual


def _before_activation(ctx: Any, grad: Tensor) -> Tensor:
    """dV in float32. V is computed anew: keeping it would take the memory of one more output."""
    w, scales, zeros, alpha, a, a_scale, a_zero, bias = ctx.saved_tensors
    ops, aten = torch.ops.intlass, torch.ops.aten
    after = alpha, bias, torch.float32
    if ctx.op == INT4:
        v = ops.matmul_int4_bf16_tn(a, w, scales, zeros, ctx.given_k, a_scale, a_zero, *after)
    elif ctx.op == FP8:
        v = ops.matmul_fp8_bf16_tn(a, w, scales, *after)
    elif ctx.op == INT8:
        v = ops.matmul_int8_bf16_tn(a, w, a_scale, scales, a_zero, *after)
    else:
        v = getattr(ops, ctx.op)(a, w, scales, ctx.given_k, *after)
    grad = grad.float()
    if ctx.activation == "relu":
        grad = torch.where(v > 0, grad, 0.0)
    elif ctx.activation == "silu":
        grad = aten.silu_backward(grad, v)
    else:
        grad = aten.gelu_backward(grad, v, approximate=_GELU[ctx.activation])
    return grad


def batched_activations(name: str) -> Any:
    """vmap over `a` alone is one GEMM with one more leading dimension."""
    op = getattr(torch.ops.intlass, name)
    arguments = [argument.name for argument in op.default._schema.arguments]
    per_token = [arguments.index(name) for name in ("a_scale", "a_zero") if name in arguments]
    last = arguments.index("residual") if "residual" in arguments else len(arguments)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        alone = in_dims[0] is not None and all(d is None for d in in_dims[1:last])
        # scales of a batch entry's tokens would have to be repeated for the others
        given = [args[i] for i in per_token if i < len(args) and args[i] is not None]
        if alone and all(t.numel() == 1 for t in given):
            added: list[Tensor] = []
            if last < len(args) and args[last] is not None:
                t, d = args[last], in_dims[last]
                added = [t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)]
            return op(args[0].movedim(in_dims[0], 0), *args[1:last], *added), 0
        slices = (
            [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([op(*s) for s in slices]), 0

    return rule
