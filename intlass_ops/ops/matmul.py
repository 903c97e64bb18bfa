"""Ops `intlass::matmul_int4_bf16_tn` and `intlass::matmul_int8_bf16_tn`: y = x @ w.T, w quantised.

Their checks are in problem.py, gradients and vmap in gradients.py, the mathematics in reference.py,
the CUDA launch in cuda/launch.py, the fast CPU paths in cpu.py and cpu_integers.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import batch_invariance, cpu, cpu_integers, packing, reference
from ..cuda import launch, plans
from ..explain import listening, record
from . import gradients
from ._library import LIBRARY, NAMESPACE, define
from .packing import pack_int4  # noqa: F401 (used by a doctest)
from .problem import INT4, INT8, Problem, check, rows_groups


def _fake(op: str, a: Tensor, w: Tensor, *rest: Any) -> Tensor:
    problem = check(op, a, w, *rest)
    return a.new_empty((*a.shape[:-1], problem.n), dtype=problem.out_dtype)


def _cpu(
    op: str,
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
) -> Tensor:
    key = cpu.key_of(op, a, w, scales, zeros, k, alpha, bias, out_dtype)
    plan = cpu.find(key) if a_scale is None and a_zero is None else None
    if plan is not None:
        return _planned(plan, a, w, scales, zeros, alpha, bias)
    p = check(op, a, w, scales, zeros, k, a_scale, a_zero, alpha, bias, out_dtype)
    plan = cpu.make(key, p, a, w, scales, zeros)
    if plan is not None:
        return _planned(plan, a, w, scales, zeros, alpha, bias)
    rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    s, z = rows_groups(scales), None if zeros is None else rows_groups(zeros)
    sa = None if a_scale is None else a_scale.reshape(-1, 1)
    za = None if a_zero is None else a_zero.reshape(-1, 1)
    if p.x_kind in ("s4", "u4"):
        rows = packing.unpack(rows, p.k, p.x_kind == "s4")
    if not rows.is_floating_point() and cpu_integers.is_exact():
        _explain(p, rows.shape[0], "cpu int8", "PyTorch's INT8 product, a group at a time")
        y = cpu_integers.matmul(p, rows, w, s, z, za)
        y = reference.scale_and_shift(y, sa, alpha, bias)
    else:
        why = "no fast CPU kernel for this scheme and shape"
        _explain(p, rows.shape[0], "reference float64", why, fallback=True)
        codes = w if p.w_kind == "s8" else packing.unpack(w, p.k, p.w_kind == "s4")
        if batch_invariance.enabled():
            x = rows.double() if za is None else rows.double() - za.double()
            y = batch_invariance.row_by_row(x, reference.dequantize(codes, s, z))
            y = reference.scale_and_shift(y, sa, alpha, bias)
        else:
            y = reference.matmul(rows, codes, s, z, a_scale=sa, a_zero=za, alpha=alpha, bias=bias)
    return reference.round_once(y, p.out_dtype).view(*a.shape[:-1], p.n)


def _planned(
    plan: cpu.Plan,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if listening():
        _explain(plan.problem, plan.m, "cpu", plan.why)
    y = plan.run(a, w, scales, zeros)
    if alpha is None and bias is None and plan.problem.out_dtype is torch.float32:
        return y
    return _finish(plan.problem, y, alpha, bias)


def _finish(p: Problem, y: Tensor, alpha: Tensor | None, bias: Tensor | None) -> Tensor:
    """alpha, bias and the one rounding, for products y [M, N] in float32."""
    if alpha is not None:
        y = y * alpha.float().reshape(())
    if bias is not None:
        y = y + bias.float()
    return y.to(p.out_dtype)


def _explain(p: Problem, m: int, kernel: str, why: str, *, fallback: bool = False) -> None:
    sizes = (m, p.n, p.k, p.group_size)
    record(p.op, p.scheme, sizes, kernel, why, fallback=fallback)


def _cuda(
    op: str,
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
) -> Tensor:
    signature = plans.signature
    key = (
        op,
        signature(a),
        signature(w),
        signature(scales),
        zeros is None or signature(zeros),
        a_scale is None or signature(a_scale),
        a_zero is None or signature(a_zero),
        alpha is None or signature(alpha),
        bias is None or signature(bias),
        k,
        out_dtype,
        a.data_ptr() % 16,
        w.data_ptr() % 16,
        batch_invariance.enabled(),
    )
    plan = launch.find(key)
    if plan is None:
        p = check(op, a, w, scales, zeros, k, a_scale, a_zero, alpha, bias, out_dtype)
        if p.x_kind == "fp32":
            return _cuda_float32(p, a, w, scales, zeros, alpha, bias)
        plan = launch.make(key, p, a, w, scales, zeros, a_scale, a_zero, alpha, bias)
    return plan.run(a, w, scales, zeros, a_scale, a_zero, alpha, bias)


def _cuda_float32(
    p: Problem,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    why = "float32 activations have no tensor-core kernel; cast them to bf16 or fp16"
    _explain(p, math.prod(a.shape[:-1]), "dequantize + mm", why, fallback=True)
    dense = torch.ops.intlass.dequantize(w, scales, zeros, p.k, torch.float32)
    rows = a.reshape(math.prod(a.shape[:-1]), p.k)
    y = batch_invariance.row_by_row(rows, dense) if batch_invariance.enabled() else rows @ dense.T
    return _finish(p, y, alpha, bias).view(*a.shape[:-1], p.n)


def _int4(kernel: Any) -> Any:
    """The op's arguments in its schema's order, handed to a kernel in the common order."""

    def call(
        a: Tensor,
        packed_w: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        k: int | None = None,
        a_scale: Tensor | None = None,
        a_zero: Tensor | None = None,
        alpha: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Any:
        return kernel(INT4, a, packed_w, scales, zeros, k, a_scale, a_zero, alpha, bias, out_dtype)

    return call


def _int8(kernel: Any) -> Any:
    def call(
        a: Tensor,
        b: Tensor,
        a_scale: Tensor | None,
        b_scale: Tensor,
        a_zero: Tensor | None = None,
        alpha: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Any:
        return kernel(INT8, a, b, b_scale, None, None, a_scale, a_zero, alpha, bias, out_dtype)

    return call


def _int4_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _int4(lambda op, *args: gradients.setup(op, ctx, *args))(*inputs)


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _int8(lambda op, *args: gradients.setup(op, ctx, *args))(*inputs)


def _int4_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias = gradients.of_activations_and_bias(ctx, grad)
    return grad_a, None, None, None, None, None, None, None, grad_bias, None


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias = gradients.of_activations_and_bias(ctx, grad)
    return grad_a, None, None, None, None, None, grad_bias, None


_TAIL = "Tensor? alpha=None, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor"
define(
    f"{INT4}(Tensor a, Tensor packed_w, Tensor scales, Tensor? zeros=None, SymInt? k=None, "
    f"Tensor? a_scale=None, Tensor? a_zero=None, {_TAIL}",
    fake=_int4(_fake),
    cpu=_int4(_cpu),
    cuda=_int4(_cuda),
    setup_context=_int4_setup,
    backward=_int4_backward,
)
define(
    f"{INT8}(Tensor a, Tensor b, Tensor? a_scale, Tensor b_scale, Tensor? a_zero=None, {_TAIL}",
    fake=_int8(_fake),
    cpu=_int8(_cpu),
    cuda=_int8(_cuda),
    setup_context=_int8_setup,
    backward=_int8_backward,
)
for _name in (INT4, INT8):
    torch.library.register_vmap(
        f"{NAMESPACE}::{_name}", gradients.batched_activations(_name), lib=LIBRARY
    )


def _alpha(alpha: Tensor | float | None, device: torch.device) -> Tensor | None:
    if alpha is None or isinstance(alpha, Tensor):
        return alpha
    return torch.full((), alpha, dtype=torch.float32, device=device)


def matmul_int4_bf16_tn(
    a: Tensor,
    packed_w: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    k: int | None = None,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    alpha: Tensor | float | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """INT4-weight GEMM: W4A16, W4A8 or W4A4 by the dtype of ``a``.

        y[..., n] = alpha * a_scale * sum_k (a[..., k] - a_zero) * w[n, k] + bias[n]
        w[n, k]   = (q[n, k] - zeros[n, g]) * scales[n, g],   g = k // group_size

    ``a``: bf16, fp16 (or fp32) [..., K]: W4A16; int8 [..., K]: W4A8; uint8 [..., ceil(K/2)], packed
    INT4 (signed, or unsigned when ``a_zero`` is given): W4A4.
    ``packed_w``: uint8 [N, ceil(K/2)] from :func:`pack_int4`; signed codes when ``zeros`` is None,
    else unsigned. ``scales``, ``zeros``: scalar, [N] or [N, K/group_size], group_size a multiple of
    16; zeros may be floating. ``k``: K, needed when it is odd and ``a`` is packed.
    ``a_scale``, ``a_zero``: scalar or one per token, for integer ``a`` only. ``alpha``: a number or
    one element. ``bias`` [N]. Products of integers are summed exactly in int32 (K < 131072), the
    rest in fp32; one rounding to ``out_dtype`` (default: the dtype of a floating ``a``, else bf16).
    W4A16 in groups on a Hopper GPU, M > 16, ``scales`` and output of the type of ``a``: each weight
    is rounded to that type first, as in a dequantised model. ``out_dtype=torch.float32`` rounds
    once on every GPU.

    Returns [..., N]. Differentiable in a floating ``a`` and in ``bias``.
    Raises ValueError or TypeError naming the values that do not fit.

    >>> import torch
    >>> w = pack_int4(torch.tensor([[1, -2] * 8]))
    >>> matmul_int4_bf16_tn(torch.ones(1, 16), w, torch.tensor([0.5]))
    tensor([[-4.]])
    """
    y: Tensor = torch.ops.intlass.matmul_int4_bf16_tn(
        a, packed_w, scales, zeros, k, a_scale, a_zero, _alpha(alpha, a.device), bias, out_dtype
    )
    return y


def matmul_int8_bf16_tn(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    *,
    a_zero: Tensor | None = None,
    alpha: Tensor | float | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """INT8-weight GEMM: W8A8 for int8 ``a``, W8A16 for bf16, fp16 (or fp32) ``a``.

        y[..., n] = alpha * a_scale * sum_k (a[..., k] - a_zero) * b[n, k] * b_scale[n, g] + bias[n]

    ``a`` [..., K]; ``b`` int8 [N, K]; ``a_scale``, ``a_zero`` scalar or one per token, None for a
    floating ``a``; ``b_scale`` scalar, [N] or [N, K/group_size], group_size a multiple of 16.
    ``alpha``, ``bias``, ``out_dtype``, sums, errors and gradients as in
    :func:`matmul_int4_bf16_tn`.

    >>> import torch
    >>> a, b = torch.tensor([[1, 2] * 8], dtype=torch.int8), torch.ones(1, 16, dtype=torch.int8)
    >>> matmul_int8_bf16_tn(a, b, torch.tensor(1.0), torch.tensor([0.5]))
    tensor([[12.]], dtype=torch.bfloat16)
    """
    y: Tensor = torch.ops.intlass.matmul_int8_bf16_tn(
        a, b, a_scale, b_scale, a_zero, _alpha(alpha, a.device), bias, out_dtype
    )
    return y
