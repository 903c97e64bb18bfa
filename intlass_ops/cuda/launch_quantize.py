"""Quantisation on a GPU: from a tensor to one launch of quantize.cu.

Not here: which configuration (config.py), the argument checks (ops/quantize.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config, reference
from . import jit
from .kernel import Launch
from .plans import ALIGNMENT, TYPE, Key, contiguous_strides, empty, remember

_PARAMS = struct.Struct("=7q")
_WORDS = 5  # pointers and the seed


class QuantizePlan(NamedTuple):
    """The quantisation of one signature."""

    launch: Launch | None  # None: nothing to compute
    copies: Callable[[Tensor], Tensor] | None  # x, made contiguous
    codes: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype
    scale_shape: tuple[int, ...]
    scale_strides: tuple[int, ...]
    symmetric: bool
    device: torch.device

    def run(self, x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scale, zero); zero is an empty tensor where the quantiser is symmetric."""
        q = empty(*self.codes, self.device)
        scale = empty(self.scale_shape, self.scale_strides, torch.float32, self.device)
        zero = (
            empty((0,), (1,), torch.int32, self.device)
            if self.symmetric
            else empty(self.scale_shape, self.scale_strides, torch.int32, self.device)
        )
        if self.launch is not None:
            rows = x if self.copies is None else self.copies(x)
            self.launch(
                (
                    rows.data_ptr(),
                    q.data_ptr(),
                    scale.data_ptr(),
                    zero.data_ptr(),
                    0 if seed is None else _signed(reference.seed_key(seed)),
                ),
                torch._C._cuda_getCurrentRawStream(self.device.index),
            )
        return q, scale, zero


_plans: dict[Key, QuantizePlan] = {}


def find(key: Key) -> QuantizePlan | None:
    """The plan of a signature that was met before."""
    return _plans.get(key)


def make(
    key: Key,
    x: Tensor,
    segments: int,
    length: int,
    codes_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    bits: int,
    symmetric: bool,
    stochastic: bool,
) -> QuantizePlan:
    """The plan for segments [S, L] of x that have one scale each, remembered by ``key``.

    For INT4, L is even unless a segment is a row of the tensor.
    """
    copied = x.contiguous()
    launch = None
    if segments:
        vector = 8 if length % 8 == 0 and copied.data_ptr() % ALIGNMENT == 0 else 2
        c = config.pick_quantize(TYPE[x.dtype], bits, symmetric, stochastic, vector, max(length, 1))
        parameters = _PARAMS.pack(*[0] * _WORDS, segments, length)
        grid = math.ceil(segments / (c.threads // c.threads_per_segment)), 1, 1
        kernel = jit.get(c, x.device.index)
        launch = kernel.bind(grid, (c.threads, 1, 1), 0, parameters, _WORDS)
    plan = QuantizePlan(
        launch=launch,
        copies=None if copied is x else Tensor.contiguous,
        codes=(
            codes_shape,
            contiguous_strides(codes_shape),
            torch.uint8 if bits == 4 else torch.int8,
        ),
        scale_shape=scale_shape,
        scale_strides=contiguous_strides(scale_shape),
        symmetric=symmetric,
        device=x.device,
    )
    return remember(_plans, key, plan)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
