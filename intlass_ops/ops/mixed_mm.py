"""Op `intlass::matmul_int4_nn`, x @ w for a packed INT4 w, and `mixed_mm`, HQQ's interface.

w is the buffer that `matmul_int4_bf16_tn` multiplies by the transpose of: one packed weight serves
the forward and the backward product. On a GPU cuda/transposed.cu and, with wgmma, for hundreds of
tokens cuda/transposed_wgmma.cu decode weights in registers; for more w is dequantised once, and the
product is cuBLAS's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import packing, reference
from ..cuda import launch_transposed
from ..explain import record
from . import gradients
from ._library import (
    FLOATS,
    INTEGERS,
    LIBRARY,
    NAMESPACE,
    define,
    require_device,
    require_dtype,
    without_autocast,
)
from .matmul import matmul_int4_bf16_tn
from .problem import check_parameters, rows_groups

_OP = "matmul_int4_nn"


def _check(
    x: Tensor,
    packed_w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    alpha: Tensor | None = None,
) -> None:
    require_dtype(_OP, "x", x.dtype, FLOATS)
    require_dtype(_OP, "packed_w", packed_w.dtype, (torch.uint8,))
    require_dtype(_OP, "scales", scales.dtype, FLOATS)
    if zeros is not None:
        require_dtype(_OP, "zeros", zeros.dtype, (*FLOATS, *INTEGERS))
    require_device(_OP, x, packed_w=packed_w, scales=scales, zeros=zeros, alpha=alpha)
    if packed_w.dim() != 2 or packed_w.shape[1] != packing.packed_size(k):
        raise ValueError(
            f"{_OP}: packed_w is {tuple(packed_w.shape)}; K={k} needs [N, {packing.packed_size(k)}]"
        )
    if x.dim() == 0 or x.shape[-1] != packed_w.shape[0]:
        raise ValueError(
            f"{_OP}: x is {tuple(x.shape)}; packed_w has N={packed_w.shape[0]} rows to sum over"
        )
    check_parameters(_OP, "scales", scales, packed_w.shape[0], k)
    check_parameters(_OP, "zeros", zeros, packed_w.shape[0], k)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{_OP}: alpha has shape {tuple(alpha.shape)}; expected one element")


def _fake(
    x: Tensor,
    packed_w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    alpha: Tensor | None = None,
) -> Tensor:
    _check(x, packed_w, scales, zeros, k, alpha)
    return x.new_empty((*x.shape[:-1], k))


def _cpu(
    x: Tensor,
    packed_w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    alpha: Tensor | None = None,
) -> Tensor:
    _check(x, packed_w, scales, zeros, k, alpha)
    _explain(x, packed_w, k, "reference float64", "no fast CPU kernel for x @ w", fallback=True)
    codes = packing.unpack(packed_w, k, zeros is None)
    z = None if zeros is None else rows_groups(zeros)
    w = reference.dequantize(codes, rows_groups(scales), z)
    y = x.double() @ w
    if alpha is not None:
        y = y * alpha.double().reshape(())
    return reference.round_once(y, x.dtype)


def _cuda(
    x: Tensor,
    packed_w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    alpha: Tensor | None = None,
) -> Tensor:
    _check(x, packed_w, scales, zeros, k, alpha)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    s, z = rows_groups(scales), None if zeros is None else rows_groups(zeros)
    plan = launch_transposed.plan_of(rows, packed_w, s, z, k)
    if isinstance(plan, str):
        fallback = x.dtype == torch.float32
        _explain(x, packed_w, k, "dequantize + mm", plan, fallback=fallback)
        dense = torch.ops.intlass.dequantize(packed_w, scales, zeros, k, x.dtype)
        with without_autocast(x.device):
            y = rows @ dense if alpha is None else _scaled(rows, dense, alpha)
    else:
        _explain(x, packed_w, k, plan.name, "weights are decoded in registers")
        y = plan.run(rows, packed_w, s, z, k, alpha)
    shaped: Tensor = y.view(*x.shape[:-1], k)
    return shaped


def _scaled(x: Tensor, w: Tensor, alpha: Tensor) -> Tensor:
    """alpha·(x @ w), rounded once."""
    wide = x @ w if x.dtype == torch.float32 else torch.mm(x, w, out_dtype=torch.float32)
    return (wide * alpha.float().reshape(())).to(x.dtype)


def _explain(
    x: Tensor, packed_w: Tensor, k: int, kernel: str, why: str, *, fallback: bool = False
) -> None:
    sizes = math.prod(x.shape[:-1]), k, packed_w.shape[0], 0
    record(_OP, "w4a16", sizes, kernel, why, fallback=fallback)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed_w, scales, zeros, ctx.k, *rest = inputs
    alpha = rest[0] if rest else None
    ctx.refusal = gradients.refusal(_OP, scales=scales, zeros=zeros, alpha=alpha)
    ctx.save_for_backward(packed_w, scales, zeros, alpha)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    packed_w, scales, zeros, alpha = ctx.saved_tensors
    back = torch.ops.intlass.matmul_int4_bf16_tn
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = back(grad, packed_w, scales, zeros, ctx.k, None, None, alpha)
    return grad_x, *[None] * 5


define(
    f"{_OP}(Tensor x, Tensor packed_w, Tensor scales, Tensor? zeros, SymInt k, "
    "Tensor? alpha=None) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    setup_context=_setup,
    backward=_backward,
)
torch.library.register_vmap(f"{NAMESPACE}::{_OP}", gradients.batched_activations(_OP), lib=LIBRARY)


def mixed_mm(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    transposed: bool = False,
) -> Tensor:
    """Product of floating ``a`` with an INT4 weight W [K, N], in the layout of HQQ's kernels.

        transposed False   a [..., K] -> a @ W   [..., N]
        transposed True    a [..., N] -> a @ Wᵀ  [..., K]      W[k, n] = (q - zeros)·scales

    ``b`` uint8 [K/2, N], row 2i of the codes in the low nibble and row 2i + 1 in the high one: it
    is `pack_int4` of Wᵀ, transposed: as such a view it is used as it lies, in both directions;
    with other strides every call copies it. ``scales``, ``zeros`` [K/group_size, N], of a's dtype
    or wider; zeros floating or integer with codes in [0, 15], None for signed codes.

    Differentiable in ``a``, the gradient taking the other direction on the same buffer. Transposed,
    a GPU rounds each weight to a's dtype first, as in a dequantised model (and q - zeros before
    that, where zeros are fractions).
    Raises ValueError or TypeError naming what does not fit.

    >>> from intlass_ops import pack_int4
    >>> w = torch.tensor([[1, 2]] * 16)  # [K, N]
    >>> b, scales = pack_int4(w.T).T, torch.ones(1, 2)
    >>> mixed_mm(torch.ones(1, 16), b, scales, None, group_size=16)
    tensor([[16., 32.]])
    """
    if b.dim() != 2 or b.dtype != torch.uint8:
        raise TypeError(f"mixed_mm: b is {b.dtype} {tuple(b.shape)}; expected uint8 [K/2, N]")
    require_dtype("mixed_mm", "a", a.dtype, FLOATS)
    k, n = 2 * b.shape[0], b.shape[1]
    summed, name = (n, "N") if transposed else (k, "K")
    if a.dim() == 0 or a.shape[-1] != summed:
        raise ValueError(f"mixed_mm: a is {tuple(a.shape)}; expected [..., {name}={summed}]")
    if group_size < 1 or k % group_size:
        raise ValueError(f"mixed_mm: K={k} is not a multiple of group_size={group_size}")
    for name, t in (("scales", scales), ("zeros", zeros)):
        if t is not None and tuple(t.shape) != (k // group_size, n):
            raise ValueError(
                f"mixed_mm: {name} is {tuple(t.shape)}; expected {(k // group_size, n)} for "
                f"K={k}, N={n}, group_size={group_size}"
            )
    w, s, z = b.t(), scales.t(), None if zeros is None else zeros.t()
    if not transposed:
        return matmul_int4_bf16_tn(a, w, s, z, k=k)
    y: Tensor = torch.ops.intlass.matmul_int4_nn(a, w, s, z, k)
    return y
