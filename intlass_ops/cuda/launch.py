"""GEMMs on a GPU: from tensors to a kernel launch, with the grid, workspace and parameters.

Not here: which configuration (config/), how it is compiled and loaded (jit.py), what a plan is
(plans.py), the argument checks (ops/problem.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import batch_invariance, config, packing
from ..explain import listening, record
from . import jit, launch_hopper
from .arrivals import arrival_counters
from .kernel import Launch
from .launch_widen import widen
from .plans import (
    ALIGNMENT,
    TYPE,
    ZERO_TYPE,
    Key,
    aligned,
    contiguous_strides,
    device_of,
    empty,
    remember,
)

if TYPE_CHECKING:
    from ..ops.problem import Problem

# enum Dtype of memory.cuh
_DTYPE_CODE = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int8: 5,
    torch.uint8: 6,
}
# Params of problem.cuh, pointers first; for kernels that add a residual, it and its row before them
WORDS = 11
NUMBERS = struct.Struct("=16q")
Operands = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


class MatmulPlan(NamedTuple):
    """A GEMM of one signature, ready to run again and again."""

    launch: Launch | None  # None: nothing to compute
    copies: Callable[..., Operands] | None  # operands that this signature makes copies of
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    out_dtype: torch.dtype
    device: torch.device
    report: tuple[Any, ...]  # for `record`; none where an op records its products itself
    tiles: int = 0  # K split among blocks: that many arrival counters
    workspace: int = 0  # and that many floats
    tail: launch_hopper.Tail | None = None
    residual_row: int = 0  # elements from row to row

    def run(
        self,
        a: Tensor,
        w: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        a_scale: Tensor | None,
        a_zero: Tensor | None,
        alpha: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> Tensor:
        """``flag``: what a configuration with ``only_if`` asks, whose plan writes to ``out``."""
        if out is None:
            out = empty(self.out_shape, self.out_strides, self.out_dtype, self.device)
        if self.launch is None:
            return out
        kept: Any = None  # what must live until the launch is enqueued
        if self.copies is not None:
            a, w, zeros, a_scale, a_zero, bias, residual = kept = self.copies(
                a, w, zeros, a_scale, a_zero, bias, residual
            )
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        workspace = arrivals = 0
        tail = b""
        if self.tiles:
            partial = empty((self.workspace,), (1,), torch.float32, self.device)
            workspace = partial.data_ptr()
            arrivals, counters = arrival_counters(a, stream, self.tiles)
            kept = kept, partial, counters
        if self.tail is not None:
            tail, sums = self.tail(a, w, stream, flag)
            kept = kept, sums
        codes = w.data_ptr()
        words: tuple[int, ...] = (
            a.data_ptr(),
            codes,
            scales.data_ptr(),
            0 if zeros is None else zeros.data_ptr(),
            0 if a_scale is None else a_scale.data_ptr(),
            0 if a_zero is None else a_zero.data_ptr(),
            0 if alpha is None else alpha.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            workspace,
            arrivals,
        )
        if residual is not None:
            words = residual.data_ptr(), self.residual_row, *words
        self.launch(words, stream, tail, codes)
        if self.report and listening():
            record(*self.report)
        return out


_plans: dict[Key, MatmulPlan] = {}


_forced: config.Matmul | None = None


@contextlib.contextmanager
def forced(c: config.Matmul | None) -> Iterator[None]:
    """Every GEMM runs this configuration, which must be legal for it: how the tuner compares."""
    global _plans, _forced
    before = _plans, _forced
    _plans, _forced = {}, c
    try:
        yield
    finally:
        _plans, _forced = before


def find(key: Key) -> MatmulPlan | None:
    """The plan of a signature that was met before."""
    return _plans.get(key)


def make(
    key: Key,
    p: Problem,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> MatmulPlan:
    """The plan of a checked problem, remembered by ``key``; scales and zeros are as given."""
    device = a.device
    out_shape = (*a.shape[:-1], p.n)
    strides = contiguous_strides(out_shape)
    operands = (a, w, zeros, a_scale, a_zero, bias, residual)
    copied = _operands(*operands)
    # A view of the same dtype keeps its pointer, and the plan has the strides.
    copies = any(_pointer(t) != _pointer(c) for t, c in zip(operands, copied, strict=True))
    x, w, zeros, a_scale, a_zero, bias, residual = copied
    m = x.shape[0]
    if m * p.n == 0:
        nothing = MatmulPlan(None, None, out_shape, strides, p.out_dtype, device, ())
        return remember(_plans, key, nothing)
    gpu = device_of(device.index)
    widens = config.widens(gpu, p.x_kind)
    shape = config.Shape(
        x_kind=p.x_kind,
        w_kind=p.w_kind,
        scale_type=TYPE[scales.dtype],
        zero_type="float" if zeros is None else ZERO_TYPE[zeros.dtype],
        out_type=TYPE[p.out_dtype],
        has_zeros=zeros is not None,
        has_a_zero=a_zero is not None,
        aligned=(widens or aligned(x)) and aligned(w),
        apart=(widens or rows_apart(x)) and rows_apart(w),
        m=m,
        n=p.n,
        k=p.k,
        group_size=p.group_size,
        batch_invariant=batch_invariance.enabled(),
    )
    c = _forced or config.pick(gpu, shape)
    if widens and p.x_kind == "s4" and aligned(x):
        of_int4 = config.of_int4(c, p.k)
        if of_int4 is not None:
            c, shape, widens = of_int4, shape.on(gpu), False
    c = config.with_epilogue(c, p.activation, residual is not None)
    why = config.reason(gpu, shape)
    prepare: Callable[..., Operands] | None = _operands if copies else None
    if widens:
        c = config.in_lane_order(c, p.k, aligned(x))
        lane_order = isinstance(c, config.Hopper) and c.lane_order
        prepare = functools.partial(_widened, p.x_kind, p.k, lane_order)
        x = widen(x, p.x_kind, p.k, lane_order)
    elif x.dtype == torch.int32:  # lanes, packing.py
        c = config.in_lane_order(c, p.k, aligned(x))
        if not (isinstance(c, config.Hopper) and c.lane_order):
            prepare, x = _in_bytes, packing.from_lanes(x)
            why = f"lanes of activations put in order by PyTorch first; {why}"
    rest = (
        p.group_size,
        *row_and_group_strides(scales),
        *row_and_group_strides(zeros),
        0 if a_scale is None or a_scale.numel() == 1 else a_scale.stride(0),
        0 if a_zero is None or a_zero.numel() == 1 else a_zero.stride(0),
        *(dtype_code(t) for t in (bias, alpha, a_scale, a_zero)),
    )
    plan = bind(c, x, w, p.n, p.k, p.out_dtype, rest)._replace(
        copies=prepare,
        out_shape=out_shape,
        out_strides=strides,
        report=(p.op, p.scheme, (m, p.n, p.k, p.group_size), str(c), why),
        residual_row=0 if residual is None else residual.stride(0),
    )
    return remember(_plans, key, plan)


def bind(
    c: config.Matmul,
    x: Tensor,
    w: Tensor,
    n: int,
    k: int,
    out_dtype: torch.dtype,
    rest: tuple[int, ...],
) -> MatmulPlan:
    """A configuration's plan for x [M, ...], w [N, ...]; ``rest``: Params from group_size on."""
    m, device = x.shape[0], x.device
    sm_count = device_of(device.index).sm_count
    grid = c.grid(m, n, k, sm_count) if isinstance(c, config.Hopper) else c.grid(m, n)
    strides = x.stride(0) * x.element_size(), w.stride(0) * w.element_size()
    words = WORDS + 2 * c.residual
    parameters = bytes(8 * words) + NUMBERS.pack(m, n, k, *strides, *rest)
    if isinstance(c, config.Hopper):
        parameters += launch_hopper.parameters(c.shares(m, n, k, grid[0]))
    stay = config.SkinnyRing, config.SkinnyHeld, config.SkinnyMx
    smem = c.smem_of(n, k) if isinstance(c, stay) else c.smem_bytes
    plan = MatmulPlan(
        launch=jit.get(c, device.index).bind(grid, (c.threads, 1, 1), smem, parameters, words),
        copies=None,
        out_shape=(m, n),
        out_strides=contiguous_strides((m, n)),
        out_dtype=out_dtype,
        device=device,
        report=(),
    )
    if isinstance(c, config.Hopper):
        plan = plan._replace(tail=launch_hopper.tail(c, x, w, k))
        if c.shares_tiles:
            plan = plan._replace(tiles=grid[0], workspace=grid[0] * c.values_per_block)
    elif isinstance(c, config.Gemm) and c.split_k > 1:
        tiles = grid[0]
        plan = plan._replace(tiles=tiles, workspace=tiles * c.split_k * c.values_per_block)
    return plan


def _operands(
    a: Tensor,
    w: Tensor,
    zeros: Tensor | None,
    a_scale: Tensor | None,
    a_zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Operands:
    """As the kernels read them: [M, K], unit strides along K, dtypes they know."""
    if zeros is not None and zeros.dtype not in ZERO_TYPE:
        zeros = zeros.float()
    if a_zero is not None:
        a_zero = (a_zero if a_zero.dtype in _DTYPE_CODE else a_zero.float()).reshape(-1)
    return (
        _rows(a),
        unit_stride(w),
        zeros,
        None if a_scale is None else a_scale.reshape(-1),
        a_zero,
        None if bias is None else bias.contiguous(),
        None if residual is None else _in_vectors(residual),
    )


def _widened(x_kind: str, k: int, lane_order: bool, *operands: Any) -> Operands:
    """As the kernels of GPUs without INT4 tensor cores read them."""
    a, w, zeros, a_scale, a_zero, bias, residual = _operands(*operands)
    return widen(a, x_kind, k, lane_order), w, zeros, a_scale, a_zero, bias, residual


def _in_bytes(*operands: Any) -> Operands:
    """As the kernels read them that take no lanes."""
    a, w, zeros, a_scale, a_zero, bias, residual = _operands(*operands)
    return packing.from_lanes(a), w, zeros, a_scale, a_zero, bias, residual


def _rows(a: Tensor) -> Tensor:
    """[..., K] as [M, K] with unit stride along K; a copy only where the strides demand it."""
    return unit_stride(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]))


def unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _in_vectors(t: Tensor) -> Tensor:
    """A residual [..., N] as [M, N] whose rows can be read in whole vectors."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    m, n = t.shape
    vector = 2 * ALIGNMENT // t.element_size()
    if n % vector == 0 and t.stride(1) == 1 and aligned(t):
        return t
    padded = t.new_empty((m, math.ceil(n / vector) * vector))[:, :n]
    return padded.copy_(t)


def rows_apart(t: Tensor) -> bool:
    """Whether no two rows share memory."""
    return t.stride(0) >= t.shape[1] or t.shape[0] == 1


def row_and_group_strides(t: Tensor | None) -> tuple[int, int]:
    """Strides in elements of a scalar, [N], [N, 1] or [N, G]; 0 to broadcast."""
    if t is None or t.numel() == 1:
        return 0, 0
    groups = t.shape[1] if t.dim() == 2 else 1
    return (t.stride(0) if t.shape[0] > 1 else 0), (t.stride(1) if groups > 1 else 0)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def dtype_code(t: Tensor | None) -> int:
    """As kernels know what they read once per output: enum Dtype of memory.cuh."""
    return 0 if t is None else _DTYPE_CODE[t.dtype]
