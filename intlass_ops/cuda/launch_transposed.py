"""x @ w on a GPU: from tensors to one launch of transposed.cu or transposed_wgmma.cu.

Not here: which of them, and when it is better to dequantise (config/transposed.py); the argument
checks (ops/mixed_mm.py).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config
from . import jit, tensor_map
from .arrivals import arrival_counters
from .kernel import Launch
from .plans import ALIGNMENT, Key, device_of, empty, remember, signature

_PARAMS = struct.Struct("=19q")
_WORDS = 8  # pointers, which come first
_WGMMA_PARAMS, _WGMMA_WORDS = struct.Struct("=7q"), 2
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
                codes,
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


class WgmmaPlan(NamedTuple):
    """The same by transposed_wgmma.cu."""

    launch: Launch
    name: str
    w_rows: tuple[int, int, int]  # rows, bytes of a row, bytes from row to row
    w_box: tuple[int, int]
    x_rows: tuple[int, int, int]
    x_box: tuple[int, int]
    groups: tuple[int, int]  # of all columns, and of a block's

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
        alpha = None if alpha is None else alpha.float()
        codes, n = w.data_ptr(), w.shape[0]
        s = _of_columns(scales, n, self.groups[0])
        z = s if zeros is None else _of_columns(zeros.to(x.dtype), n, self.groups[0])
        maps = (
            tensor_map.of_rows(codes, *self.w_rows, *self.w_box),
            tensor_map.of_rows(x.data_ptr(), *self.x_rows, *self.x_box),
            *(
                tensor_map.of_rows(
                    t.data_ptr(), self.groups[0], 2 * n, 2 * t.stride(0), self.groups[1], 256
                )
                for t in (s, z)
            ),
        )
        self.launch(
            (0 if alpha is None else alpha.data_ptr(), y.data_ptr()),
            torch._C._cuda_getCurrentRawStream(x.device.index),
            b"".join(maps),
            codes,
        )
        return y


def _of_columns(t: Tensor, n: int, groups: int) -> Tensor:
    """Parameters [1 or n, 1 or groups] as [groups, n], from where TMA may read rows of them."""
    t = t.t().expand(groups, n)
    t = t[0][None] if groups == 1 else t  # with the stride of a row, which PyTorch leaves open
    if _starts_at(t, ALIGNMENT) and t.stride(0) >= n:
        return t
    return t.clone(memory_format=torch.contiguous_format)


_plans: dict[Key, TransposedPlan | WgmmaPlan | str] = {}


def plan_of(
    x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, k: int
) -> TransposedPlan | WgmmaPlan | str:
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
) -> TransposedPlan | WgmmaPlan | str:
    m, n = x.shape
    kind = _KIND.get(x.dtype)
    if kind is None:
        return "float32 has no tensor-core kernel"
    same_types = scales.dtype == x.dtype and (
        zeros is None or zeros.dtype == x.dtype or zeros.dtype in _BYTES
    )
    aligned = _starts_at(x, ALIGNMENT) and _starts_at(w, 4)
    gpu = device_of(x.device.index)
    groups = max(scales.shape[1], 1 if zeros is None else zeros.shape[1])
    if same_types and _by_wgmma_fits(gpu, x, w, k, groups):
        return _by_wgmma(gpu, x, w, kind, zeros is not None, k, groups)
    why = config.why_not_transposed(m, n, k, same_types, aligned)
    if why is not None:
        return why
    z = None if zeros is None else zeros.to(x.dtype)
    vectors = all(t is None or _in_vectors(t) for t in (scales, z))
    c = config.pick_transposed(gpu, kind, zeros is not None, vectors, m, n, k)
    grid = c.grid(m, n, k, gpu.sm_count)
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
    tiles = grid[0] * grid[1] if grid[2] > c.cluster else 0
    return TransposedPlan(
        launch=kernel.bind(grid, (c.threads, 1, 1), c.smem_bytes, parameters, _WORDS),
        name=str(c),
        tiles=tiles,
        workspace=tiles * grid[2] * c.values_per_block,
    )


def _by_wgmma_fits(gpu: config.Device, x: Tensor, w: Tensor, k: int, groups: int) -> bool:
    m, n = x.shape
    aligned = _starts_at(x, ALIGNMENT) and _starts_at(w, ALIGNMENT)
    aligned = aligned and x.stride(0) >= n and w.stride(0) >= k // 2  # TMA takes no others
    return config.why_not_transposed_wgmma(gpu, m, n, k, k // groups, aligned) is None


def _by_wgmma(
    gpu: config.Device, x: Tensor, w: Tensor, kind: str, has_zeros: bool, k: int, groups: int
) -> WgmmaPlan:
    m, n = x.shape
    c = config.pick_transposed_wgmma(gpu, kind, has_zeros, m, n, k, k // groups)
    parameters = _WGMMA_PARAMS.pack(0, 0, m, n, k, k // groups, _FLOAT32)
    parameters += bytes(4 * tensor_map.NUM_BYTES)
    kernel = jit.get(c, x.device.index)
    threads = c.threads, 1, 1
    return WgmmaPlan(
        launch=kernel.bind(c.grid(m, k), threads, c.smem_bytes, parameters, _WGMMA_WORDS),
        name=str(c),
        w_rows=(n, k // 2, w.stride(0)),
        w_box=(128, 64),
        x_rows=(m, 2 * n, 2 * x.stride(0)),
        x_box=(c.block_m, 128),
        groups=(groups, c.groups),
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
