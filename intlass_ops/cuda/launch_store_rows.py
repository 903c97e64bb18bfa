"""Rows of a weight, proved and packed in one pass (store_rows.cu)."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import config
from . import jit, toolkit
from .plans import TYPE

_PARAMS = struct.Struct("=11q2d4q")
_NOT_AFFINE = 1
# By parameter, the flags that bfloat16, and that float16, does not hold all of it.
_TOO_WIDE = {"scales": (2, 4), "zeros": (8, 16), "high_scales": (32, 64)}


@dataclass(frozen=True)
class Planes:
    """What a graph makes of rows of a weight [rows, K]: in float64 if all codes were 0, if all were
    1 and at their own; and at their own as it rounds them."""

    at_zero: Tensor
    at_one: Tensor
    at_code: Tensor
    weight: Tensor
    precision: torch.finfo | None  # of the least precise floating type on the way


@dataclass(frozen=True)
class Stored:
    """Where rows of a packed weight go: its codes, and float32 parameters [rows, K / group_size].

    INT4 codes two to a byte, or INT8; signed if there are no zeros. high, high_scales: of 8-bit
    codes with zeros, whose upper bits are stored on their own (lowering/storage.py).
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    high: Tensor | None = None
    high_scales: Tensor | None = None


WEIGHTS = frozenset(TYPE)  # what a graph may round to


@functools.cache
def can_store(device: torch.device) -> bool:
    if device.type != "cuda" or jit.availability().problem is not None:
        return False
    return toolkit.unsupported(device.index) is None


def store_rows(
    planes: Planes, order: Tensor | None, low: int, num_codes: int, into: Stored, flags: Tensor
) -> None:
    """Pack rows whose codes are in [low, low + num_codes), 16 or 256, in groups as ``into`` has.

    order: of the columns, int64 [K]. ``flags``, an int32, gathers over many launches what
    `was_affine` and `narrowest` tell.
    """
    inputs = [
        each.contiguous() for each in (planes.at_zero, planes.at_one, planes.at_code, planes.weight)
    ]
    rows, k = planes.weight.shape
    outputs = (into.weight, into.high, into.scales, into.zeros, into.high_scales, flags)
    pointers = [0 if t is None else t.data_ptr() for t in (*inputs, order, *outputs)]
    kind = planes.precision
    eps, tiny = (0.0, 0.0) if kind is None else (kind.eps, kind.smallest_normal * kind.eps)
    group_size = k // into.scales.shape[1]
    parameters = _PARAMS.pack(*pointers, eps, tiny, k, group_size, low, num_codes)
    device = flags.device.index
    c = config.pick_store_rows(TYPE[planes.weight.dtype])
    stream = torch._C._cuda_getCurrentRawStream(device)
    jit.get(c, device).launch((rows, 1, 1), (c.threads, 1, 1), 0, parameters, stream)


def was_affine(flags: int) -> bool:
    """Whether codes, scales and zeros of all rows reproduce them."""
    return not flags & _NOT_AFFINE


def narrowest(flags: int, name: str) -> torch.dtype:
    """The smallest type that holds every scale, or zero; float32 if none does."""
    bfloat16, float16 = _TOO_WIDE[name]
    if not flags & bfloat16:
        return torch.bfloat16
    return torch.float32 if flags & float16 else torch.float16
