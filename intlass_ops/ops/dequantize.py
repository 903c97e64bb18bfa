"""Op `intlass::dequantize`: the dense weight of packed INT4, INT8, FP8 or a table's codes.

On a GPU one Triton kernel (triton/dequantize.py).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .. import lut4, packing, reference
from . import gradients
from ._library import FLOATS, INTEGERS, define, require_device, require_dtype
from .problem import check_parameters, inputs_of, rows_groups


def _dequantize_check(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    dtype: torch.dtype,
    table: str | None = None,
) -> None:
    if table is not None and table not in lut4.TABLES:
        tables = ", ".join(map(repr, lut4.TABLES))
        raise ValueError(f"dequantize: table={table!r}; expected None or one of {tables}")
    dtypes = (torch.uint8, torch.int8, torch.float8_e4m3fn) if table is None else (torch.uint8,)
    require_dtype("dequantize", "w", w.dtype, dtypes)
    require_device("dequantize", w, scales=scales, zeros=zeros)
    if w.dim() != 2:
        raise ValueError(f"dequantize: w has shape {tuple(w.shape)}; expected two dimensions")
    stored = packing.packed_size(k) if w.dtype == torch.uint8 else k
    if w.shape[1] != stored:
        raise ValueError(f"dequantize: w has {w.shape[1]} columns; K={k} needs {stored}")
    require_dtype("dequantize", "scales", scales.dtype, FLOATS)
    if zeros is not None:
        if table is not None:
            raise ValueError(f"dequantize: zeros belong to INT4 and INT8 weights, w is {table}")
        require_dtype("dequantize", "zeros", zeros.dtype, (*FLOATS, *INTEGERS))
    require_dtype("dequantize", "dtype", dtype, FLOATS)
    check_parameters("dequantize", "scales", scales, w.shape[0], k)
    check_parameters("dequantize", "zeros", zeros, w.shape[0], k)


def _dequantize_fake(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    dtype: torch.dtype,
    table: str | None = None,
) -> Tensor:
    _dequantize_check(w, scales, zeros, k, dtype, table)
    return w.new_empty((w.shape[0], k), dtype=dtype)


def _dequantize(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    dtype: torch.dtype,
    table: str | None = None,
) -> Tensor:
    _dequantize_check(w, scales, zeros, k, dtype, table)
    if table is not None:
        codes = lut4.decode(w, k, table)
    else:
        codes = packing.unpack(w, k, zeros is None) if w.dtype == torch.uint8 else w
    x = codes.contiguous().float()
    if zeros is not None:
        x = x - reference.expand_groups(rows_groups(zeros.float()), *codes.shape)
    return (x * reference.expand_groups(rows_groups(scales.float()), *codes.shape)).to(dtype)


def _dequantize_cuda(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    dtype: torch.dtype,
    table: str | None = None,
) -> Tensor:
    if importlib.util.find_spec("triton") is None:
        return _dequantize(w, scales, zeros, k, dtype, table)
    from ..triton import dequantize as kernels

    _dequantize_check(w, scales, zeros, k, dtype, table)
    z = None if zeros is None else rows_groups(zeros)
    return kernels.dequantize(w, rows_groups(scales), z, k, dtype, table)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, scales, zeros, *_ = inputs
    ctx.refusal = gradients.refusal("dequantize", scales=scales, zeros=zeros)


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(ctx.refusal)


define(
    "dequantize(Tensor w, Tensor scales, Tensor? zeros, SymInt k, ScalarType dtype, "
    "str? table=None) -> Tensor",
    fake=_dequantize_fake,
    cpu=_dequantize,
    cuda=_dequantize_cuda,
    setup_context=_setup,
    backward=_no_gradient,
)


def dequantize(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    k: int | None = None,
    dtype: torch.dtype = torch.float32,
    table: str | None = None,
) -> Tensor:
    """Dense weight [N, K] = (q - zeros) * scales of packed INT4 (uint8), INT8 or FP8 codes.

    Computed in fp32, rounded to ``dtype`` once; arguments as in :func:`matmul_int4_bf16_tn`.
    ``k``: K, needed when it is odd and ``w`` is packed. ``table``: what packed codes index
    instead, "nf4" or another of `intlass_ops.lut4`, whose numbers take the place of q - zeros
    (:func:`matmul_nf4_bf16_tn`). No gradient.
    Raises TypeError or ValueError for dtypes, devices and shapes that do not fit.

    >>> import torch
    >>> dequantize(torch.tensor([[-1, 2]], dtype=torch.int8), torch.tensor([0.5]))
    tensor([[-0.5000,  1.0000]])
    """
    if k is None:
        k = inputs_of(w)
    dense: Tensor = torch.ops.intlass.dequantize(w, scales, zeros, k, dtype, table)
    return dense
