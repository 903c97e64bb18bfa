"""Rotation, scale, rounding and packing of activations in one pass, as a Triton kernel.

The mathematics and the checks are in ../fused_quantize.py. A program takes BM rows of one span, the
larger of a group and a rotation. It rotates the span twice, once for the scales and once for the
codes: the second time x comes from cache, and nothing is kept in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..fused_quantize import Plan

_FORMATS = {"int8": 0, "int4": 1, "mx": 2, "nv": 3}
_INT8, _MX = tl.constexpr(_FORMATS["int8"]), tl.constexpr(_FORMATS["mx"])


@triton.jit
def _rint(x):
    """Half to even for |x| < 2^22: the sum has no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _power_of_two(exponent):
    """2^(exponent - 127) from the exponent field of a float32; field 0 is 2^-127."""
    bits = tl.where(exponent > 0, exponent << 23, 1 << 22)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """(value, code) of the nearest e4m3 to x >= 0, saturating at 448; NaN has code 0x7F.

    By hand, because the conversion instruction needs a newer GPU than the rest.
    """
    y = tl.minimum(x, 448.0)
    field = tl.maximum(y.to(tl.int32, bitcast=True) >> 23, 121)
    step = _power_of_two(field - 3)
    value = _rint(tl.div_rn(y, step)) * step
    bits = value.to(tl.int32, bitcast=True)
    normal = (((bits >> 23) - 120) << 3) | ((bits >> 20) & 7)
    code = tl.where(value >= 0.015625, normal, (value * 512.0).to(tl.int32))
    nan = x != x
    return tl.where(nan, x, value), tl.where(nan, 127, code)


@triton.jit
def _e2m1(y):
    """e2m1 codes: nearest, ties to even, saturating; NaN is 0."""
    a = tl.minimum(tl.abs(y), 6.0)
    step = tl.where(a < 2.0, 0.5, tl.where(a < 4.0, 1.0, 2.0))
    per_step = tl.where(a < 2.0, 2.0, tl.where(a < 4.0, 1.0, 0.5))
    v = _rint(a * per_step) * step
    code = tl.where(v <= 2.0, 2.0 * v, tl.where(v <= 4.0, v + 2.0, 0.5 * v + 4.0)).to(tl.int32)
    sign = (y.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(y == y, code | sign, 0)


@triton.jit
def _rotated(x_ptr, h, row, column, k, inside, R: tl.constexpr):
    at = row.to(tl.int64)[:, None] * k + column + tl.arange(0, R)[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None], other=0.0)
    return tl.dot(x, h, input_precision="ieee")


@triton.jit
def _kernel(
    x_ptr, h_ptr, codes_ptr, scales_ptr, mask_ptr, m, k, global_scale, quest_factor,
    FORMAT: tl.constexpr, INTEGER: tl.constexpr, QUEST: tl.constexpr, MASK: tl.constexpr,
    BM: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """CHUNKS rotations in a span, SUB groups in a rotation; one of them is 1."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < m
    span = tl.program_id(1)
    first = span * CHUNKS * R
    G: tl.constexpr = R // SUB
    h = tl.load(h_ptr + tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :])

    amax = tl.zeros((BM, SUB), tl.float32)
    total = tl.zeros((BM, SUB), tl.float32)
    squares = tl.zeros((BM, SUB), tl.float32)
    for chunk in range(CHUNKS):
        xh = tl.reshape(_rotated(x_ptr, h, row, first + chunk * R, k, inside, R), (BM, SUB, G))
        # adding 0·x keeps a NaN, which a maximum would drop
        amax = tl.maximum(amax, tl.max(tl.abs(xh), 2))
        total += tl.sum(xh, 2)
        squares += tl.sum(xh * xh, 2)
    amax += total * 0.0
    count = CHUNKS * G
    rms2 = squares / count
    mean = total / count
    spread = tl.sqrt_rn(tl.maximum(rms2 - mean * mean, 0.0) + total * 0.0)

    factor = 1.0
    at = row.to(tl.int64)[:, None] * (k // count) + span * SUB + tl.arange(0, SUB)[None, :]
    if INTEGER:
        qmax: tl.constexpr = 127.0 if FORMAT == _INT8 else 7.0
        if QUEST:
            scale = quest_factor * tl.sqrt_rn(rms2)
        else:
            scale = tl.div_rn(amax, tl.full((BM, SUB), qmax, tl.float32))
        scale = tl.where(scale == 0.0, 1.0, scale)
        divisor = scale
        tl.store(scales_ptr + at, scale, mask=inside[:, None])
    elif FORMAT == _MX:
        base = (quest_factor * spread if QUEST else amax) + 1e-8
        field = (base.to(tl.int32, bitcast=True) >> 23) & 255
        divisor = tl.where(field == 255, float("nan"), _power_of_two(field))
        factor = 1.0 if QUEST else 3.0
        tl.store(scales_ptr + at, field.to(tl.uint8), mask=inside[:, None])
    else:
        six = tl.full((BM, SUB), 6.0, tl.float32)
        base = global_scale * (quest_factor * spread if QUEST else tl.div_rn(amax, six))
        base = tl.where(tl.abs(base) < float("inf"), base, float("nan"))
        value, scale_code = _e4m3(base)
        divisor = tl.where(value == 0.0, float("inf"), value)
        factor = global_scale
        tl.store(scales_ptr + at, scale_code.to(tl.uint8), mask=inside[:, None])

    for chunk in range(CHUNKS):
        column = first + chunk * R
        xh = tl.reshape(_rotated(x_ptr, h, row, column, k, inside, R), (BM, SUB, G))
        y = tl.div_rn(xh * factor, tl.broadcast_to(divisor[:, :, None], (BM, SUB, G)))
        y = tl.reshape(y, (BM, R))
        if INTEGER:
            bound: tl.constexpr = 127.0 if FORMAT == _INT8 else 7.0
            q = _rint(tl.minimum(tl.maximum(y, -bound - 1.0), bound + 1.0))
            kept = (tl.abs(q) <= bound) & (y == y)
            q = tl.minimum(tl.maximum(q, -bound), bound)
            code = tl.where(y == y, q, 0.0).to(tl.int32)
        else:
            kept = tl.abs(y) < (18.0 if FORMAT == _MX and not QUEST else 6.0)
            code = _e2m1(y)
        line = row.to(tl.int64)[:, None]
        if FORMAT == _INT8:
            out = line * k + column + tl.arange(0, R)[None, :]
            tl.store(codes_ptr + out, code.to(tl.int8), mask=inside[:, None])
        else:
            low, high = tl.split(tl.reshape(code & 15, (BM, R // 2, 2)))
            out = (line * k + column) // 2 + tl.arange(0, R // 2)[None, :]
            tl.store(codes_ptr + out, (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
        if MASK:
            place = tl.arange(0, 8)[None, None, :]
            bits = tl.reshape(kept.to(tl.int32), (BM, R // 8, 8)) << place
            out = (line * k + column) // 8 + tl.arange(0, R // 8)[None, :]
            tl.store(mask_ptr + out, tl.sum(bits, 2).to(tl.uint8), mask=inside[:, None])


def fused_quantize(
    x: Tensor, h: Tensor, plan: Plan, return_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (packed unless INT8), scales (FP8 as bytes) and mask (empty unless asked for)."""
    from ..fused_quantize import QUEST_E2M1, QUEST_INT

    *lead, k = x.shape
    rows = x.reshape(-1, k).contiguous()
    m, r, g = rows.shape[0], plan.r, plan.group_size
    integer = plan.format in ("int8", "int4")
    codes = torch.empty(
        *lead,
        k if plan.format == "int8" else k // 2,
        dtype=torch.int8 if plan.format == "int8" else torch.uint8,
        device=x.device,
    )
    scales = torch.empty(
        *lead, k // g, dtype=torch.float32 if integer else torch.uint8, device=x.device
    )
    mask = torch.empty(*lead, k // 8 if return_mask else 0, dtype=torch.uint8, device=x.device)
    bm = 16 if r >= 128 else 32
    kernel: Any = _kernel
    if m:
        kernel[(triton.cdiv(m, bm), k // max(g, r))](
            rows,
            h.to(x.device, x.dtype).contiguous(),
            codes,
            scales,
            mask,
            m,
            k,
            plan.global_scale,
            QUEST_INT.get(8 if plan.format == "int8" else 4) if integer else QUEST_E2M1,
            FORMAT=_FORMATS[plan.format],
            INTEGER=integer,
            QUEST=plan.quest,
            MASK=return_mask,
            BM=bm,
            R=r,
            CHUNKS=max(g // r, 1),
            SUB=max(r // g, 1),
        )
    return codes, scales, mask
