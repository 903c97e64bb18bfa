"""What one GEMM call is: `check` reads it off the arguments of a matmul op, or refuses them.

The fake, CPU and CUDA kernels all ask here, so all raise the same messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import lut4, packing, reference
from ._library import FLOATS, INTEGERS, require_device, require_dtype, type_name

INT4 = "matmul_int4_bf16_tn"
INT8 = "matmul_int8_bf16_tn"
FP8 = "matmul_fp8_bf16_tn"
LUT4 = {table: f"matmul_{table}_bf16_tn" for table in lut4.TABLES}
# |int8 * int8| <= 2^14, so an int32 sum of fewer than 2^17 products cannot overflow.
MAX_INT_K = 1 << 17
GROUP_STEP = 16


@dataclass(frozen=True)
class Problem:
    """A checked GEMM: kinds of both operands, sizes, group size (K when per channel)."""

    op: str
    x_kind: str  # "fp32", "bf16", "fp16", "s8", "s4", "u4"
    w_kind: str  # "s4", "u4", "s8", "e4m3", a table of lut4.py; of experts, "e2m1"
    n: int
    k: int
    group_size: int
    out_dtype: torch.dtype
    activation: str | None = None  # a name of reference.ACTIVATIONS

    @property
    def scheme(self) -> str:
        """Weight and activation bits, as in w4a16; FP8 weights are fp8a16, NF4 ones nf4a16."""
        weight = _SCHEME_OF.get(self.w_kind, "w4")
        return f"{weight}a{_X_BITS.get(self.x_kind, 16)}"


_X_KIND = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "s8",
    torch.int32: "s8",  # as lanes, packing.py
}
_X_BITS = {"s8": 8, "s4": 4, "u4": 4}
_SCHEME_OF = {"s8": "w8", "e4m3": "fp8"} | {table: table for table in LUT4}
_PER_COLUMN = {torch.uint8: 2, torch.int32: 4}  # codes, of `a`
_FLOATING = (torch.bfloat16, torch.float16, torch.float32)
# By op: the dtype of weights, what they are without zero points, and dtypes of integer activations.
_CODES = {INT4: torch.uint8, INT8: torch.int8, FP8: torch.float8_e4m3fn}
_CODES |= dict.fromkeys(LUT4.values(), torch.uint8)
_W_KIND = {INT4: "s4", INT8: "s8", FP8: "e4m3"} | {op: table for table, op in LUT4.items()}
_INTEGERS = {INT4: (torch.int8, torch.uint8, torch.int32), INT8: (torch.int8,)}


def table_of(op: str) -> str | None:
    """What codes of this op's weights index, one of lut4.TABLES; None of other ops."""
    kind = _W_KIND[op]
    return kind if kind in LUT4 else None


def check_parameters(op: str, name: str, t: Tensor | None, n: Any, k: Any) -> Any:
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


def check(
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
    activation: str | None = None,
    residual: Tensor | None = None,
    called: str | None = None,
) -> Problem:
    """The problem of one call; raises TypeError or ValueError naming what does not fit.

    ``called``: the op that messages name, where it is another, with a weight of the name "w".
    """
    packed = _CODES[op] == torch.uint8
    w_name, s_name = ("packed_w", "scales") if packed else ("b", "b_scale")
    gemm = op
    if called is not None:
        op, w_name, s_name = called, "w", "scales"
    require_dtype(op, "a", a.dtype, (*_FLOATING, *_INTEGERS.get(gemm, ())))
    require_dtype(op, w_name, w.dtype, (_CODES[gemm],))
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
        residual=residual,
    )
    if a.dim() == 0:
        raise ValueError(f"{op}: a is a scalar; expected [..., K]")
    if w.dim() != 2:
        raise ValueError(f"{op}: {w_name} has shape {tuple(w.shape)}; expected two dimensions")
    packed_a, lanes = a.dtype == torch.uint8, a.dtype == torch.int32
    n = w.shape[0]
    if k is None:
        k = _PER_COLUMN.get(a.dtype, 1) * a.shape[-1]
    if k < 0:
        raise ValueError(f"{op}: k={k} is negative")
    if lanes and k % 32:
        raise ValueError(f"{op}: K={k} is not a multiple of 32, as lanes need")
    a_k = packing.packed_size(k) if packed_a else k // _PER_COLUMN.get(a.dtype, 1)
    if a.shape[-1] != a_k:
        raise ValueError(f"{op}: a has {a.shape[-1]} columns; K={k} needs {a_k}")
    w_k = packing.packed_size(k) if packed else k
    if w.shape[1] != w_k:
        unit = "bytes" if packed else "columns"
        raise ValueError(f"{op}: {w_name} has {w.shape[1]} {unit} a row; K={k} needs {w_k}")
    groups = check_parameters(op, s_name, scales, n, k)
    zero_groups = check_parameters(op, "zeros", zeros, n, k)
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
    check_epilogue(op, activation, residual, (*lead, n), out_dtype)
    return Problem(
        op=gemm,
        x_kind=("s4" if a_zero is None else "u4") if packed_a else _X_KIND[a.dtype],
        w_kind=_W_KIND[gemm] if zeros is None else "u4",
        n=n,
        k=k,
        group_size=k // groups,
        out_dtype=out_dtype,
        activation=activation,
    )


def check_epilogue(
    op: str,
    activation: str | None,
    residual: Tensor | None,
    shape: tuple[Any, ...],
    out_dtype: torch.dtype,
) -> None:
    if activation is not None and activation not in reference.ACTIVATIONS:
        names = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"{op}: activation={activation!r}; expected None or one of {names}")
    if residual is None:
        return
    if residual.dtype != out_dtype:
        raise TypeError(
            f"{op}: residual has dtype {type_name(residual.dtype)}, "
            f"the output {type_name(out_dtype)}; they must be the same"
        )
    if tuple(residual.shape) != shape:
        raise ValueError(
            f"{op}: residual has shape {tuple(residual.shape)}; expected the output's, {shape}"
        )


def inputs_of(w: Tensor) -> int:
    """K of a weight [..., K] that no one names: twice the bytes of packed INT4 or table codes."""
    stored = w.shape[-1] if w.dim() else 0
    return 2 * stored if w.dtype == torch.uint8 else stored


def rows_groups(t: Tensor) -> Tensor:
    """View scales or zeros as [1 or N, 1 or G]."""
    if t.numel() == 1:
        return t.reshape(1, 1)
    return t if t.dim() == 2 else t.unsqueeze(1)
