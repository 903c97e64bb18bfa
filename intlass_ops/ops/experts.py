"""Op `intlass::matmul_experts`: tokens sorted by expert, each times the weight of its expert.

How many tokens an expert has is data, so a graph holds this one op. On a GPU it is one grouped
GEMM, for which nobody waits (cuda/launch_experts.py). Lives here: the checks, and for everything
else the loop over the experts that have tokens, each one call of a matmul op. Not here: what sorts
the tokens (integrations/experts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import batch_invariance, fp4
from ..cuda import launch_experts
from ..explain import record
from . import gradients
from ._library import FLOATS, define, require_device, require_dtype, type_name
from .block_scaled_kernels import two_terms
from .problem import FP8, INT4, INT8, Problem, check, inputs_of

OP = "matmul_experts"
_OPS = {torch.uint8: INT4, torch.int8: INT8, torch.float8_e4m3fn: FP8}  # of one expert


def _check(
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ends: Tensor,
    k: int,
    a_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    alpha: Tensor | None = None,
) -> Problem:
    """The problem of one expert; raises TypeError or ValueError for what does not fit."""
    require_dtype(OP, "w", w.dtype, tuple(_OPS))
    require_dtype(OP, "ends", ends.dtype, (torch.int32, torch.int64))
    others = {"scales": scales, "zeros": zeros, "bias": bias, "alpha": alpha}
    require_device(OP, a, w=w, ends=ends, a_scale=a_scale, **others)
    if a.dim() != 2:
        raise ValueError(f"{OP}: a has shape {tuple(a.shape)}; expected [tokens, K]")
    if w.dim() != 3 or not w.shape[0]:
        raise ValueError(f"{OP}: w has shape {tuple(w.shape)}; expected [experts, N, …]")
    of_fp4 = scales.dtype == torch.uint8
    if zeros is not None and (of_fp4 or w.dtype != torch.uint8):
        kind = "w is FP4" if of_fp4 else f"w is {type_name(w.dtype)}"
        raise ValueError(f"{OP}: zeros belong to INT4 weights (uint8), {kind}")
    experts = w.shape[0]
    if ends.shape != (experts,):
        raise ValueError(f"{OP}: ends has shape {tuple(ends.shape)}; expected ({experts},)")
    shapes = "[experts]", "[experts, N]", "[experts, N, groups]"
    for (name, t), dims in zip(others.items(), (3, 3, 2, 1), strict=True):
        if t is not None and (t.dim() != dims or t.shape[0] != experts):
            raise ValueError(
                f"{OP}: {name} has shape {tuple(t.shape)}; expected {shapes[dims - 1]}"
            )
    if alpha is not None:
        require_dtype(OP, "alpha", alpha.dtype, FLOATS)
    one = [None if t is None else t[0] for t in (zeros, bias)]
    if of_fp4:
        return _check_fp4(a, w, scales, k, a_scale, one[1], out_dtype)
    return check(
        _OPS[w.dtype],
        a,
        w[0],
        scales[0],
        one[0],
        k,
        a_scale,
        None,
        None,
        one[1],
        out_dtype,
        called=OP,
    )


def _check_fp4(
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    k: int,
    a_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Problem:
    require_dtype(OP, "w", w.dtype, (torch.uint8,))
    require_dtype(OP, "a", a.dtype, FLOATS)
    group_size = fp4.group_size_of(OP, k, scales.shape[2])
    of_row = a.new_empty(1, dtype=torch.float32)  # all else is as of INT4 with one scale a row
    p = check(INT4, a, w[0], of_row, None, k, a_scale, None, None, bias, out_dtype, called=OP)
    if scales.shape[1] != p.n:
        raise ValueError(
            f"{OP}: scales has shape {tuple(scales.shape)}; expected [experts, N={p.n}, groups]"
        )
    return replace(p, w_kind="e2m1", group_size=group_size)


def _runs(a: Tensor, ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if not start <= end <= a.shape[0]:
            raise ValueError(f"{OP}: ends[{expert}]={end} is not in [{start}, {a.shape[0]}]")
        if end > start:
            yield expert, slice(start, end)
        start = end


def _fake(a: Tensor, w: Tensor, *rest: Any) -> Tensor:
    problem = _check(a, w, *rest)
    return a.new_empty((a.shape[0], problem.n), dtype=problem.out_dtype)


def _run(
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ends: Tensor,
    k: int,
    a_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    operands = launch_experts.Operands(a, w, scales, zeros, ends, a_scale, bias, alpha)
    key = launch_experts.key_of(k, out_dtype, operands) if a.is_cuda else None
    plan = launch_experts.find(key)
    if plan is not None:
        return plan.run(operands)
    p = _check(a, w, scales, zeros, ends, k, a_scale, bias, out_dtype, alpha)
    if key is not None:
        plan = launch_experts.make(key, p, operands)
        if plan is not None:
            return plan.run(operands)
        if (p.w_kind, p.x_kind) == ("e2m1", "fp16") and not batch_invariance.enabled():
            return _of_two_terms(a, w, scales, ends, k, bias, p.out_dtype, alpha)
    if a_scale is not None:
        a_scale = a_scale.reshape(-1, 1).expand(a.shape[0], 1)

    def product(expert: int, rows: slice) -> Tensor:
        factor, shift = (None if t is None else t[expert] for t in (alpha, bias))
        y: Tensor
        if p.w_kind == "e2m1" and not a.is_cuda:
            format_ = "mxf4" if p.group_size == fp4.MXFP4_GROUP else "nvf4"
            how = format_, False, False, factor, torch.float32
            y = torch.ops.intlass.matmul_block_scaled(
                a[rows], w[expert], None, scales[expert], *how
            )
            return (y if shift is None else y + shift.float()).to(p.out_dtype)
        codes, s, z = _weight_of(w, scales, zeros, expert)
        given = None if a_scale is None else a_scale[rows]
        after = None, factor, shift, p.out_dtype
        if codes.dtype == torch.uint8:
            y = torch.ops.intlass.matmul_int4_bf16_tn(a[rows], codes, s, z, k, given, *after)
        elif p.w_kind == "e4m3":
            y = torch.ops.intlass.matmul_fp8_bf16_tn(a[rows], codes, s, *after[1:])
        else:
            y = torch.ops.intlass.matmul_int8_bf16_tn(a[rows], codes, given, s, *after)
        return y

    y = a.new_zeros((a.shape[0], p.n), dtype=p.out_dtype)
    if a.is_cuda and torch.cuda.is_current_stream_capturing():  # nobody may ask the GPU
        why = "how many tokens each expert has cannot be asked while a CUDA graph is captured"
        sizes = a.shape[0], p.n, k, p.group_size
        record(OP, p.scheme, sizes, "all tokens by each expert", why, fallback=True)
        experts = expert_of(a.shape[0], ends)[:, None]
        for expert in range(w.shape[0]):
            y = torch.where(experts == expert, product(expert, slice(None)), y)
        return y
    for expert, rows in _runs(a, ends):
        y[rows] = product(expert, rows)
    return y


def _of_two_terms(
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    ends: Tensor,
    k: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    alpha: Tensor | None,
) -> Tensor:
    """FP4 under fp16: each token is two in bf16, side by side, that add up to it."""
    x = torch.stack(two_terms(a), 1).flatten(0, 1)
    half = None if bias is None else bias.float() / 2
    y = _run(x, w, scales, None, 2 * ends, k, None, half, torch.float32, alpha)
    return y.view(-1, 2, y.shape[1]).sum(1).to(out_dtype)


def _weight_of(
    w: Tensor, scales: Tensor, zeros: Tensor | None, expert: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of one expert; of FP4, as INT8."""
    if scales.dtype == torch.uint8:
        return *fp4.as_int8(w[expert], scales[expert]), None
    return w[expert], scales[expert], None if zeros is None else zeros[expert]


def expert_of(tokens: int, ends: Tensor) -> Tensor:
    """That of each token; of those beyond the last expert's, the number of experts."""
    rows = torch.arange(tokens, device=ends.device)
    return torch.searchsorted(ends.to(rows.dtype), rows, right=True)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, w, scales, zeros, ends, k, a_scale, bias, out_dtype, *more = inputs
    alpha = more[0] if more else None
    gradients.setup(OP, ctx, a, w, scales, zeros, k, a_scale, None, alpha, bias, out_dtype)
    ctx.save_for_backward(w, scales, zeros, ends, alpha)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.refusal is not None:
        raise RuntimeError(ctx.refusal)
    w, scales, zeros, ends, alpha = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_a = torch.ops.intlass.matmul_experts_backward(
            grad, w, scales, zeros, ends, ctx.k, ctx.a_dtype, alpha
        )
    if ctx.bias_dtype is not None:
        # Rows of no expert add to one more, which is cut off.
        sums = grad.new_zeros((w.shape[0] + 1, grad.shape[1]), dtype=torch.float32)
        expert = expert_of(grad.shape[0], ends)
        grad_bias = sums.index_add(0, expert, grad.float())[:-1].to(ctx.bias_dtype)
    return grad_a, None, None, None, None, None, None, grad_bias, None, None


def _input_gradient(
    grad: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ends: Tensor,
    k: int,
    dtype: torch.dtype,
    alpha: Tensor | None = None,
) -> Tensor:
    dx = grad.new_zeros((grad.shape[0], k), dtype=dtype)
    for expert, rows in _runs(grad, ends):
        dense = torch.ops.intlass.dequantize(*_weight_of(w, scales, zeros, expert), k, dtype)
        dx[rows] = grad[rows].to(dtype) @ dense
        if alpha is not None:
            dx[rows] *= alpha[expert].to(dtype)
    return dx


def _input_gradient_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], rest[4]), dtype=rest[5])


_WEIGHTS = "Tensor w, Tensor scales, Tensor? zeros, Tensor ends, SymInt k"
define(
    f"{OP}_backward(Tensor grad, {_WEIGHTS}, ScalarType dtype, Tensor? alpha=None) -> Tensor",
    fake=_input_gradient_fake,
    cpu=_input_gradient,
    cuda=_input_gradient,
    tags=(torch.Tag.cudagraph_unsafe,),
)
define(
    f"{OP}(Tensor a, {_WEIGHTS}, Tensor? a_scale=None, Tensor? bias=None, "
    "ScalarType? out_dtype=None, Tensor? alpha=None) -> Tensor",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    setup_context=_setup,
    backward=_backward,
)


def matmul_experts(
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    ends: Tensor,
    k: int | None = None,
    a_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    alpha: Tensor | None = None,
) -> Tensor:
    """y[t] = alpha[e]·a_scale[t]·(a[t] @ w[e]ᵀ) + bias[e], e the expert of token t: grouped.

    ``a`` [tokens, K], sorted by expert: rows ends[e - 1] to ends[e] - 1 belong to expert e, rows
    from the last of ``ends`` (int32 or int64 [experts]) on to none, and their result is 0. ``w``
    uint8 [experts, N, ceil(K/2)] (INT4, see `pack_int4`) or int8 or float8_e4m3fn [experts, N, K];
    ``scales`` and, of INT4, ``zeros`` [experts, N, groups]; ``bias`` [experts, N]; ``alpha``
    [experts]. Scales in
    uint8 say that the weights are FP4: codes of e2m1, and the bytes of e8m0 for 32 of them (MXFP4)
    or of e4m3 for 16 (NVFP4), under floating-point activations. The rest, dtypes and rounding as in
    the matmul op of such a weight. On a GPU one kernel has the tokens of all
    experts, and CUDA graphs may hold it; float32 activations and `batch_invariant` take one product
    an expert instead, and FP4 takes fp16 as two terms of bf16. Has a gradient for ``a`` and
    ``bias``, which waits for the GPU.

    Raises TypeError or ValueError for what does not fit. A grouped kernel cannot: where ``ends`` do
    not ascend, or exceed the tokens, all that it returns is NaN.

    >>> w = torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.int8)  # two experts, N=1, K=2
    >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> matmul_experts(x, w, torch.ones(2, 1, 1), ends=torch.tensor([1, 3])).tolist()
    [[3.0], [3.0], [4.0]]
    """
    if k is None:
        k = inputs_of(w)
    y: Tensor = torch.ops.intlass.matmul_experts(
        a, w, scales, zeros, ends, k, a_scale, bias, out_dtype, alpha
    )
    return y
