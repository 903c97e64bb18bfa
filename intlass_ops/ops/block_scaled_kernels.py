"""Op `intlass::matmul_block_scaled`: GEMMs of the OCP microscaling formats and NVFP4.

Here: the op with its checks, its CPU kernel (of FP4 weights alone cpu.py's, else exact, float64)
and its choice of a GPU path. Not here: the functions that people call (block_scaled.py), the
formats (fp4.py), how scales are chosen (scales/, fused_quantize.py), the kernels that take FP4
(cuda/launch_fp4.py). The op takes bytes and the name of their format, so that no compiler has to
know FP8 dtypes; the functions take the dtypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import config, cpu, fp4, packing, reference
from ..cuda import launch_fp4
from ..explain import record
from . import gradients
from ._library import FLOATS, define, require_device, require_dtype
from .problem import Problem

_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
# name -> dtypes of codes and scales, size of a block
FORMATS = {
    "mxf4": (torch.uint8, _E8M0, 32),
    "nvf4": (torch.uint8, _E4M3, 16),
    "mxf8": (_E4M3, _E8M0, 32),
}


@dataclass(frozen=True)
class Blocks:
    """One checked call."""

    op: str
    format: str
    m: int
    n: int
    k: int
    group_size: int
    out_dtype: torch.dtype


def _check(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    format_: str,
    blocked: bool,
    b_is_kn: bool,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Blocks:
    if format_ not in FORMATS:
        raise ValueError(f"matmul_block_scaled: format={format_!r}; expected one of {[*FORMATS]}")
    ada = "ada_" if format_ == "mxf4" and not blocked else ""
    op = f"matmul_{ada}{format_}_bf16_{'nn' if b_is_kn else 'tn'}"
    require_device(op, a, b=b, a_scale=a_scale, b_scale=b_scale, alpha=alpha)
    for name, t in (("b", b), ("a_scale", a_scale), ("b_scale", b_scale)):
        if t is not None:
            require_dtype(op, name, t.dtype, (torch.uint8,))
    require_dtype(op, "a", a.dtype, FLOATS if a_scale is None else (torch.uint8,))
    if a.dim() == 0 or b.dim() != 2 or (b_is_kn and format_ != "mxf8"):
        raise ValueError(
            f"{op}: a is {tuple(a.shape)} and b {tuple(b.shape)}; expected [..., K] and two "
            "dimensions, [K, N] only for FP8"
        )
    codes, _, g = FORMATS[format_]
    per_byte = 2 if codes == torch.uint8 else 1
    n, k = (b.shape[1], b.shape[0]) if b_is_kn else (b.shape[0], per_byte * b.shape[1])
    a_k = a.shape[-1] * (1 if a_scale is None else per_byte)
    if a_k != k:
        raise ValueError(f"{op}: a has K={a_k}, b has K={k}")
    if k % g:
        raise ValueError(f"{op}: K={k} is not a multiple of {g}")
    lead = tuple(a.shape[:-1])
    m = math.prod(lead)
    for name, scale, rows, of in (("a_scale", a_scale, m, lead), ("b_scale", b_scale, n, (n,))):
        if scale is None:
            continue
        if blocked and scale.numel() != fp4.blocked_size(rows, k // g):
            raise ValueError(
                f"{op}: {name} has {scale.numel()} elements; to_blocked makes "
                f"{fp4.blocked_size(rows, k // g)} of [{rows}, {k // g}]"
            )
        if not blocked and tuple(scale.shape) != (*of, k // g):
            raise ValueError(
                f"{op}: {name} is {tuple(scale.shape)}; expected {(*of, k // g)} for K={k}"
            )
    if alpha is not None:
        require_dtype(op, "alpha", alpha.dtype, FLOATS)
        if alpha.numel() != 1:
            raise ValueError(f"{op}: alpha has shape {tuple(alpha.shape)}; expected one element")
    out_dtype = out_dtype or (a.dtype if a_scale is None else torch.bfloat16)
    require_dtype(op, "out_dtype", out_dtype, FLOATS)
    return Blocks(op, format_, m, n, k, g, out_dtype)


def _fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    p = _check(a, b, *rest)
    return a.new_empty((*a.shape[:-1], p.n), dtype=p.out_dtype)


def _operands(
    p: Blocks,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    blocked: bool,
    b_is_kn: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(x [M, ...], w [N, ...], their scales), the bytes as what they are."""
    codes, scales, g = FORMATS[p.format]
    x = a.reshape(p.m, a.shape[-1])
    x_scale = None
    if a_scale is not None:
        x = x.view(codes)
        x_scale = a_scale.view(scales)
        x_scale = x_scale if blocked else x_scale.reshape(p.m, p.k // g)
    w = b.t().contiguous() if b_is_kn else b
    return x, w.view(codes), x_scale, b_scale.view(scales)


def decode(codes: Tensor, scales: Tensor, blocked: bool, dtype: torch.dtype) -> Tensor:
    """Rows [R, K] of block-scaled ``codes``, in ``dtype``; ``scales`` plain [R, K/g] or blocked."""
    four_bits = codes.dtype == torch.uint8
    rows, k = codes.shape[0], codes.shape[1] * (2 if four_bits else 1)
    group = 32 if scales.dtype == _E8M0 else 16
    groups = k // group
    plain = fp4.from_blocked(scales, rows, groups) if blocked else scales
    values = (
        fp4.decode_e2m1(packing.unpack(codes, k, signed=False), dtype)
        if four_bits
        else codes.to(dtype)
    )
    factors = fp4.scale_values(plain, dtype)
    return (values.reshape(rows, groups, group) * factors[:, :, None]).view(rows, k)


def _fast_on_cpu(p: Blocks, x: Tensor, w: Tensor, w_scale: Tensor, blocked: bool) -> Tensor | None:
    """x [M, K] @ w.T in float32, codes decoded in registers; None where no compiler has made it."""
    if blocked:
        w_scale = fp4.from_blocked(w_scale, p.n, p.k // p.group_size)
    scales = w_scale.view(torch.uint8)
    nothing = (None,) * 4  # alpha, and what only other ops have
    key = cpu.key_of(p.format, x, w, scales, None, p.k, torch.float32, *nothing)
    plan = cpu.find(key)
    if plan is None:
        one = Problem(p.op, "fp32", "e2m1", p.n, p.k, p.group_size, torch.float32)
        plan = cpu.make(key, one, x, w, scales, None)
    if plan is None:
        return None
    _explain(p, None, "cpu", plan.why)
    return plan.run(x, w, scales, None)


def _cpu(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    format_: str,
    blocked: bool,
    b_is_kn: bool,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    p = _check(a, b, a_scale, b_scale, format_, blocked, b_is_kn, alpha, out_dtype)
    x, w, x_scale, w_scale = _operands(p, a, b, a_scale, b_scale, blocked, b_is_kn)
    if x_scale is None and p.format != "mxf8":
        fast = _fast_on_cpu(p, x, w, w_scale, blocked)
        if fast is not None:
            fast = fast if alpha is None else fast * alpha.float().reshape(())
            return fast.view(*a.shape[:-1], p.n).to(p.out_dtype)
    why = "no fast CPU kernel for FP8, nor for FP4 activations"
    _explain(p, a_scale, "reference float64", why, fallback=True)
    x = x.double() if x_scale is None else decode(x, x_scale, blocked, torch.float64)
    y = x @ decode(w, w_scale, blocked, torch.float64).T
    if alpha is not None:
        y = y * alpha.double().reshape(())
    return reference.round_once(y, p.out_dtype).view(*a.shape[:-1], p.n)


def _cuda(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    format_: str,
    blocked: bool,
    b_is_kn: bool,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    p = _check(a, b, a_scale, b_scale, format_, blocked, b_is_kn, alpha, out_dtype)
    x, w, x_scale, w_scale = _operands(p, a, b, a_scale, b_scale, blocked, b_is_kn)
    rest = w, x_scale, w_scale, blocked, alpha
    if p.m * p.n == 0 or p.k == 0:
        return a.new_zeros((*a.shape[:-1], p.n), dtype=p.out_dtype)
    if a.dtype == torch.float16 and (p.m <= config.FP4_MAX_M or p.format != "nvf4"):
        y = _product(replace(p, m=2 * p.m, out_dtype=torch.float32), torch.cat(two_terms(x)), *rest)
        y = y.view(2, p.m, p.n).sum(0).to(p.out_dtype)
    else:
        y = _product(p, x, *rest)
    return y.view(*a.shape[:-1], p.n)


def two_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    """What adds up to ``x``, of fp16, in bf16: exactly, 8 + 3 bits."""
    high = x.bfloat16()
    return high, torch.where(x.isfinite(), x - high, 0).bfloat16()


def _product(
    p: Blocks,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor,
    blocked: bool,
    alpha: Tensor | None,
) -> Tensor:
    """y [M, N] by a kernel that decodes in registers, or of operands decoded before."""
    if x.dtype == torch.float32:
        why = "float32 activations have no tensor-core kernel; cast them to bf16 or fp16"
        _explain(p, x_scale, "decode + mm", why, fallback=True)
        return _dense(p, x, w, x_scale, w_scale, blocked, alpha)
    if p.format != "mxf8" and x.dtype != torch.float16:
        done = launch_fp4.run(x, w, x_scale, w_scale, blocked, alpha, p.k, p.out_dtype)
        if done is not None:
            y, kernel = done
            _explain(p, x_scale, kernel, "exact: a code of FP4 times its scale is one operand")
            return y
    y = _dense(p, x, w, x_scale, w_scale, blocked, alpha)
    _explain(p, x_scale, "decode to 16 bits + mm", f"M={p.m} is bound by the tensor cores")
    return y


def _dense(
    p: Blocks,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor,
    blocked: bool,
    alpha: Tensor | None,
) -> Tensor:
    """Both operands in bf16 (fp16 beside fp16), which holds every FP4 code times its scale exactly.

    FP8 codes too, but for scales below 2^-122 or above 2^119. Beside fp32 the weight is widened.
    """
    wide = x.dtype == torch.float32
    dtype = x.dtype if x_scale is None and not wide else torch.bfloat16
    factor = 1.0
    if x_scale is not None:
        x, shift = launch_fp4.decode(x, x_scale, blocked, dtype)
        factor *= shift
    w, shift = launch_fp4.decode(w, w_scale, blocked, dtype)
    factor *= shift
    if alpha is None and factor == 1.0 and p.out_dtype == dtype and not wide:
        return torch.mm(x, w.t())
    y = torch.mm(x, w.float().t()) if wide else torch.mm(x, w.t(), out_dtype=torch.float32)
    if alpha is not None:
        y = y * (alpha.float().reshape(()) * factor)
    elif factor != 1.0:
        y = y * factor
    return y.to(p.out_dtype)


def _explain(
    p: Blocks, a_scale: Tensor | None, kernel: str, why: str, *, fallback: bool = False
) -> None:
    bits = "8" if p.format == "mxf8" else "4"
    scheme = f"w{bits}a{bits if a_scale is not None else '16'}"
    record(p.op, scheme, (p.m, p.n, p.k, p.group_size), kernel, why, fallback=fallback)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, a_scale, b_scale, *how = inputs
    alpha = how[3] if len(how) > 3 else None
    ctx.refusal = gradients.refusal(f"matmul_{how[0]}", alpha=alpha)
    ctx.save_for_backward(a, b, b_scale, alpha)
    ctx.how = how[:3]
    ctx.floating = a_scale is None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    a, b, b_scale, alpha = ctx.saved_tensors
    grad_a = None
    if ctx.floating and ctx.needs_input_grad[0]:
        _, blocked, b_is_kn = ctx.how
        p = _check(a, b, None, b_scale, *ctx.how)
        _, w, _, w_scale = _operands(p, a, b, None, b_scale, blocked, b_is_kn)
        dense = decode(w, w_scale, blocked, torch.float32)
        grad_a = grad.to(a.dtype) @ dense.to(a.dtype)
        if alpha is not None:
            grad_a = grad_a * alpha.to(a.dtype).reshape(())
    return grad_a, *[None] * 8


define(
    "matmul_block_scaled(Tensor a, Tensor b, Tensor? a_scale, Tensor b_scale, str format, "
    "bool blocked, bool b_is_kn, Tensor? alpha=None, ScalarType? out_dtype=None) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    setup_context=_setup,
    backward=_backward,
)
