"""Grouped GEMMs on a GPU: tokens sorted by expert, without asking how many each expert has.

Two launches: expert_tiles.cu makes a table of which expert and which tokens a tile has, and a GEMM
goes by it. Not here: which kernel (config/experts.py), the argument checks.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import batch_invariance, config, packing
from ..explain import listening, record
from . import jit, launch, launch_hopper
from .kernel import Launch
from .launch_widen import widen
from .plans import (
    TYPE,
    ZERO_TYPE,
    Key,
    aligned,
    contiguous_strides,
    device_of,
    empty,
    remember,
    signature,
)

if TYPE_CHECKING:
    from ..ops.problem import Problem

_TABLE = struct.Struct("=7q")  # Params of expert_tiles.cu, two pointers first
_EXPERT_WORDS = 6  # Experts of problem.cuh, before the words of every GEMM


class Plan(NamedTuple):
    """A grouped GEMM of one signature."""

    table: Launch
    gemm: Launch
    slots: int
    about: tuple[int, ...]  # Experts of problem.cuh, behind the table
    out_shape: tuple[int, int]
    out_dtype: torch.dtype
    tail: launch_hopper.Tail | None
    report: tuple[Any, ...]  # for `record`

    def run(self, x: Tensor, w: Tensor, ends: Tensor, others: tuple[Tensor | None, ...]) -> Tensor:
        """``x`` and ``w`` [experts·N, …] as `_as_read` gives them; scales, zeros, a_scale, bias."""
        y = empty(self.out_shape, contiguous_strides(self.out_shape), self.out_dtype, x.device)
        table = empty((self.slots + 1, 4), (4, 1), torch.int32, x.device)
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        self.table((ends.data_ptr(), table.data_ptr()), stream)
        scales, zeros, a_scale, bias = (0 if t is None else t.data_ptr() for t in others)
        operands = x.data_ptr(), w.data_ptr(), scales, zeros, a_scale, 0, 0, bias, y.data_ptr()
        tail = b"" if self.tail is None else self.tail(x, w, stream, None)[0]
        self.gemm((table.data_ptr(), *self.about, *operands, 0, 0), stream, tail)
        if listening():
            record(*self.report)
        return y


_plans: dict[Key, Plan | None] = {}


def run(
    p: Problem,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ends: Tensor,
    a_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """y [tokens, N] of a checked problem; None where no kernel fits."""
    if p.x_kind == "fp32" or batch_invariance.enabled() or not a.shape[0] * p.n * p.k:
        return None
    x, w, zeros, a_scale = _as_read(p, a, w, zeros, a_scale)
    ends = ends.contiguous()
    tensors = x, w, scales, zeros, ends, a_scale, bias
    key = p, aligned(x), aligned(w), *map(signature, tensors)
    if key not in _plans:
        remember(_plans, key, _make(p, *tensors))
    plan = _plans[key]
    return None if plan is None else plan.run(x, w, ends, (scales, zeros, a_scale, bias))


def _as_read(
    p: Problem, a: Tensor, w: Tensor, zeros: Tensor | None, a_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As the kernels read them: unit strides along K, the experts' rows behind one another."""
    x = packing.from_lanes(a) if a.dtype == torch.int32 else launch.unit_stride(a)
    if config.widens(device_of(a.device.index), p.x_kind):
        x = widen(x, p.x_kind, p.k, lane_order=False)
    w = launch.unit_stride(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
    if zeros is not None and zeros.dtype not in ZERO_TYPE:
        zeros = zeros.float()
    return x, w, zeros, None if a_scale is None else a_scale.float().reshape(-1)


def _make(
    p: Problem,
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ends: Tensor,
    a_scale: Tensor | None,
    bias: Tensor | None,
) -> Plan | None:
    tokens, experts, device = x.shape[0], scales.shape[0], x.device
    gpu = device_of(device.index)
    shape = config.Shape(
        x_kind=p.x_kind,
        w_kind=p.w_kind,
        scale_type=TYPE[scales.dtype],
        zero_type="float" if zeros is None else ZERO_TYPE[zeros.dtype],
        out_type=TYPE[p.out_dtype],
        has_zeros=zeros is not None,
        has_a_zero=False,
        aligned=aligned(x) and aligned(w),
        apart=launch.rows_apart(x),
        m=tokens,
        n=p.n,
        k=p.k,
        group_size=p.group_size,
    ).on(gpu)
    c, why = config.pick_experts(gpu, shape, experts)
    tile = config.tokens_of(c)
    slots = config.slots_of(tokens, experts, tile)
    near = config.tiles_together(c, slots)
    slots = math.ceil(slots / near) * near
    grid = config.grid_of(c, p.n, slots, gpu.sm_count)
    if grid[2] > config.MOST_SLOTS:
        return None
    row_bytes = [t.stride(0) * t.element_size() for t in (x, w)]
    rest = (
        p.group_size,
        *launch.row_and_group_strides(scales[0]),
        *launch.row_and_group_strides(None if zeros is None else zeros[0]),
        0 if a_scale is None or a_scale.numel() == 1 else a_scale.stride(0),
        0,
        *(launch.dtype_code(t) for t in (bias, None, a_scale, None)),
    )
    words = _EXPERT_WORDS + launch.WORDS
    parameters = bytes(8 * words) + launch.NUMBERS.pack(tokens, p.n, p.k, *row_bytes, *rest)
    tail = None
    if isinstance(c, config.Hopper):
        of_n, k_tiles = math.ceil(p.n / c.block_n), math.ceil(p.k / c.block_k)
        parameters += launch_hopper.parameters((slots, of_n, k_tiles, 0, 1, 0, 0, 0))
        tail = launch_hopper.tail(c, x, w, p.k)
    t = config.ExpertTiles()
    table = _TABLE.pack(0, 0, experts, tokens, tile, ends.element_size(), slots)
    return Plan(
        table=jit.get(t, device.index).bind(t.grid(slots), (t.threads, 1, 1), 0, table, 2),
        gemm=jit.get(c, device.index).bind(
            grid, (c.threads, 1, 1), c.smem_bytes, parameters, words
        ),
        slots=slots,
        about=(near, p.n * row_bytes[1], *(_expert_bytes(t) for t in (scales, zeros, bias))),
        out_shape=(tokens, p.n),
        out_dtype=p.out_dtype,
        tail=tail,
        report=("matmul_experts", p.scheme, (tokens, p.n, p.k, p.group_size), str(c), why),
    )


def _expert_bytes(t: Tensor | None) -> int:
    return 0 if t is None or t.shape[0] == 1 else t.stride(0) * t.element_size()
