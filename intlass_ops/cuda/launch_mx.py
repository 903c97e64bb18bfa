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

_WORDS = 5  # of mx_codes.cu's parameters: pointers, which come first
_HALF = 8  # bytes of half a block


class _Plan(NamedTuple):
    codes_of_x: Launch
    codes_of_w: Launch
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
    alpha_type = launch.dtype_code(alpha)
    key = shape, x.stride(0), w.stride(0), alpha_type, index
    plan = _plans.get(key) or remember(
        _plans, key, _make(c, x, w, a, b, shape, out_dtype, alpha_type)
    )
    flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    stream = torch._C._cuda_getCurrentRawStream(index)
    for make, *tensors in (
        (plan.codes_of_x, x, x_scales, a, a_scale, flag),
        (plan.codes_of_w, w, w_scales, b, b_scale, flag),
    ):
        make([t.data_ptr() for t in tensors], stream)
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
    alpha_type: int,
) -> _Plan:
    k = shape.k
    make = config.MxCodes(shape.blocked)
    scale_row = -(-k // shape.group_size // 4) if shape.blocked else k // shape.group_size

    def codes_of(t: Tensor) -> Launch:
        words = *[0] * _WORDS, t.shape[0], t.shape[1] // _HALF, t.stride(0), scale_row
        kernel = jit.get(make, t.device.index)
        return kernel.bind(make.grid(t.shape[0]), (make.threads, 1, 1), 0, words, _WORDS)

    types = 0, alpha_type, launch.dtype_code(torch.empty(0)), 0  # of bias, alpha, a_scale, a_zero
    rest = k, 1, 0, 0, 0, 1, 0, *types
    return _Plan(codes_of(x), codes_of(w), launch.bind(c, a, b, shape.n, k, out_dtype, rest))
