"""Ops `intlass::matmul_int4_bf16_tn`, `_int8_` and `_fp8_`: y = x @ w.T, w quantised.

Here are their schemas and public functions; those of codes of a table are in matmul_lut4.py. Checks
are in problem.py, kernels in matmul_kernels.py, gradients and vmap in gradients.py, the mathematics
in reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gradients
from ._library import LIBRARY, NAMESPACE, define
from .matmul_kernels import fake, run_on_cpu, run_on_cuda
from .packing import pack_int4  # noqa: F401 (used by a doctest)
from .problem import FP8, INT4, INT8


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
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        after = alpha, bias, out_dtype, activation, residual
        return kernel(INT4, a, packed_w, scales, zeros, k, a_scale, a_zero, *after)

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
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        after = alpha, bias, out_dtype, activation, residual
        return kernel(INT8, a, b, b_scale, None, None, a_scale, a_zero, *after)

    return call


def _fp8(kernel: Any) -> Any:
    def call(
        a: Tensor,
        b: Tensor,
        b_scale: Tensor,
        alpha: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        after = alpha, bias, out_dtype, activation, residual
        return kernel(FP8, a, b, b_scale, None, None, None, None, *after)

    return call


def _int4_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _int4(lambda op, *args: gradients.setup(op, ctx, *args))(*inputs)


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _int8(lambda op, *args: gradients.setup(op, ctx, *args))(*inputs)


def _fp8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _fp8(lambda op, *args: gradients.setup(op, ctx, *args))(*inputs)


def _int4_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias, grad_residual = gradients.of_call(ctx, grad)
    return grad_a, *[None] * 7, grad_bias, None, None, grad_residual


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias, grad_residual = gradients.of_call(ctx, grad)
    return grad_a, *[None] * 5, grad_bias, None, None, grad_residual


def _fp8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias, grad_residual = gradients.of_call(ctx, grad)
    return grad_a, *[None] * 3, grad_bias, None, None, grad_residual


TAIL = (
    "Tensor? alpha=None, Tensor? bias=None, ScalarType? out_dtype=None, str? activation=None, "
    "Tensor? residual=None) -> Tensor"
)
define(
    f"{INT4}(Tensor a, Tensor packed_w, Tensor scales, Tensor? zeros=None, SymInt? k=None, "
    f"Tensor? a_scale=None, Tensor? a_zero=None, {TAIL}",
    fake=_int4(fake),
    cpu=_int4(run_on_cpu),
    cuda=_int4(run_on_cuda),
    setup_context=_int4_setup,
    backward=_int4_backward,
)
define(
    f"{INT8}(Tensor a, Tensor b, Tensor? a_scale, Tensor b_scale, Tensor? a_zero=None, {TAIL}",
    fake=_int8(fake),
    cpu=_int8(run_on_cpu),
    cuda=_int8(run_on_cuda),
    setup_context=_int8_setup,
    backward=_int8_backward,
)
define(
    f"{FP8}(Tensor a, Tensor b, Tensor b_scale, {TAIL}",
    fake=_fp8(fake),
    cpu=_fp8(run_on_cpu),
    cuda=_fp8(run_on_cuda),
    setup_context=_fp8_setup,
    backward=_fp8_backward,
)
for _name in (INT4, INT8, FP8):
    torch.library.register_vmap(
        f"{NAMESPACE}::{_name}", gradients.batched_activations(_name), lib=LIBRARY
    )


_int4_op = torch.ops.intlass.matmul_int4_bf16_tn.default
_int8_op = torch.ops.intlass.matmul_int8_bf16_tn.default
_fp8_op = torch.ops.intlass.matmul_fp8_bf16_tn.default


def dispatch(op: str, a: Tensor, w: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    """Either op, on arguments in the order of its kernels."""
    zeros, k, a_scale, *after = rest
    y: Tensor
    if op == INT4:
        y = _int4_op(a, w, scales, zeros, k, a_scale, *after)
    else:
        y = _int8_op(a, w, a_scale, scales, *after)
    return y


def on_device_of(a: Tensor, alpha: Tensor | float) -> Tensor:
    if isinstance(alpha, Tensor):
        return alpha
    return torch.full((), alpha, dtype=torch.float32, device=a.device)


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
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """INT4-weight GEMM: W4A16, W4A8 or W4A4 by the dtype of ``a``.

        v[..., n] = alpha * a_scale * sum_k (a[..., k] - a_zero) * w[n, k] + bias[n]
        w[n, k]   = (q[n, k] - zeros[n, g]) * scales[n, g],   g = k // group_size
        y         = activation(v) + residual

    ``a``: bf16, fp16 (or fp32) [..., K]: W4A16; int8 [..., K]: W4A8; uint8 [..., ceil(K/2)], packed
    INT4 (signed, or unsigned when ``a_zero`` is given): W4A4; int32 [..., K/4]: the same codes as
    int8's in another order (lanes, `intlass_ops.packing`).
    ``packed_w``: uint8 [N, ceil(K/2)] from :func:`pack_int4`; signed codes when ``zeros`` is None,
    else unsigned. ``scales``, ``zeros``: scalar, [N] or [N, K/group_size], group_size a multiple of
    16; zeros may be floating. ``k``: K, needed when it is odd and ``a`` is packed.
    ``a_scale``, ``a_zero``: scalar or one per token, for integer ``a`` only. ``alpha``: a number or
    one element. ``bias`` [N]. ``activation``: "relu", "silu", "gelu" (by erf) or "gelu_tanh".
    ``residual``: [..., N] in ``out_dtype``; a copy is made of it where it is not contiguous.
    Products of integers are summed exactly in int32 (K < 131072), the rest in fp32; one rounding to
    ``out_dtype`` (default: the dtype of a floating ``a``, else bf16).
    W4A16 in groups on a Hopper GPU, M > 16, ``scales`` and output of the type of ``a``: each weight
    is rounded to that type first, as in a dequantised model. ``out_dtype=torch.float32`` rounds
    once on every GPU.

    Returns [..., N]. Differentiable in a floating ``a``, ``bias`` and ``residual``; through an
    activation by computing v again.
    Raises ValueError or TypeError naming the values that do not fit.

    >>> import torch
    >>> w = pack_int4(torch.tensor([[1, -2] * 8]))
    >>> matmul_int4_bf16_tn(torch.ones(1, 16), w, torch.tensor([0.5]))
    tensor([[-4.]])
    """
    if alpha is not None:
        alpha = on_device_of(a, alpha)
    weight = packed_w, scales, zeros, k
    y: Tensor = _int4_op(a, *weight, a_scale, a_zero, alpha, bias, out_dtype, activation, residual)
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
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """INT8-weight GEMM: W8A8 for int8 ``a``, W8A16 for bf16, fp16 (or fp32) ``a``.

        v[..., n] = alpha * a_scale * sum_k (a[..., k] - a_zero) * b[n, k] * b_scale[n, g] + bias[n]
        y         = activation(v) + residual

    ``a`` [..., K]; ``b`` int8 [N, K]; ``a_scale``, ``a_zero`` scalar or one per token, None for a
    floating ``a``; ``b_scale`` scalar, [N] or [N, K/group_size], group_size a multiple of 16.
    ``alpha``, ``bias``, ``activation``, ``residual``, ``out_dtype``, sums, errors and gradients as
    in :func:`matmul_int4_bf16_tn`.

    >>> import torch
    >>> a, b = torch.tensor([[1, 2] * 8], dtype=torch.int8), torch.ones(1, 16, dtype=torch.int8)
    >>> matmul_int8_bf16_tn(a, b, torch.tensor(1.0), torch.tensor([0.5]))
    tensor([[12.]], dtype=torch.bfloat16)
    """
    if alpha is not None:
        alpha = on_device_of(a, alpha)
    y: Tensor = _int8_op(
        a, b, a_scale, b_scale, a_zero, alpha, bias, out_dtype, activation, residual
    )
    return y


def matmul_fp8_bf16_tn(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    alpha: Tensor | float | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """FP8-weight GEMM under bf16, fp16 (or fp32) activations, on any GPU: no FP8 units are needed.

        v[..., n] = alpha * sum_k a[..., k] * b[n, k] * b_scale[n, g] + bias[n]
        y         = activation(v) + residual

    ``a`` [..., K]; ``b`` float8_e4m3fn [N, K], which bf16 and fp16 hold exactly; ``b_scale``
    scalar, [N] or [N, K/group_size], group_size a multiple of 16. ``alpha``, ``bias``,
    ``activation``, ``residual``, ``out_dtype``, sums, errors and gradients as in
    :func:`matmul_int4_bf16_tn`. The two codes that are NaN may be read as 480 of their sign: nobody
    looks for them at every call, `Fp8Linear` and the readers of checkpoints refuse them. In groups
    under bf16, scales of 2^40 and more may give infinities or NaN on a GPU.

    >>> import torch
    >>> b = torch.full((1, 16), 1.5).to(torch.float8_e4m3fn)
    >>> matmul_fp8_bf16_tn(torch.ones(1, 16), b, torch.tensor([0.5]))
    tensor([[12.]])
    """
    if alpha is not None:
        alpha = on_device_of(a, alpha)
    y: Tensor = _fp8_op(a, b, b_scale, alpha, bias, out_dtype, activation, residual)
    return y
