"""Ops `intlass::matmul_int4_bf16_tn` and `intlass::matmul_int8_bf16_tn`: y = x @ w.T, w quantised.

One check, `_problem`, serves the fake, CPU and CUDA kernels, so all raise the same messages. The
mathematics is in reference.py, the CUDA launch in cuda/launch.py, the fast CPU paths in cpu.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import cpu, packing, reference
from ..cuda import launch
from ..explain import record
from ._library import FLOATS, INTEGERS, LIBRARY, NAMESPACE, define, require_device, require_dtype
from .packing import pack_int4  # noqa: F401 (used by a doctest)

# |int8 * int8| <= 2^14, so an int32 sum of fewer than 2^17 products cannot overflow.
MAX_INT_K = 1 << 17
GROUP_STEP = 16


@dataclass(frozen=True)
class Problem:
    """A checked GEMM: kinds of both operands, sizes, group size (K when per channel)."""

    op: str
    x_kind: str  # "fp32", "bf16", "fp16", "s8", "s4", "u4"
    w_kind: str  # "s4", "u4", "s8"
    n: int
    k: int
    group_size: int
    out_dtype: torch.dtype

    @property
    def scheme(self) -> str:
        """Weight and activation bits, as in w4a16."""
        bits = {"s8": 8, "s4": 4, "u4": 4}
        return f"w{bits[self.w_kind]}a{bits.get(self.x_kind, 16)}"


_X_KIND = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "s8"}


def _parameters(op: str, name: str, t: Tensor | None, n: Any, k: Any) -> Any:
    """Groups per row of ``scales`` or ``zeros``: scalar, [N], [N, 1] or [N, K/group_size]."""
    if t is None or t.numel() == 1:
        return 1
    if t.dim() in (1, 2) and t.shape[0] == n:
        groups = 1 if t.dim() == 1 else t.shape[1]
        if groups == 1:
            return 1
        if groups > 0 and k % groups == 0 and (k // groups) % GROUP_STEP == 0:
            return groups
        if groups > 0 and k % groups:
            raise ValueError(
                f"{op}: {name} has {groups} groups a row, which do not divide K={k} evenly"
            )
        raise ValueError(
            f"{op}: group_size={k // max(groups, 1)} (K={k}, {name} {tuple(t.shape)}) "
            f"is not a multiple of {GROUP_STEP}"
        )
    raise ValueError(
        f"{op}: {name} has shape {tuple(t.shape)}; expected a scalar, [N={n}] "
        f"or [N={n}, K/group_size]"
    )


def _per_token(op: str, name: str, t: Tensor | None, lead: tuple[Any, ...]) -> None:
    # In this order: whether an unbacked number of tokens is 1 cannot be asked while tracing.
    if t is None or tuple(t.shape) in (lead, (*lead, 1)):
        return
    if t.numel() != 1:
        raise ValueError(
            f"{op}: {name} has shape {tuple(t.shape)}; expected a scalar, {lead} or {(*lead, 1)}"
        )


def _problem(
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
) -> Problem:
    int4 = op == INT4
    w_name, s_name = ("packed_w", "scales") if int4 else ("b", "b_scale")
    integers = (torch.int8, torch.uint8) if int4 else (torch.int8,)
    require_dtype(op, "a", a.dtype, (torch.bfloat16, torch.float16, torch.float32, *integers))
    require_dtype(op, w_name, w.dtype, (torch.uint8,) if int4 else (torch.int8,))
    require_dtype(op, s_name, scales.dtype, FLOATS)
    require_device(
        op,
        a,
        **{w_name: w, s_name: scales},
        zeros=zeros,
        a_scale=a_scale,
        a_zero=a_zero,
        alpha=alpha,
        bias=bias,
    )
    if a.dim() == 0:
        raise ValueError(f"{op}: a is a scalar; expected [..., K]")
    if w.dim() != 2:
        raise ValueError(f"{op}: {w_name} has shape {tuple(w.shape)}; expected two dimensions")
    packed_a = a.dtype == torch.uint8
    n = w.shape[0]
    if k is None:
        k = 2 * a.shape[-1] if packed_a else a.shape[-1]
    if k < 0:
        raise ValueError(f"{op}: k={k} is negative")
    a_k = packing.packed_size(k) if packed_a else k
    if a.shape[-1] != a_k:
        raise ValueError(f"{op}: a has {a.shape[-1]} columns; K={k} needs {a_k}")
    w_k = packing.packed_size(k) if int4 else k
    if w.shape[1] != w_k:
        unit = "bytes" if int4 else "columns"
        raise ValueError(f"{op}: {w_name} has {w.shape[1]} {unit} a row; K={k} needs {w_k}")
    groups = _parameters(op, s_name, scales, n, k)
    zero_groups = _parameters(op, "zeros", zeros, n, k)
    if groups != zero_groups and 1 not in (groups, zero_groups):
        raise ValueError(
            f"{op}: {s_name} {tuple(scales.shape)} and zeros "
            f"{tuple(zeros.shape) if zeros is not None else None} differ in their groups"
        )
    groups = groups if zero_groups == 1 else zero_groups
    if a.dtype.is_floating_point:
        if a_scale is not None or a_zero is not None:
            raise ValueError(
                f"{op}: a_scale and a_zero belong to integer activations, a is "
                f"{str(a.dtype).removeprefix('torch.')}"
            )
    elif k >= MAX_INT_K:
        raise ValueError(f"{op}: K={k} could overflow the int32 sum; K must be below {MAX_INT_K}")
    lead = tuple(a.shape[:-1])
    _per_token(op, "a_scale", a_scale, lead)
    _per_token(op, "a_zero", a_zero, lead)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{op}: alpha has shape {tuple(alpha.shape)}; expected one element")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; expected ({n},)")
    for name, t in (("a_scale", a_scale), ("alpha", alpha), ("bias", bias)):
        if t is not None:
            require_dtype(op, name, t.dtype, FLOATS)
    for name, t in (("zeros", zeros), ("a_zero", a_zero)):
        if t is not None:
            require_dtype(op, name, t.dtype, (*FLOATS, *INTEGERS))
    if out_dtype is None:
        out_dtype = a.dtype if a.dtype.is_floating_point else torch.bfloat16
    require_dtype(op, "out_dtype", out_dtype, FLOATS)
    return Problem(
        op=op,
        x_kind=("s4" if a_zero is None else "u4") if packed_a else _X_KIND[a.dtype],
        w_kind="s8" if not int4 else ("s4" if zeros is None else "u4"),
        n=n,
        k=k,
        group_size=k // groups,
        out_dtype=out_dtype,
    )


def rows_groups(t: Tensor) -> Tensor:
    """View scales or zeros as [1 or N, 1 or G]."""
    if t.numel() == 1:
        return t.reshape(1, 1)
    return t if t.dim() == 2 else t.unsqueeze(1)


def _fake(op: str, a: Tensor, w: Tensor, *rest: Any) -> Tensor:
    problem = _problem(op, a, w, *rest)
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
    p = _problem(op, a, w, scales, zeros, k, a_scale, a_zero, alpha, bias, out_dtype)
    rows = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    s, z = rows_groups(scales), None if zeros is None else rows_groups(zeros)
    if a.is_floating_point():
        y = (
            cpu.matmul_int8_a16(rows, w, s, p.group_size)
            if p.w_kind == "s8"
            else cpu.matmul_int4_a16(rows, w, s, z, p.group_size, p.k)
        )
        if y is not None:
            _explain(p, rows.shape[0], "cpu", "fast path for floating activations")
            return _finish(p, y, alpha, bias).view(*a.shape[:-1], p.n)
    why = "no fast CPU kernel for this scheme and shape"
    _explain(p, rows.shape[0], "reference float64", why, fallback=True)
    if p.x_kind in ("s4", "u4"):
        rows = packing.unpack(rows, p.k, p.x_kind == "s4")
    codes = w if p.w_kind == "s8" else packing.unpack(w, p.k, p.w_kind == "s4")
    y = reference.matmul(
        rows,
        codes,
        s,
        z,
        a_scale=None if a_scale is None else a_scale.reshape(-1, 1),
        a_zero=None if a_zero is None else a_zero.reshape(-1, 1),
        alpha=alpha,
        bias=bias,
    )
    return reference.round_once(y, p.out_dtype).view(*a.shape[:-1], p.n)


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
    p = _problem(op, a, w, scales, zeros, k, a_scale, a_zero, alpha, bias, out_dtype)
    s, z = rows_groups(scales), None if zeros is None else rows_groups(zeros)
    if p.x_kind == "fp32":
        why = "float32 activations have no tensor-core kernel; cast them to bf16 or fp16"
        _explain(p, math.prod(a.shape[:-1]), "dequantize + mm", why, fallback=True)
        dense = torch.ops.intlass.dequantize(w, scales, zeros, p.k, torch.float32)
        rows = a.reshape(math.prod(a.shape[:-1]), p.k)
        return _finish(p, rows @ dense.T, alpha, bias).view(*a.shape[:-1], p.n)
    return launch.matmul(
        p,
        a,
        w,
        s,
        z,
        a_scale,
        a_zero,
        alpha,
        bias,
    )


INT4 = "matmul_int4_bf16_tn"
INT8 = "matmul_int8_bf16_tn"
_TAIL = "Tensor? alpha=None, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor"


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


define(
    f"{INT4}(Tensor a, Tensor packed_w, Tensor scales, Tensor? zeros=None, SymInt? k=None, "
    f"Tensor? a_scale=None, Tensor? a_zero=None, {_TAIL}",
    fake=_int4(_fake),
    cpu=_int4(_cpu),
    cuda=_int4(_cuda),
)
define(
    f"{INT8}(Tensor a, Tensor b, Tensor? a_scale, Tensor b_scale, Tensor? a_zero=None, {_TAIL}",
    fake=_int8(_fake),
    cpu=_int8(_cpu),
    cuda=_int8(_cuda),
)


def _dequantize_check(
    w: Tensor, scales: Tensor, zeros: Tensor | None, k: int, dtype: torch.dtype
) -> None:
    require_dtype("dequantize", "w", w.dtype, (torch.uint8, torch.int8))
    if w.dim() != 2:
        raise ValueError(f"dequantize: w has shape {tuple(w.shape)}; expected two dimensions")
    stored = packing.packed_size(k) if w.dtype == torch.uint8 else k
    if w.shape[1] != stored:
        raise ValueError(f"dequantize: w has {w.shape[1]} columns; K={k} needs {stored}")
    require_dtype("dequantize", "scales", scales.dtype, FLOATS)
    require_dtype("dequantize", "dtype", dtype, FLOATS)
    _parameters("dequantize", "scales", scales, w.shape[0], k)
    _parameters("dequantize", "zeros", zeros, w.shape[0], k)


def _dequantize_fake(
    w: Tensor, scales: Tensor, zeros: Tensor | None, k: int, dtype: torch.dtype
) -> Tensor:
    _dequantize_check(w, scales, zeros, k, dtype)
    return w.new_empty((w.shape[0], k), dtype=dtype)


def _dequantize(
    w: Tensor, scales: Tensor, zeros: Tensor | None, k: int, dtype: torch.dtype
) -> Tensor:
    _dequantize_check(w, scales, zeros, k, dtype)
    codes = packing.unpack(w, k, zeros is None) if w.dtype == torch.uint8 else w
    x = codes.contiguous().float()
    if zeros is not None:
        x = x - reference.expand_groups(rows_groups(zeros.float()), *codes.shape)
    return (x * reference.expand_groups(rows_groups(scales.float()), *codes.shape)).to(dtype)


define(
    "dequantize(Tensor w, Tensor scales, Tensor? zeros, SymInt k, ScalarType dtype) -> Tensor",
    fake=_dequantize_fake,
    cpu=_dequantize,
    cuda=_dequantize,
)


def _setup(
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


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dX = alpha * dY @ w and dbias = sum of dY; w is dequantised to the dtype of x."""
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    w, scales, zeros, alpha = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = torch.ops.intlass.dequantize(w, scales, zeros, ctx.k, ctx.a_dtype)
        grad_a = grad.to(ctx.a_dtype) @ dense
        if alpha is not None:
            grad_a = grad_a * alpha.to(grad_a.dtype)
    if ctx.bias_dtype is not None:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_a, grad_bias


def _int4_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _int4(lambda op, *args: _setup(op, ctx, *args))(*inputs)


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _int8(lambda op, *args: _setup(op, ctx, *args))(*inputs)


def _int4_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias = _gradients(ctx, grad)
    return grad_a, None, None, None, None, None, None, None, grad_bias, None


def _int8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_a, grad_bias = _gradients(ctx, grad)
    return grad_a, None, None, None, None, None, grad_bias, None


def _batched_activations(name: str) -> Any:
    """vmap over `a` alone is one GEMM with one more leading dimension."""
    op = getattr(torch.ops.intlass, name)
    arguments = [argument.name for argument in op.default._schema.arguments]
    per_token = [arguments.index("a_scale"), arguments.index("a_zero")]

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


for _name, _context, _formula in (
    (INT4, _int4_setup, _int4_backward),
    (INT8, _int8_setup, _int8_backward),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _formula, setup_context=_context, lib=LIBRARY
    )
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _batched_activations(_name), lib=LIBRARY)


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


def dequantize(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense weight [N, K] = (q - zeros) * scales of packed INT4 (uint8) or INT8 codes.

    Computed in fp32, rounded to ``dtype`` once; arguments as in :func:`matmul_int4_bf16_tn`.

    >>> import torch
    >>> dequantize(torch.tensor([[-1, 2]], dtype=torch.int8), torch.tensor([0.5]))
    tensor([[-0.5000,  1.0000]])
    """
    if k is None:
        k = w.shape[-1] * (2 if w.dtype == torch.uint8 else 1)
    dense: Tensor = torch.ops.intlass.dequantize(w, scales, zeros, k, dtype)
    return dense
