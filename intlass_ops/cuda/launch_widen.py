"""INT4 activations as INT8 (widen.cu), for GPUs whose tensor cores take no INT4."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from .. import config
from . import jit
from .kernel import Launch
from .plans import ALIGNMENT, Key, aligned, device_of, empty, remember

_PARAMS = struct.Struct("=5q")
_WORDS = 2  # pointers, which come first
_plans: dict[Key, Launch] = {}


def widen(x: Tensor, x_kind: str, k: int, lane_order: bool) -> Tensor:
    """Codes [M, K] of packed rows [M, ceil(K/2)] with unit stride along K; rows are aligned.

    ``lane_order``: the even ones of each 32 k first, see `config.in_lane_order`.
    """
    m, row_bytes = x.shape
    row = math.ceil(2 * row_bytes / ALIGNMENT) * ALIGNMENT
    codes = empty((m, row), (row, 1), torch.int8, x.device)
    if not row_bytes:
        return codes
    by_vectors = aligned(x) and row_bytes % ALIGNMENT == 0
    key = x_kind, lane_order, by_vectors, m, row_bytes, x.stride(0), row, x.device.index
    launch = _plans.get(key) or remember(_plans, key, _make(*key))
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    launch((x.data_ptr(), codes.data_ptr()), stream)
    return codes[:, :k]


def _make(
    x_kind: str,
    lane_order: bool,
    by_vectors: bool,
    m: int,
    row_bytes: int,
    stride: int,
    row: int,
    device_index: int,
) -> Launch:
    device = device_of(device_index)
    c = config.pick_widen(device, x_kind, by_vectors, m, row_bytes, lane_order)
    grid = c.grid(m, row_bytes)
    parameters = _PARAMS.pack(0, 0, row_bytes // c.vector, stride, row)
    return jit.get(c, device_index).bind(grid, (c.threads, 1, 1), 0, parameters, _WORDS)
