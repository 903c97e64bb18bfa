"""The kernels of the matmul ops, INT4, INT8, FP8 and table-coded weights: fake, CPU and CUDA.

They take the arguments of each op in one common order. Not here: the mathematics (reference.py),
fast CPU paths (cpu.py, cpu_integers.py), plans and launches of GPU kernels (cuda/launch.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import batch_invariance, cpu, cpu_integers, lut4, packing, reference
from ..cuda import launch, plans
from ..explain import listening, record
from ._library import without_autocast
from .problem import Problem, check, rows_groups, table_of


def fake(op: str, a: Tensor, w: Tensor, *rest: Any) -> Tensor:
    problem = check(op, a, w, *rest)
    return a.new_empty((*a.shape[:-1], problem.n), dtype=problem.out_dtype)


def run(op: str, a: Tensor, *rest: Any) -> Tensor:
    """What the op does once the dispatcher has found the device."""
    return (run_on_cuda if a.is_cuda else run_on_cpu)(op, a, *rest)


def run_on_cpu(
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
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    after = alpha, bias, activation, residual
    key = cpu.key_of(op, a, w, scales, zeros, k, out_dtype, *after)
    plan = cpu.find(key) if a_scale is None and a_zero is None else None
    if plan is not None:
        return _planned(plan, a, w, scales, zeros, alpha, bias, residual)
    p = check(
        op, a, w, scales, zeros, k, a_scale, a_zero, alpha, bias, out_dtype, activation, residual
    )
    plan = cpu.make(key, p, a, w, scales, zeros)
    if plan is not None:
        return _planned(plan, a, w, scales, zeros, alpha, bias, residual)
    rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    s, z = rows_groups(scales), None if zeros is None else rows_groups(zeros)
    sa = None if a_scale is None else a_scale.reshape(-1, 1)
    za = None if a_zero is None else a_zero.reshape(-1, 1)
    if p.x_kind in ("s4", "u4"):
        rows = packing.unpack(rows, p.k, p.x_kind == "s4")
    elif rows.dtype == torch.int32:
        rows = packing.from_lanes(rows)
    if not rows.is_floating_point() and cpu_integers.is_exact():
        _explain(p, rows.shape[0], "cpu int8", "PyTorch's INT8 product, a group at a time")
        y = cpu_integers.matmul(p, rows, w, s, z, za)
        y = reference.scale_and_shift(y, sa, alpha, bias)
    else:
        why = "no fast CPU kernel for this scheme and shape"
        _explain(p, rows.shape[0], "reference float64", why, fallback=True)
        codes = _codes(p, w, rows.dtype)
        if batch_invariance.enabled():
            x = rows.double() if za is None else rows.double() - za.double()
            y = batch_invariance.row_by_row(x, reference.dequantize(codes, s, z))
            y = reference.scale_and_shift(y, sa, alpha, bias)
        else:
            y = reference.matmul(rows, codes, s, z, a_scale=sa, a_zero=za, alpha=alpha, bias=bias)
    y = _activate_and_add(p, y.view(*a.shape[:-1], p.n), residual)
    return reference.round_once(y, p.out_dtype)


def _codes(p: Problem, w: Tensor, dtype: torch.dtype) -> Tensor:
    """What zero points and scales make weights of, one an element; ``dtype``: of activations."""
    if p.w_kind in lut4.TABLES:
        return lut4.decode(w, p.k, p.w_kind, dtype)
    return packing.unpack(w, p.k, p.w_kind == "s4") if w.dtype == torch.uint8 else w


def _planned(
    plan: cpu.Plan,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if listening():
        _explain(plan.problem, plan.m, "cpu", plan.why)
    y = plan.run(a, w, scales, zeros)
    return _finish(plan.problem, y, alpha, bias, residual)


def _finish(
    p: Problem, y: Tensor, alpha: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """What comes after the products y [..., N], in float32, and the one rounding."""
    if alpha is not None:
        y = y * alpha.float().reshape(())
    if bias is not None:
        y = y + bias.float()
    return _activate_and_add(p, y, residual).to(p.out_dtype)


def _activate_and_add(p: Problem, y: Tensor, residual: Tensor | None) -> Tensor:
    if p.activation is not None:
        activation = reference.ACTIVATIONS[p.activation]
        if batch_invariance.enabled():
            y = batch_invariance.each_row(activation, y)
        else:
            y = activation(y)
    return y if residual is None else y + residual.to(y.dtype)


def _explain(p: Problem, m: int, kernel: str, why: str, *, fallback: bool = False) -> None:
    sizes = (m, p.n, p.k, p.group_size)
    record(p.op, p.scheme, sizes, kernel, why, fallback=fallback)


def run_on_cuda(
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
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    signature = plans.signature
    key = (
        op,
        # Of what every call has, written out: a tuple less to make and to hash.
        a.dtype, a.shape, a.stride(), a.get_device(), a.data_ptr() % 16,
        w.dtype, w.shape, w.stride(), w.get_device(), w.data_ptr() % 16,
        scales.dtype, scales.shape, scales.stride(), scales.get_device(),
        zeros is None or signature(zeros),
        a_scale is None or signature(a_scale),
        a_zero is None or signature(a_zero),
        alpha is None or signature(alpha),
        bias is None or signature(bias),
        k,
        out_dtype,
        activation,
        None if residual is None else (signature(residual), residual.data_ptr() % 16),
        batch_invariance.enabled(),
    )  # fmt: skip
    plan = launch.find(key)
    if plan is None:
        p = check(
            op,
            a,
            w,
            scales,
            zeros,
            k,
            a_scale,
            a_zero,
            alpha,
            bias,
            out_dtype,
            activation,
            residual,
        )
        if p.x_kind == "fp32":
            return _cuda_float32(p, a, w, scales, zeros, alpha, bias, residual)
        plan = launch.make(key, p, a, w, scales, zeros, a_scale, a_zero, alpha, bias, residual)
    return plan.run(a, w, scales, zeros, a_scale, a_zero, alpha, bias, residual)


def _cuda_float32(
    p: Problem,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    why = "float32 activations have no tensor-core kernel; cast them to bf16 or fp16"
    _explain(p, math.prod(a.shape[:-1]), "dequantize + mm", why, fallback=True)
    dense = torch.ops.intlass.dequantize(w, scales, zeros, p.k, torch.float32, table_of(p.op))
    rows = a.reshape(math.prod(a.shape[:-1]), p.k)
    invariant = batch_invariance.enabled()
    with without_autocast(a.device):
        y = batch_invariance.row_by_row(rows, dense) if invariant else rows @ dense.T
    return _finish(p, y.view(*a.shape[:-1], p.n), alpha, bias, residual)
