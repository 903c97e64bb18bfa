"""The op `intlass::matmul_siblings`: linears of one input, as one GEMM if their weights lie so.

Lives here: the choice when the op runs, on the weights it is given: one GEMM over those that lie
side by side, one each for others. Not here: which linears of a graph these are
(siblings.py), how weights come to lie side by side (side_by_side.py), the GEMMs (ops/matmul.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..side_by_side import as_one
from .runtime import LIBRARY


def _siblings(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    biases: list[Tensor],
    k: int | None = None,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    tensors = (weights, scales, zeros, biases)
    return _in_runs(x, tensors, _runs(weights), k, a_scale, a_zero, out_dtype)


def _siblings_fake(
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    biases: list[Tensor],
    k: int | None = None,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    alone = [[i] for i in range(len(weights))]
    tensors = (weights, scales, zeros, biases)
    return _in_runs(x, tensors, alone, k, a_scale, a_zero, out_dtype)


def _runs(weights: Sequence[Tensor]) -> list[list[int]]:
    """Which weights follow one another in memory."""
    runs: list[list[int]] = []
    for i in sorted(range(len(weights)), key=lambda i: weights[i].data_ptr()):
        if runs and as_one([weights[j] for j in (*runs[-1], i)]) is not None:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _in_runs(
    x: Tensor,
    tensors: Sequence[Sequence[Tensor]],
    runs: Sequence[Sequence[int]],
    k: int | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    parts: dict[int, Tensor] = {}
    y = x
    for run in runs:
        weight, scale, zero, bias = (_joined([t[i] for i in run]) if t else None for t in tensors)
        assert weight is not None
        y = _multiply(x, weight, scale, zero, k, a_scale, a_zero, bias, out_dtype)
        parts |= zip(run, y.split([tensors[0][i].shape[0] for i in run], dim=-1), strict=True)
    count = len(tensors[0])
    if list(runs) == [list(range(count))]:
        return y
    return torch.cat([parts[i] for i in range(count)], dim=-1)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    one = as_one(tensors)
    return torch.cat(list(tensors)) if one is None else one


def _multiply(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    k: int | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    ops: Any = torch.ops.intlass
    y: Tensor
    if weight.dtype == torch.int8:
        y = ops.matmul_int8_bf16_tn(x, weight, a_scale, scales, a_zero, None, bias, dtype)
    else:
        y = ops.matmul_int4_bf16_tn(x, weight, scales, zeros, k, a_scale, a_zero, None, bias, dtype)
    return y


LIBRARY.define(
    "matmul_siblings(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] zeros, "
    "Tensor[] biases, SymInt? k=None, Tensor? a_scale=None, Tensor? a_zero=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.register_fake("intlass::matmul_siblings", _siblings_fake, lib=LIBRARY)
LIBRARY.impl("matmul_siblings", _siblings, "CPU")
LIBRARY.impl("matmul_siblings", _siblings, "CUDA")
OP: Any = torch.ops.intlass.matmul_siblings.default
