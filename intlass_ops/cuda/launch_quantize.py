"""Quantisation on a GPU: from a tensor to one launch of quantize.cu.

Not here: which configuration (config/), the argument checks (ops/quantize.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config, packing, reference
from . import jit
from .early_launch import quantised
from .kernel import Launch
from .plans import ALIGNMENT, TYPE, Key, contiguous_strides, device_of, empty, remember

_PARAMS = struct.Struct("=10qd")
_WORDS = 6  # pointers and the seed


class QuantizePlan(NamedTuple):
    """The quantisation of one signature."""

    launch: Launch | None  # None: nothing to compute
    copies: Callable[[Tensor], Tensor] | None  # x, and what it is combined with, made contiguous
    codes: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
    scale_shape: tuple[int, ...]
    scale_strides: tuple[int, ...]
    symmetric: bool
    device: torch.device
    to_lanes: bool = False  # by PyTorch, what the kernel writes as bytes

    def run(
        self, x: Tensor, seed: int | None = None, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scale, zero); zero is an empty tensor where the quantiser is symmetric."""
        q = empty(*self.codes, self.device)
        scale = empty(self.scale_shape, self.scale_strides, torch.float32, self.device)
        zero = (
            empty((0,), (1,), torch.int32, self.device)
            if self.symmetric
            else empty(self.scale_shape, self.scale_strides, torch.int32, self.device)
        )
        if self.launch is not None:
            if self.copies is not None:
                x, other = self.copies(x), None if other is None else self.copies(other)
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            self.launch(
                (
                    x.data_ptr(),
                    0 if other is None else other.data_ptr(),
                    q.data_ptr(),
                    scale.data_ptr(),
                    zero.data_ptr(),
                    0 if seed is None else _signed(reference.seed_key(seed)),
                ),
                stream,
            )
            quantised(self.device.index, stream, q)
        return packing.to_lanes(q) if self.to_lanes else q, scale, zero


_plans: dict[Key, QuantizePlan] = {}


def find(key: Key) -> QuantizePlan | None:
    """The plan of a signature that was met before."""
    return _plans.get(key)


def make(
    key: Key,
    x: Tensor,
    segments: int,
    length: int,
    codes: tuple[tuple[int, ...], torch.dtype],
    scale_shape: tuple[int, ...],
    bits: int,
    symmetric: bool,
    stochastic: bool = False,
    before: config.Before = config.Before.NONE,
    other: Tensor | None = None,
    eps: float = 0.0,
    full_range: bool = False,
    lanes: bool = False,
) -> QuantizePlan:
    """The plan for segments [S, L] of x that have one scale each, remembered by ``key``.

    For INT4, L is even unless a segment is a row of the tensor. ``codes``: their shape and dtype.
    ``other``: the weight of an RMS norm, or the factor of silu(x).
    """
    strides = [_row_stride(t, length) for t in (x, other) if t is not None]
    copies = None in strides
    x_stride, other_stride = (length, length) if copies else (*strides, 0)[:2]
    launch, to_lanes = None, False
    if segments:
        device = device_of(x.device.index)
        c = config.pick_quantize(
            device,
            TYPE[x.dtype],
            bits,
            symmetric,
            stochastic,
            8 if all(_aligned(t, length, copies) for t in (x, other)) else 2,
            segments,
            max(length, 1),
            before,
            full_range,
            lanes,
        )
        to_lanes = lanes and not c.lanes
        parameters = _PARAMS.pack(*[0] * _WORDS, segments, length, x_stride, other_stride, eps)
        blocks = math.ceil(segments / (c.threads // c.threads_per_segment))
        if c.ahead:  # they stay
            blocks = min(blocks, c.blocks_per_sm * device.sm_count)
        grid = blocks * c.cluster, 1, 1
        kernel = jit.get(c, x.device.index)
        launch = kernel.bind(grid, (c.threads, 1, 1), c.smem_bytes, parameters, _WORDS)
    shape, dtype = codes
    if to_lanes:
        shape, dtype = (*shape[:-1], shape[-1] * 4), torch.int8
    plan = QuantizePlan(
        launch=launch,
        copies=Tensor.contiguous if copies else None,
        codes=(shape, contiguous_strides(shape), dtype),
        scale_shape=scale_shape,
        scale_strides=contiguous_strides(scale_shape),
        symmetric=symmetric,
        device=x.device,
        to_lanes=to_lanes,
    )
    return remember(_plans, key, plan)


def _row_stride(t: Tensor, length: int) -> int | None:
    """Elements from one row [..., L] to the next; None where rows do not lie at equal distances."""
    if t.is_contiguous():
        return length
    if t.dim() < 2 or t.shape[-1] != length or t.stride(-1) != 1:
        return None
    rows = t.flatten(0, -2) if t.dim() == 2 or _is_flat(t) else None
    return None if rows is None else rows.stride(0)


def _is_flat(t: Tensor) -> bool:
    """Whether all dimensions but the last are one, as far as strides go."""
    return all(t.stride(i) == t.stride(i + 1) * t.shape[i + 1] for i in range(t.dim() - 2))


def _aligned(t: Tensor | None, length: int, copied: bool) -> bool:
    """Rows of whole vectors that start on 16-byte boundaries."""
    if t is None:
        return True
    if length % 8:
        return False
    if copied and not t.is_contiguous():
        return True
    step = (_row_stride(t, length) or 0) * t.element_size()
    return t.data_ptr() % ALIGNMENT == 0 and step % ALIGNMENT == 0


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
