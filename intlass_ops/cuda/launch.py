"""From tensors to a kernel launch: grid, workspace, parameters of each kernel family.

Not here: which configuration (config.py), how it is compiled and launched (jit.py), the argument
checks (ops/).
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import config, reference
from ..explain import listening, record
from ..packing import packed_size
from . import jit

if TYPE_CHECKING:
    from ..ops.matmul import Problem

_TYPE = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
_ZERO_TYPE = {**_TYPE, torch.int32: "int", torch.int8: "signed char", torch.uint8: "unsigned char"}
# enum Dtype of memory.cuh
_DTYPE_CODE = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int8: 5,
    torch.uint8: 6,
}
_GEMM_PARAMS = struct.Struct("=27q")
_QUANTIZE_PARAMS = struct.Struct("=6qQ")
_ALIGNMENT = 16


def matmul(
    p: Problem,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Run one GEMM; scales and zeros are [1 or N, 1 or G]."""
    out = a.new_empty((*a.shape[:-1], p.n), dtype=p.out_dtype)
    if out.numel() == 0:
        return out
    x = _rows(a)
    w = w if w.stride(1) == 1 or w.shape[1] == 1 else w.contiguous()
    m = x.shape[0]
    if zeros is not None and zeros.dtype not in _ZERO_TYPE:
        zeros = zeros.float()
    shape = config.Shape(
        x_kind=p.x_kind,
        w_kind=p.w_kind,
        scale_type=_TYPE[scales.dtype],
        zero_type="float" if zeros is None else _ZERO_TYPE[zeros.dtype],
        out_type=_TYPE[p.out_dtype],
        has_zeros=zeros is not None,
        has_a_zero=a_zero is not None,
        aligned=_aligned(x) and _aligned(w),
        m=m,
        n=p.n,
        k=p.k,
        group_size=p.group_size,
    )
    c = config.pick(_device(a.device.index), shape)
    grid = c.grid(m, p.n)
    workspace = None
    arrivals, arrivals_tensor = 0, None
    stream = torch.cuda.current_stream(a.device).cuda_stream
    if isinstance(c, config.Gemm) and c.split_k > 1:
        workspace = a.new_empty(grid[0] * c.split_k * c.values_per_block, dtype=torch.float32)
        arrivals, arrivals_tensor = _arrival_counters(a, stream, grid[0])
    if a_scale is not None:
        a_scale = a_scale.reshape(-1)
    if a_zero is not None:
        a_zero = (a_zero if a_zero.dtype in _DTYPE_CODE else a_zero.float()).reshape(-1)
    if bias is not None:
        bias = bias.contiguous()
    parameters = _GEMM_PARAMS.pack(
        *(_pointer(t) for t in (x, w, scales, zeros, a_scale, a_zero, alpha, bias, out)),
        _pointer(workspace),
        arrivals,
        m,
        p.n,
        p.k,
        x.stride(0) * x.element_size(),
        w.stride(0) * w.element_size(),
        p.group_size,
        *_broadcast_strides(scales),
        *((0, 0) if zeros is None else _broadcast_strides(zeros)),
        0 if a_scale is None or a_scale.numel() == 1 else a_scale.stride(0),
        0 if a_zero is None or a_zero.numel() == 1 else a_zero.stride(0),
        *(_dtype_code(t) for t in (bias, alpha, a_scale, a_zero)),
    )
    kernel = jit.get(c, a.device.index)
    kernel.launch(grid, (c.threads, 1, 1), c.smem_bytes, parameters, stream)
    del arrivals_tensor  # kept until the launch is enqueued
    if listening():
        why = config.why_not_skinny(shape) or f"M={m} is bound by reading W once"
        record(p.op, p.scheme, (m, p.n, p.k, p.group_size), str(c), why)
    return out


def quantize(
    x: Tensor, bits: int, symmetric: bool, seed: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise contiguous segments [S, L] (L even unless S is the tensor's rows, for INT4).

    Returns flat codes, scale [S] and zero [S] or None.
    """
    segments, length = x.shape
    vector = 8 if length % 8 == 0 and x.data_ptr() % _ALIGNMENT == 0 else 2
    c = config.pick_quantize(
        _TYPE[x.dtype], bits, symmetric, seed is not None, vector, max(length, 1)
    )
    stored = packed_size(length) if bits == 4 else length
    q = x.new_empty(segments * stored, dtype=torch.uint8 if bits == 4 else torch.int8)
    scale = x.new_empty(segments, dtype=torch.float32)
    zero = None if symmetric else x.new_empty(segments, dtype=torch.int32)
    if segments:
        key = 0 if seed is None else reference.seed_key(seed)
        parameters = _QUANTIZE_PARAMS.pack(
            *(_pointer(t) for t in (x, q, scale, zero)), segments, length, key
        )
        blocks = math.ceil(segments / (c.threads // c.threads_per_segment))
        stream = torch.cuda.current_stream(x.device).cuda_stream
        jit.get(c, x.device.index).launch((blocks, 1, 1), (c.threads, 1, 1), 0, parameters, stream)
    return q, scale, zero


@lru_cache
def _device(index: int) -> config.Device:
    return config.device_of(
        jit.arch_of(index), torch.cuda.get_device_properties(index).multi_processor_count
    )


# Kernels that split K count the arrivals of a tile in ints that are zero before and after a launch.
# Launches of one stream follow each other and share a slab; a captured launch may be replayed on
# any stream, beside any other, so it gets ints of its own that are never handed out again.
_SLAB = 1 << 18  # ints


class _Counters:
    """The arrival counters of one device: a slab for each stream, one for captured launches."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.of_stream: dict[int, tuple[int, int]] = {}  # stream -> address, ints
        self.captured = jit.allocate_zeroed(index, 4 * _SLAB)
        self.captured_used = 0

    def for_stream(self, stream: int, count: int) -> int:
        address, size = self.of_stream.get(stream, (0, 0))
        if size < count:
            size = max(count, 4096)
            address = jit.allocate_zeroed(self.index, 4 * size)
            self.of_stream[stream] = address, size
        return address

    def for_capture(self, count: int) -> int | None:
        first = self.captured_used
        if first + count > _SLAB:
            return None
        self.captured_used += count
        return self.captured + 4 * first


_counters: dict[int, _Counters] = {}


def _arrival_counters(a: Tensor, stream: int, count: int) -> tuple[int, Tensor | None]:
    """Address of ``count`` zeroed ints for one launch on ``stream``, and the tensor they lie in."""
    counters = _counters.get(a.device.index)
    if torch.cuda.is_current_stream_capturing():
        address = None if counters is None else counters.for_capture(count)
        if address is None:  # the zeroing becomes a node of the graph: right, if slower, and rare
            zeroed = a.new_zeros(count, dtype=torch.int32)
            return zeroed.data_ptr(), zeroed
        return address, None
    if counters is None:
        counters = _counters[a.device.index] = _Counters(a.device.index)
    return counters.for_stream(stream, count), None


def _rows(a: Tensor) -> Tensor:
    """[..., K] as [M, K] with unit stride along K; a copy only where the strides demand it."""
    x = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _aligned(t: Tensor) -> bool:
    row = t.stride(0) * t.element_size()
    return row % _ALIGNMENT == 0 and t.data_ptr() % _ALIGNMENT == 0


def _broadcast_strides(t: Tensor) -> tuple[int, int]:
    rows, groups = t.shape
    return (t.stride(0) if rows > 1 else 0), (t.stride(1) if groups > 1 else 0)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dtype_code(t: Tensor | None) -> int:
    return 0 if t is None else _DTYPE_CODE[t.dtype]
