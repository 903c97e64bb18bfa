"""Rotation, scale, rounding and packing of activations in one pass, as a Triton kernel.

The mathematics and the checks are in ../fused_quantize.py. A program takes BM rows of a span: a
tile of W columns that whole groups fill, or one longer group in several tiles. A tile is read as it
lies in memory and multiplied by h as a matrix with R columns. Long groups are rotated twice, once
for their scale and once for the codes: the second time x comes from cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..fused_quantize import Plan

_FORMATS = {"int8": 0, "int4": 1, "mx": 2, "nv": 3}
# Values of a tile, and the largest group that lies in one.
_TILE = 4096
_GROUP_IN_TILE = 1024
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
def _rotated(
    x_ptr, h, row, column, m, end, k,
    BM: tl.constexpr, W: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The tile times h, float32 [BM, GROUPS, W / GROUPS]; zeros outside of x."""
    at = row.to(tl.int64)[:, None] * k + column[None, :]
    x = tl.load(x_ptr + at, mask=(row < m)[:, None] & (column < end)[None, :], other=0.0)
    xh = tl.dot(tl.reshape(x, (BM * W // R, R)), h, input_precision="ieee")
    return tl.reshape(xh, (BM, GROUPS, W // GROUPS))


@triton.jit
def _kernel(
    x_ptr, h_ptr, codes_ptr, scales_ptr, mask_ptr, m, k, span, group_size,
    global_scale, quest_factor,
    FORMAT: tl.constexpr, INTEGER: tl.constexpr, QUEST: tl.constexpr, MASK: tl.constexpr,
    BM: tl.constexpr, W: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """GROUPS in a tile, TILES in a span; one of them is 1."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * span
    end = tl.minimum(first + span, k)
    wide = tl.arange(0, W)
    h = tl.load(h_ptr + tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :])

    rotated = _rotated(x_ptr, h, row, first + wide, m, end, k, BM, W, R, GROUPS)
    amax = tl.max(tl.abs(rotated), 2)
    total = tl.sum(rotated, 2)
    squares = tl.sum(rotated * rotated, 2)
    for tile in range(1, TILES):
        more = _rotated(x_ptr, h, row, first + tile * W + wide, m, end, k, BM, W, R, GROUPS)
        amax = tl.maximum(amax, tl.max(tl.abs(more), 2))
        total += tl.sum(more, 2)
        squares += tl.sum(more * more, 2)
    # adding 0·x keeps a NaN, which a maximum would drop
    amax += total * 0.0
    rms2 = squares / group_size
    mean = total / group_size
    spread = tl.sqrt_rn(tl.maximum(rms2 - mean * mean, 0.0) + total * 0.0)

    factor = 1.0
    group = first // group_size + tl.arange(0, GROUPS)
    at = row.to(tl.int64)[:, None] * (k // group_size) + group[None, :]
    inside = (row < m)[:, None] & (group < k // group_size)[None, :]
    if INTEGER:
        qmax: tl.constexpr = 127.0 if FORMAT == _INT8 else 7.0
        if QUEST:
            scale = quest_factor * tl.sqrt_rn(rms2)
        else:
            scale = tl.div_rn(amax, tl.full((BM, GROUPS), qmax, tl.float32))
        scale = tl.where(scale == 0.0, 1.0, scale)
        divisor = scale
        tl.store(scales_ptr + at, scale, mask=inside)
    elif FORMAT == _MX:
        base = (quest_factor * spread if QUEST else amax) + 1e-8
        field = (base.to(tl.int32, bitcast=True) >> 23) & 255
        divisor = tl.where(field == 255, float("nan"), _power_of_two(field))
        factor = 1.0 if QUEST else 3.0
        tl.store(scales_ptr + at, field.to(tl.uint8), mask=inside)
    else:
        six = tl.full((BM, GROUPS), 6.0, tl.float32)
        base = global_scale * (quest_factor * spread if QUEST else tl.div_rn(amax, six))
        base = tl.where(tl.abs(base) < float("inf"), base, float("nan"))
        value, scale_code = _e4m3(base)
        divisor = tl.where(value == 0.0, float("inf"), value)
        factor = global_scale
        tl.store(scales_ptr + at, scale_code.to(tl.uint8), mask=inside)

    for tile in range(TILES):
        start = first + tile * W
        if TILES > 1:
            xh = _rotated(x_ptr, h, row, start + wide, m, end, k, BM, W, R, GROUPS)
        else:
            xh = rotated
        y = tl.div_rn(xh * factor, tl.broadcast_to(divisor[:, :, None], xh.shape))
        y = tl.reshape(y, (BM, W))
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
        here = (row < m)[:, None]
        if FORMAT == _INT8:
            column = start + wide
            out = line * k + column[None, :]
            tl.store(codes_ptr + out, code.to(tl.int8), mask=here & (column < end)[None, :])
        else:
            low, high = tl.split(tl.reshape(code & 15, (BM, W // 2, 2)))
            byte = start // 2 + tl.arange(0, W // 2)
            out = line * (k // 2) + byte[None, :]
            packed = (low | (high << 4)).to(tl.uint8)
            tl.store(codes_ptr + out, packed, mask=here & (byte < end // 2)[None, :])
        if MASK:
            bits = tl.reshape(kept.to(tl.int32), (BM, W // 8, 8)) << tl.arange(0, 8)[None, None, :]
            byte = start // 8 + tl.arange(0, W // 8)
            out = line * (k // 8) + byte[None, :]
            bits = tl.sum(bits, 2).to(tl.uint8)
            tl.store(mask_ptr + out, bits, mask=here & (byte < end // 8)[None, :])


class _Tiling(NamedTuple):
    span: int  # columns of a program
    bm: int
    w: int
    groups: int  # in a tile
    tiles: int  # in a span


def _tiling(k: int, r: int, g: int) -> _Tiling:
    """Tiles of _TILE values.

    Short groups fill a tile if their size is a power of two, others take programs of their own.
    """
    if g <= _GROUP_IN_TILE and g & (g - 1) == 0:
        w = max(g, r, min(triton.next_power_of_2(k), 1024))
        return _Tiling(w, max(_TILE // w, 1), w, w // g, 1)
    w = max(r, min(triton.next_power_of_2(g), 2048))
    return _Tiling(g, max(_TILE // w, 1), w, 1, triton.cdiv(g, w))


def fused_quantize(
    x: Tensor, h: Tensor, plan: Plan, return_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (packed unless INT8), scales (FP8 as bytes) and mask (empty unless asked for)."""
    from ..fused_quantize import QUEST_E2M1, QUEST_INT

    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        x, h = x.float(), h.to(x.dtype).float()
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
    tiling = _tiling(k, r, g)
    kernel: Any = _kernel
    if m:
        kernel[(triton.cdiv(m, tiling.bm), triton.cdiv(k, tiling.span))](
            rows,
            h.to(x.device, x.dtype).contiguous(),
            codes,
            scales,
            mask,
            m,
            k,
            tiling.span,
            g,
            plan.global_scale,
            QUEST_INT.get(8 if plan.format == "int8" else 4) if integer else QUEST_E2M1,
            FORMAT=_FORMATS[plan.format],
            INTEGER=integer,
            QUEST=plan.quest,
            MASK=return_mask,
            BM=tiling.bm,
            W=tiling.w,
            R=r,
            GROUPS=tiling.groups,
            TILES=tiling.tiles,
        )
    return codes, scales, mask
