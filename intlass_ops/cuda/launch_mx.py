"""MXFP4 by MXFP4 as INT8, for many tokens: twice as fast as in 16 bits, and exact.

The codes are made for each call (mx_codes.cu), which finds out whether the scales of each row lie
within a factor of 8. If they do not, a flag on the GPU keeps this product from running and lets
the one of launch_fp4.py run: the host asks nothing. Not here: which tile (config/choice.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import batch_invariance, config
from . import jit, launch
from .kernel import Launch
from .plans import Key, device_of, empty, remember

_POINTERS = 9  # of mx_codes.cu's parameters, which come first


class _Plan(NamedTuple):
    codes: tuple[Launch, Launch]  # whether, and which
    product: launch.MatmulPlan


class Begun(NamedTuple):
    """``out`` is computed where ``flag`` is 0, and yet to be computed where it is 1."""

    out: Tensor
    flag: Tensor
    kernel: str


_plans: dict[Key, _Plan] = {}


def begin(
    x: Tensor,
    w: Tensor,
    x_scales: Tensor,
    w_scales: Tensor,
    blocked: bool,
    alpha: Tensor | None,
    shape: config.Shape,
    out_dtype: torch.dtype,
) -> Begun | None:
    """Of codes x [M, K/2], w [N, K/2] whose rows start on 16 bytes; None: not faster as INT8."""
    if batch_invariance.enabled():  # whether it is exact depends on all tokens
        return None
    index = x.device.index
    c = config.pick_mx_integers(device_of(index), shape)
    if c is None:
        return None
    m, n, k = shape.m, shape.n, shape.k
    a, b = (empty((rows, k), (k, 1), torch.int8, x.device) for rows in (m, n))
    a_scale, b_scale = (empty((rows,), (1,), torch.float32, x.device) for rows in (m, n))
    key = shape, x.stride(0), w.stride(0), launch.dtype_code(alpha), index
    plan = _plans.get(key) or remember(_plans, key, _make(c, x, w, a, b, shape, out_dtype, alpha))
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    tensors = x, w, x_scales, w_scales, a, b, a_scale, b_scale, flag
    pointers = [t.data_ptr() for t in tensors]
    for each in plan.codes:
        each(pointers, torch._C._cuda_getCurrentRawStream(index))
    out = plan.product.run(a, b, b_scale, None, a_scale, None, alpha, None, flag=flag)
    return Begun(out, flag, str(c))


def _make(
    c: config.Hopper,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    shape: config.Shape,
    out_dtype: torch.dtype,
    alpha: Tensor | None,
) -> _Plan:
    m, n, k, blocked = shape.m, shape.n, shape.k, shape.blocked
    scale_row = -(-k // shape.group_size // 4) if blocked else k // shape.group_size
    words = *[0] * _POINTERS, m, n, x.stride(0), w.stride(0), scale_row, k // 128

    def bound(c: config.MxRange) -> Launch:
        grid = c.grid(max(m, n), k, device_of(x.device.index).sm_count)
        kernel = jit.get(c, x.device.index)
        return kernel.bind(grid, (c.threads, 1, 1), 0, words, _POINTERS)

    of_row = torch.empty(0)
    types = map(launch.dtype_code, (None, alpha, of_row, None))  # bias, alpha, a_scale, a_zero
    rest = k, 1, 0, 0, 0, 1, 0, *types
    codes = bound(config.MxRange(blocked)), bound(config.MxCodes(blocked))
    return _Plan(codes, launch.bind(c, a, b, n, k, out_dtype, rest))
