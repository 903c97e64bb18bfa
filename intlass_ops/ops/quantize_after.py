"""Ops `intlass::rms_norm_quantize` and `intlass::silu_mul_quantize`: one read instead of three.

What a transformer computes just before it quantises, with the codes of the two steps in turn:
computed in fp32, rounded to the dtype of x as the modules do, then quantised per token
(quantize.py). The CUDA kernel is cuda/quantize.cu.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import Before
from ..cuda import launch_quantize, plans
from ._library import FLOATS, define, require_device, require_dtype
from .quantize import (
    empty_outputs,
    no_gradient,
    no_setup,
    quantize_tokens,
    require_options,
    stored,
)

Quantized = tuple[Tensor, Tensor, Tensor]


def _check(
    op: str, x: Tensor, name: str, other: Tensor | None, shape: object, bits: int, *options: bool
) -> None:
    require_dtype(op, "x", x.dtype, FLOATS)
    if x.dim() == 0:
        raise ValueError(f"{op}: x is a scalar; expected [..., K]")
    if bits not in (4, 8):
        raise ValueError(f"{op}: bits={bits}; expected 4 or 8")
    if other is not None:
        require_device(op, x, **{name: other})
        if other.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {other.dtype}, x {x.dtype}")
        if tuple(other.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(other.shape)}; expected {shape}")
    require_options(op, x, bits, *options)


def _check_norm(x: Tensor, weight: Tensor | None, bits: int, *options: bool) -> None:
    _check("rms_norm_quantize", x, "weight", weight, tuple(x.shape[-1:]), bits, *options)


def _check_silu(gate: Tensor, up: Tensor, bits: int, *options: bool) -> None:
    _check("silu_mul_quantize", gate, "up", up, tuple(gate.shape), bits, *options)


def _empty(x: Tensor, bits: int, symmetric: bool, lanes: bool) -> Quantized:
    return empty_outputs(x, bits, (*x.shape[:-1], 1), symmetric, lanes)


def _cuda(
    op: str,
    before: Before,
    x: Tensor,
    other: Tensor | None,
    eps: float,
    bits: int,
    symmetric: bool,
    full_range: bool,
    lanes: bool,
) -> Quantized:
    key = (
        op,
        before,
        plans.signature(x),
        other is None or plans.signature(other),
        eps,
        bits,
        symmetric,
        full_range,
        lanes,
        x.data_ptr() % 16,
        0 if other is None else other.data_ptr() % 16,
    )
    plan = launch_quantize.find(key)
    if plan is None:
        options = symmetric, full_range, lanes
        if before.is_norm:
            _check_norm(x, other, bits, *options)
        else:
            assert other is not None
            _check_silu(x, other, bits, *options)
        plan = launch_quantize.make(
            key,
            x,
            math.prod(x.shape[:-1]),
            x.shape[-1],
            stored(x, bits, lanes),
            (*x.shape[:-1], 1),
            bits,
            symmetric,
            before=before,
            other=other,
            eps=eps,
            full_range=full_range,
            lanes=lanes,
        )
    return plan.run(x, None, other)


def _norm_fake(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    bits: int = 8,
    symmetric: bool = True,
    round_first: bool = False,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantized:
    _check_norm(x, weight, bits, symmetric, full_range, lanes)
    return _empty(x, bits, symmetric, lanes)


def _norm_cpu(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    bits: int = 8,
    symmetric: bool = True,
    round_first: bool = False,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantized:
    _check_norm(x, weight, bits, symmetric, full_range, lanes)
    v = x.float()
    y = v * (1 / (v.square().mean(-1, keepdim=True) + eps).sqrt())
    if weight is not None:
        y = (y.to(x.dtype) if round_first else y) * weight.float()
    return quantize_tokens(y.to(x.dtype), bits, symmetric, full_range, lanes)


def _norm_cuda(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    bits: int = 8,
    symmetric: bool = True,
    round_first: bool = False,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantized:
    before = Before.ROUNDED_NORM if round_first and weight is not None else Before.RMS_NORM
    return _cuda("rms_norm_quantize", before, x, weight, eps, bits, symmetric, full_range, lanes)


def _silu_fake(
    gate: Tensor,
    up: Tensor,
    bits: int = 8,
    symmetric: bool = True,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantized:
    _check_silu(gate, up, bits, symmetric, full_range, lanes)
    return _empty(gate, bits, symmetric, lanes)


def _silu_cpu(
    gate: Tensor,
    up: Tensor,
    bits: int = 8,
    symmetric: bool = True,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantized:
    _check_silu(gate, up, bits, symmetric, full_range, lanes)
    return quantize_tokens(torch.nn.functional.silu(gate) * up, bits, symmetric, full_range, lanes)


def _silu_cuda(
    gate: Tensor,
    up: Tensor,
    bits: int = 8,
    symmetric: bool = True,
    full_range: bool = False,
    lanes: bool = False,
) -> Quantized:
    options = bits, symmetric, full_range, lanes
    return _cuda("silu_mul_quantize", Before.SILU_MUL, gate, up, 0.0, *options)


define(
    "rms_norm_quantize(Tensor x, Tensor? weight, float eps, int bits=8, bool symmetric=True, "
    "bool round_first=False, bool full_range=False, bool lanes=False) -> (Tensor, Tensor, Tensor)",
    fake=_norm_fake,
    cpu=_norm_cpu,
    cuda=_norm_cuda,
    setup_context=no_setup,
    backward=no_gradient,
)
define(
    "silu_mul_quantize(Tensor gate, Tensor up, int bits=8, bool symmetric=True, "
    "bool full_range=False, bool lanes=False) -> (Tensor, Tensor, Tensor)",
    fake=_silu_fake,
    cpu=_silu_cpu,
    cuda=_silu_cuda,
    setup_context=no_setup,
    backward=no_gradient,
)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    bits: int = 8,
    symmetric: bool = True,
    round_first: bool = False,
    full_range: bool = False,
    lanes: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """RMS norm and quantisation per token in one kernel.

        y = x / sqrt(mean(x^2) + eps) * weight        fp32, rounded to the dtype of x once
        q, scale, zero = quantize_int8(y) or quantize_int4(y)

    ``round_first``: rounded before it is multiplied by ``weight`` too, as the Llama of transformers
    does. ``full_range``, ``lanes``: as in :func:`quantize_int8`. ``x`` [..., K] fp32, bf16 or fp16,
    ``weight`` [K] of the same dtype or None, as torch.nn.functional.rms_norm takes them. Returns
    (q, scale [..., 1], zero or None).
    Raises TypeError or ValueError for dtypes and shapes that do not fit; no gradient.

    >>> import torch
    >>> q, scale, zero = rms_norm_quantize(torch.tensor([[3.0, -3.0]]))
    >>> q
    tensor([[ 127, -127]], dtype=torch.int8)
    """
    q, scale, zero = torch.ops.intlass.rms_norm_quantize(
        x, weight, eps, bits, symmetric, round_first, full_range, lanes
    )
    return q, scale, None if symmetric else zero


def silu_mul_quantize(
    gate: Tensor,
    up: Tensor,
    *,
    bits: int = 8,
    symmetric: bool = True,
    full_range: bool = False,
    lanes: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """SwiGLU's product and its quantisation per token in one kernel.

        y = silu(gate) * up        silu and product each rounded to the dtype of gate
        q, scale, zero = quantize_int8(y) or quantize_int4(y)

    ``gate``, ``up`` [..., K] of one dtype (fp32, bf16 or fp16), also the halves of one tensor.
    ``full_range``, ``lanes``: as in :func:`quantize_int8`. Returns (q, scale [..., 1], zero or
    None); errors as in :func:`rms_norm_quantize`.

    >>> import torch
    >>> q, scale, zero = silu_mul_quantize(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]]))
    >>> q
    tensor([[   0, -127]], dtype=torch.int8)
    """
    q, scale, zero = torch.ops.intlass.silu_mul_quantize(
        gate, up, bits, symmetric, full_range, lanes
    )
    return q, scale, None if symmetric else zero
