"""Ops `intlass::matmul_nf4_bf16_tn` and its like, one for each table of lut4.py: y = x @ w.T.

Their schema, and the public function for all. Everything else is that of the ops in matmul.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import lut4
from . import gradients
from ._library import LIBRARY, NAMESPACE, define
from .matmul import TAIL, on_device_of
from .matmul_kernels import fake, run_on_cpu, run_on_cuda
from .packing import pack_int4  # noqa: F401 (used by a doctest)
from .problem import LUT4


def _in_order(op: str, kernel: Any) -> Any:
    """The op's arguments in its schema's order, handed to a kernel in the common order."""

    def call(
        a: Tensor,
        packed_w: Tensor,
        scales: Tensor,
        k: int | None = None,
        alpha: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Any:
        after = alpha, bias, out_dtype, activation, residual
        return kernel(op, a, packed_w, scales, None, k, None, None, *after)

    return call


def _setup(op: str) -> Any:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _in_order(op, lambda op, *args: gradients.setup(op, ctx, *args))(*inputs)

    return setup


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias, grad_residual = gradients.of_call(ctx, grad)
    return grad_a, *[None] * 4, grad_bias, None, None, grad_residual


for _op in LUT4.values():
    define(
        f"{_op}(Tensor a, Tensor packed_w, Tensor scales, SymInt? k=None, {TAIL}",
        fake=_in_order(_op, fake),
        cpu=_in_order(_op, run_on_cpu),
        cuda=_in_order(_op, run_on_cuda),
        setup_context=_setup(_op),
        backward=_backward,
    )
    torch.library.register_vmap(
        f"{NAMESPACE}::{_op}", gradients.batched_activations(_op), lib=LIBRARY
    )
_OPS = {table: getattr(torch.ops.intlass, op).default for table, op in LUT4.items()}


def matmul_lut4_bf16_tn(
    a: Tensor,
    packed_w: Tensor,
    scales: Tensor,
    *,
    table: str = lut4.NF4,
    k: int | None = None,
    alpha: Tensor | float | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """GEMM of 4-bit codes that index sixteen numbers, under bf16, fp16 (or fp32) activations.

        v[..., n] = alpha * sum_k a[..., k] * numbers[q[n, k]] * scales[n, g] + bias[n]
        y         = activation(v) + residual

    ``a`` [..., K]; ``packed_w`` uint8 [N, ceil(K/2)], two codes a byte (`pack_int4`); ``table``:
    "nf4" (QLoRA, bitsandbytes), "iq4nl" (GGUF's IQ4_NL and IQ4_XS), "fp4" (e2m1) or "bnbfp4"
    (bitsandbytes), `intlass_ops.lut4`; NF4's numbers are rounded to the dtype of ``a``. ``scales``
    scalar, [N] or [N, K/group_size], group_size a multiple of 16. ``k``, ``alpha``, ``bias``,
    ``activation``, ``residual``, ``out_dtype``, sums, errors and gradients as in
    :func:`matmul_int4_bf16_tn`. Each table has an op: `torch.ops.intlass.matmul_nf4_bf16_tn`, ….

    >>> import torch
    >>> codes = torch.tensor([[15, 0] + [7] * 14])  # 1, -1, zeros
    >>> a = torch.arange(1.0, 17.0).view(1, 16)
    >>> matmul_lut4_bf16_tn(a, pack_int4(codes), torch.tensor([0.5]))
    tensor([[-0.5000]])
    """
    if table not in _OPS:
        tables = ", ".join(map(repr, _OPS))
        raise ValueError(f"matmul_lut4_bf16_tn: table={table!r}; expected one of {tables}")
    if alpha is not None:
        alpha = on_device_of(a, alpha)
    after = alpha, bias, out_dtype, activation, residual
    y: Tensor = _OPS[table](a, packed_w, scales, k, *after)
    return y
