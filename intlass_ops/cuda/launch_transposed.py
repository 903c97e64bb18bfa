"""x @ w for few tokens on a GPU: from tensors to one launch of transposed.cu.

Not here: when it is better to dequantise (config/transposed.py), the argument checks
(ops/mixed_mm.py).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config
from . import jit
from .arrivals import arrival_counters
from .kernel import Launch
from .plans import ALIGNMENT, Key, device_of, empty, remember, signature

_PARAMS = struct.Struct("=19q")
_WORDS = 8  # pointers, which come first
_FLOAT32 = 1  # of enum Dtype, memory.cuh: what `run` makes of alpha
_KIND = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_BYTES = (torch.uint8, torch.int8)  # types of zeros that x's type holds exactly


class TransposedPlan(NamedTuple):
    """x @ w of one signature."""

    launch: Launch
    name: str
    tiles: int  # arrival counters, where stripes of N share a tile
    workspace: int  # and floats

    def run(
        self,
        x: Tensor,
        w: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        k: int,
        alpha: Tensor | None,
    ) -> Tensor:
        """y [M, k] in the dtype of x."""
        y = empty((x.shape[0], k), (k, 1), x.dtype, x.device)
        if zeros is not None:
            zeros = zeros.to(x.dtype)
        alpha = None if alpha is None else alpha.float()
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        workspace = arrivals = 0
        if self.tiles:
            partial = empty((self.workspace,), (1,), torch.float32, x.device)
            workspace = partial.data_ptr()
            arrivals, _counters = arrival_counters(x, stream, self.tiles)
        codes = w.data_ptr()
        self.launch(
            (
                x.data_ptr(),
                w.data_ptr(),
                scales.data_ptr(),
                0 if zeros is None else zeros.data_ptr(),
                0 if alpha is None else alpha.data_ptr(),
                y.data_ptr(),
                workspace,
                arrivals,
            ),
            stream,
            codes=codes,
        )
        return y


_plans: dict[Key, TransposedPlan | str] = {}


def plan_of(
    x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, k: int
) -> TransposedPlan | str:
    """For x [M, N], packed w [N, ...], scales and zeros [1 or N, 1 or k/group_size].

    A string says why this kernel is not for them.
    """
    pointers = tuple(0 if t is None else t.data_ptr() % ALIGNMENT for t in (x, w, scales, zeros))
    key = signature(x), signature(w), signature(scales), signature(zeros), k, pointers
    plan = _plans.get(key)
    if plan is None:
        plan = remember(_plans, key, _make(x, w, scales, zeros, k))
    return plan


def _make(
    x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, k: int
) -> TransposedPlan | str:
    m, n = x.shape
    kind = _KIND.get(x.dtype)
    if kind is None:
        return "float32 has no tensor-core kernel"
    same_types = scales.dtype == x.dtype and (
        zeros is None or zeros.dtype == x.dtype or zeros.dtype in _BYTES
    )
    aligned = _starts_at(x, ALIGNMENT) and _starts_at(w, 4)
    why = config.why_not_transposed(m, n, k, same_types, aligned)
    if why is not None:
        return why
    gpu = device_of(x.device.index)
    z = None if zeros is None else zeros.to(x.dtype)
    vectors = all(t is None or _in_vectors(t) for t in (scales, z))
    c = config.pick_transposed(kind, zeros is not None, vectors, m)
    grid = c.grid(m, n, k, gpu.sm_count)
    groups = max(scales.shape[1], 1 if zeros is None else zeros.shape[1])
    parameters = _PARAMS.pack(
        *[0] * _WORDS,
        m,
        n,
        k,
        2 * x.stride(0),
        w.stride(0),
        k // groups,
        *_strides(scales),
        *_strides(z),
        _FLOAT32,
    )
    kernel = jit.get(c, x.device.index)
    tiles = grid[0] * grid[1] if grid[2] > 1 else 0
    return TransposedPlan(
        launch=kernel.bind(grid, (c.threads, 1, 1), c.smem_bytes, parameters, _WORDS),
        name=str(c),
        tiles=tiles,
        workspace=tiles * grid[2] * c.values_per_block,
    )


def _starts_at(t: Tensor, step: int) -> bool:
    """Whether every row starts at a multiple of ``step`` bytes."""
    row = t.stride(0) * t.element_size()
    return t.stride(1) == 1 and row % step == 0 and t.data_ptr() % step == 0


def _in_vectors(t: Tensor) -> bool:
    """Whether the parameters of eight rows can be loaded at once."""
    group = _strides(t)[1] * t.element_size()
    return _strides(t)[0] == 1 and group % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0


def _strides(t: Tensor | None) -> tuple[int, int]:
    """Of rows and groups; 0 to broadcast."""
    if t is None:
        return 0, 0
    return (t.stride(0) if t.shape[0] > 1 else 0), (t.stride(1) if t.shape[1] > 1 else 0)
