"""What hopper.cu takes beyond the parameters of every GEMM: tensor maps, and sums of the tokens."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config
from . import jit, tensor_map
from .kernel import Launch
from .plans import contiguous_strides, empty

_SUMS_PARAMS = struct.Struct("=7q")
_SUMS_WORDS = 2  # pointers, which come first
_SHARES = struct.Struct("=8i")
_TAIL_BYTES = 2 * tensor_map.NUM_BYTES + 16


def parameters(shares: Sequence[int]) -> bytes:
    """What follows the parameters of every GEMM, with room for a Tail."""
    return _SHARES.pack(*shares) + bytes(_TAIL_BYTES)


class Tail(NamedTuple):
    """The last arguments of one problem's launch, which depend on where its operands lie."""

    rows: tuple[int, int, int]  # of w: rows, bytes of a row, bytes from row to row
    w_box: tuple[int, int]
    tokens: tuple[int, int, int]
    x_box: tuple[int, int]
    sums: Launch | None
    sums_shape: tuple[int, int]
    device: torch.device

    def __call__(
        self, x: Tensor, w: Tensor, stream: int, flag: Tensor | None
    ) -> tuple[bytes, Tensor | None]:
        """The bytes, and a tensor that must live until the launch is enqueued."""
        w_map = tensor_map.of_rows(w.data_ptr(), *self.rows, *self.w_box)
        x_map = tensor_map.of_rows(x.data_ptr(), *self.tokens, *self.x_box)
        if self.sums is None:
            extra = bytes(16) if flag is None else struct.pack("=2q", flag.data_ptr(), 0)
            return w_map + x_map + extra, None
        sums = empty(self.sums_shape, contiguous_strides(self.sums_shape), torch.float32, x.device)
        self.sums((x.data_ptr(), sums.data_ptr()), stream)
        return w_map + x_map + struct.pack("=2q", sums.data_ptr(), self.sums_shape[1]), sums


def tail(c: config.Hopper, x: Tensor, w: Tensor, k: int) -> Tail:
    """For operands of these shapes and strides: x [M, K], w [N, K] or packed."""
    m = x.shape[0]
    sums, shape = None, (0, 0)
    if c.needs_token_sums:
        s = config.TokenSums(c.x_kind, c.block_k // c.groups_per_tile)
        spans = math.ceil(k / c.block_k) * c.groups_per_tile
        shape = spans, math.ceil(m / c.block_m) * c.block_m
        params = _SUMS_PARAMS.pack(0, 0, m, k, x.stride(0) * x.element_size(), shape[0], shape[1])
        grid = math.ceil(shape[1] / s.tokens), math.ceil(spans / s.spans), 1
        kernel = jit.get(s, x.device.index)
        sums = kernel.bind(grid, (s.threads, 1, 1), 0, params, _SUMS_WORDS)
    return Tail(
        rows=_rows(w),
        w_box=(c.w_rows, c.block_k * config.BITS[c.w_kind] // 8),
        tokens=_rows(x),
        x_box=(c.x_rows(m), 128),
        sums=sums,
        sums_shape=shape,
        device=x.device,
    )


def _rows(t: Tensor) -> tuple[int, int, int]:
    """Rows, bytes of a row, bytes from row to row: of a single row whatever TMA takes."""
    row_bytes = t.shape[1] * t.element_size()
    stride = t.stride(0) * t.element_size() if t.shape[0] > 1 else math.ceil(row_bytes / 16) * 16
    return t.shape[0], row_bytes, stride
