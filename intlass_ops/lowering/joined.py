"""The op `intlass::matmul_siblings`: linears of one input, as one GEMM if their weights lie so.

Lives here: the choice when the op runs, on the weights it is given: one GEMM over those that lie
side by side, one each for others. Not here: which linears of a graph these are
(siblings.py), how weights come to lie side by side (side_by_side.py), the GEMMs (ops/matmul.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..ops import matmul, matmul_kernels
from ..ops._library import implement
from ..ops.problem import INT4, INT8
from ..side_by_side import as_one
from .runtime import LIBRARY

# Codes, scales, zero points and biases of the linears; what they have none of is empty.
Lists = Sequence[Sequence[Tensor]]


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
    run = matmul_kernels.run
    tensors = weights, scales, zeros, biases
    key = tuple(map(id, chain(*tensors)))
    known = _SIDE_BY_SIDE.get(key)
    if known is not None and known.still(tensors):
        return _multiply(run, x, known.operands, k, a_scale, a_zero, out_dtype)
    order = _runs(weights)
    if order == [list(range(len(weights)))]:
        operands = [as_one(t) if t else None for t in tensors]
        if all(one is not None or not t for one, t in zip(operands, tensors, strict=True)):
            _SIDE_BY_SIDE[key] = _SideBySide(tensors, operands)
            if known is None:
                weakref.finalize(weights[0], _SIDE_BY_SIDE.pop, key, None)
    return _in_runs(run, x, tensors, order, k, a_scale, a_zero, out_dtype)


class _SideBySide:
    """Lists of tensors that lie as one each, remembered while they do: looking costs the host more
    than the GEMM."""

    def __init__(self, tensors: Lists, operands: Sequence[Tensor | None]) -> None:
        self.parts = [(weakref.ref(t), t.data_ptr()) for t in chain(*tensors)]
        self.operands = operands

    def still(self, tensors: Lists) -> bool:
        for (ref, pointer), t in zip(self.parts, chain(*tensors), strict=True):
            if ref() is not t or t.data_ptr() != pointer:
                return False
        return True


_SIDE_BY_SIDE: dict[tuple[int, ...], _SideBySide] = {}


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
    tensors = weights, scales, zeros, biases
    return _in_runs(matmul.dispatch, x, tensors, alone, k, a_scale, a_zero, out_dtype)


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
    run: Callable[..., Tensor],
    x: Tensor,
    tensors: Lists,
    order: Sequence[Sequence[int]],
    *after: Any,
) -> Tensor:
    parts: dict[int, Tensor] = {}
    y = x
    for some in order:
        operands = [_joined([t[i] for i in some]) if t else None for t in tensors]
        y = _multiply(run, x, operands, *after)
        parts |= zip(some, y.split([tensors[0][i].shape[0] for i in some], dim=-1), strict=True)
    count = len(tensors[0])
    if list(order) == [list(range(count))]:
        return y
    return torch.cat([parts[i] for i in range(count)], dim=-1)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    one = as_one(tensors)
    return torch.cat(list(tensors)) if one is None else one


def _multiply(
    run: Callable[..., Tensor],
    x: Tensor,
    operands: Sequence[Tensor | None],
    k: int | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    weight, scales, zeros, bias = operands
    assert weight is not None
    after = a_scale, a_zero, None, bias, dtype, None, None
    if weight.dtype == torch.int8:
        return run(INT8, x, weight, scales, None, None, *after)
    return run(INT4, x, weight, scales, zeros, k, *after)


LIBRARY.define(
    "matmul_siblings(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] zeros, "
    "Tensor[] biases, SymInt? k=None, Tensor? a_scale=None, Tensor? a_zero=None, "
    "ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.register_fake("intlass::matmul_siblings", _siblings_fake, lib=LIBRARY)
implement(LIBRARY, "matmul_siblings", cpu=_siblings, cuda=_siblings)
OP: Any = torch.ops.intlass.matmul_siblings.default
