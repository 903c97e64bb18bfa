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
    ALIGNMENT,
    TYPE,
    ZERO_TYPE,
    Key,
    aligned,
    device_of,
    empty,
    remember,
    signature,
)

if TYPE_CHECKING:
    from ..ops.problem import Problem

_TABLE = struct.Struct("=7q")  # Params of expert_tiles.cu, two pointers first
_EXPERT_WORDS = 7  # Experts of problem.cuh, before the words of every GEMM


Operand = Tensor | None
_FP4_SCALES = {32: "e8m0", 16: "e4m3"}  # by the size of a group


class Operands(NamedTuple):
    """Of a call; as they are given, or as the kernels read them."""

    a: Tensor
    w: Tensor
    scales: Tensor
    zeros: Operand
    ends: Tensor
    a_scale: Operand
    bias: Operand
    alpha: Operand


class Plan(NamedTuple):
    """A grouped GEMM of one signature."""

    problem: Problem
    table: Launch
    gemm: Launch
    slots: int
    about: tuple[int, ...]  # Experts of problem.cuh, behind the table
    out_shape: tuple[int, int]
    tail: launch_hopper.Tail | None
    report: tuple[Any, ...]  # for `record`
    copies: bool  # whether operands are not read as they are given

    def run(self, given: Operands) -> Tensor:
        a, w, scales, zeros, ends, a_scale, bias, alpha = (
            _as_read(self.problem, given) if self.copies else given
        )
        device = a.device
        y = empty(self.out_shape, (self.out_shape[1], 1), self.problem.out_dtype, device)
        table = empty((self.slots + 1, 4), (4, 1), torch.int32, device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        self.table((ends.data_ptr(), table.data_ptr()), stream)
        after = (0 if t is None else t.data_ptr() for t in (zeros, a_scale))
        last = (0 if t is None else t.data_ptr() for t in (alpha, bias))
        operands = a.data_ptr(), w.data_ptr(), scales.data_ptr(), *after, 0, *last, y.data_ptr()
        tail = b"" if self.tail is None else self.tail(a, w, stream, None)[0]
        self.gemm((table.data_ptr(), *self.about, *operands, 0, 0), stream, tail)
        if listening():
            record(*self.report)
        return y


_plans: dict[Key, Plan] = {}


def key_of(k: int, out_dtype: torch.dtype | None, given: Operands) -> Key:
    """Of a call's plan."""
    return (
        k,
        out_dtype,
        batch_invariance.enabled(),
        given.a.data_ptr() % ALIGNMENT,
        given.w.data_ptr() % ALIGNMENT,
        given.scales.data_ptr() % ALIGNMENT,
        *map(signature, given),
    )


def find(key: Key | None) -> Plan | None:
    """That of an earlier call, if it had one."""
    return None if key is None else _plans.get(key)


def make(key: Key, p: Problem, given: Operands) -> Plan | None:
    """The plan of a checked problem; None where no kernel fits."""
    kinds = ("bf16",) if p.w_kind == "e2m1" else ("bf16", "fp16", "s8", "s4", "u4")
    if p.x_kind not in kinds or batch_invariance.enabled() or not given.a.shape[0] * p.n * p.k:
        return None
    read = _as_read(p, given)
    copies = any(r is not None and not _is_same(r, g) for r, g in zip(read, given, strict=True))
    plan = _make(p, copies, read)
    return None if plan is None else remember(_plans, key, plan)


def _is_same(read: Tensor, given: Operand) -> bool:
    return given is not None and (read.data_ptr(), read.dtype) == (given.data_ptr(), given.dtype)


def _as_read(p: Problem, given: Operands) -> Operands:
    """As the kernels read them: unit strides along K, w as [experts·N, …], known types."""
    a, w, scales, zeros, ends, a_scale, bias, alpha = given
    x = packing.from_lanes(a) if a.dtype == torch.int32 else launch.unit_stride(a)
    if config.widens(device_of(a.device.index), p.x_kind):
        x = widen(x, p.x_kind, p.k, lane_order=False)
    w = launch.unit_stride(w.reshape(w.shape[0] * w.shape[1], w.shape[2]))
    if p.w_kind == "e2m1":  # read several at a time
        scales = scales.contiguous()
        scales = scales.clone() if scales.data_ptr() % 4 else scales
    if zeros is not None and zeros.dtype not in ZERO_TYPE:
        zeros = zeros.float()
    a_scale = None if a_scale is None else a_scale.float().reshape(-1)
    bias = None if bias is None else launch.unit_stride(bias)
    return Operands(x, w, scales, zeros, ends.contiguous(), a_scale, bias, alpha)


def _make(p: Problem, copies: bool, read: Operands) -> Plan | None:
    x, w, scales, zeros, ends, a_scale, bias, alpha = read
    tokens, experts, device = x.shape[0], scales.shape[0], x.device
    gpu = device_of(device.index)
    shape = config.Shape(
        x_kind=p.x_kind,
        w_kind=p.w_kind,
        scale_type=_FP4_SCALES[p.group_size] if p.w_kind == "e2m1" else TYPE[scales.dtype],
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
        *(launch.dtype_code(t) for t in (bias, alpha, a_scale, None)),
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
        problem=p,
        table=jit.get(t, device.index).bind(t.grid(slots), (t.threads, 1, 1), 0, table, 2),
        gemm=jit.get(c, device.index).bind(
            grid, (c.threads, 1, 1), c.smem_bytes, parameters, words
        ),
        slots=slots,
        about=(near, p.n * row_bytes[1], *map(_expert_bytes, (scales, zeros, bias, alpha))),
        out_shape=(tokens, p.n),
        tail=tail,
        copies=copies,
        report=("matmul_experts", p.scheme, (tokens, p.n, p.k, p.group_size), str(c), why),
    )


def _expert_bytes(t: Tensor | None) -> int:
    return 0 if t is None or t.shape[0] == 1 else t.stride(0) * t.element_size()
