"""The dense weight of INT4, INT8, FP8 or table codes, one pass in Triton (ops/dequantize.py)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import lut4


@triton.jit
def _numbers(q, TABLE: tl.constexpr, BR: tl.constexpr):
    """Of a table, by codes [BR, BK]. Sixteen lanes hold them, so that a code is one shuffle."""
    lane = tl.arange(0, 16)
    numbers = tl.full((16,), TABLE[0], tl.float32)
    for code in tl.static_range(1, 16):
        numbers = tl.where(lane == code, TABLE[code], numbers)
    return tl.gather(tl.broadcast_to(numbers[None, :], (BR, 16)), q, 1)


@triton.jit
def _parameter(ptr, row, group, row_step, group_step, inside):
    at = row.to(tl.int64)[:, None] * row_step + group[None, :] * group_step
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _kernel(
    w_ptr, s_ptr, z_ptr, out_ptr, n, k, stored, w_row, group_size, s_row, s_group, z_row, z_group,
    CODES: tl.constexpr, E4M3: tl.constexpr, TABLE: tl.constexpr, HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of BR rows and BK k, of which GROUP have one scale.

    A row is `stored` elements of CODES codes each: INT8, E4M3's bytes, or INT4 or table codes in
    bytes or words.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    first = tl.program_id(1) * BK
    column = first + tl.arange(0, BK)
    element = first // CODES + tl.arange(0, BK // CODES)
    at = row.to(tl.int64)[:, None] * w_row + element[None, :]
    there = (row < n)[:, None] & (element < stored)[None, :]
    q = tl.load(w_ptr + at, mask=there, other=0).to(tl.int32)
    if E4M3:
        # As a half the bits are 2^-8 of the value, subnormal ones too, on any GPU and whatever it
        # does to the subnormal numbers of float32. The two NaNs become 480 of their sign.
        half = ((q & 0x80) << 8 | (q & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        q = tl.reshape(half.to(tl.float32) * 256.0, (BR, BK))
    elif TABLE is not None:
        q = (q[:, :, None] >> (4 * tl.arange(0, CODES))[None, None, :]) & 15
        q = _numbers(tl.reshape(q, (BR, BK)), TABLE, BR)
    else:
        if CODES == 1:
            q += 128
        else:
            q = (q[:, :, None] >> (4 * tl.arange(0, CODES))[None, None, :]) & 15
            if not HAS_ZEROS:
                q ^= 8
        # joined to the bits of 2^23 a code is that many more; conversions are slow instructions
        offset: tl.constexpr = 8388608.0 + (128.0 if CODES == 1 else 0.0 if HAS_ZEROS else 8.0)
        q = tl.reshape((q | 0x4B000000).to(tl.float32, bitcast=True) - offset, (BR, BK))
    each = first + tl.arange(0, BK // GROUP) * GROUP
    group = each // group_size
    known = (row < n)[:, None] & (each < k)[None, :]
    q = tl.reshape(q, (BR, BK // GROUP, GROUP))
    if HAS_ZEROS:
        q -= _parameter(z_ptr, row, group, z_row, z_group, known)[:, :, None]
    w = q * _parameter(s_ptr, row, group, s_row, s_group, known)[:, :, None]
    inside = (row < n)[:, None] & (column < k)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * k + column[None, :]
    tl.store(out, tl.reshape(w, (BR, BK)).to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    dtype: torch.dtype,
    table: str | None = None,
) -> Tensor:
    """[N, k] of codes with unit stride along k; scales and zeros [1 or N, 1 or k/group_size]."""
    n = w.shape[0]
    out = torch.empty(n, k, dtype=dtype, device=w.device)
    if out.numel() == 0:
        return out
    w = w if w.stride(1) == 1 else w.contiguous()
    codes, e4m3 = 2 if w.dtype == torch.uint8 else 1, w.dtype == torch.float8_e4m3fn
    if e4m3:
        w = w.view(torch.uint8)
    if codes == 2 and k % 8 == 0 and w.stride(0) % 4 == 0 and w.data_ptr() % 4 == 0:
        w, codes = w.view(torch.int32), 8
    group_size = k // max(scales.shape[1], 1 if zeros is None else zeros.shape[1])
    z = scales if zeros is None else zeros
    br, bk = 8, 512
    kernel: Any = _kernel
    kernel[(triton.cdiv(n, br), triton.cdiv(k, bk))](
        w,
        scales,
        z,
        out,
        n,
        k,
        w.shape[1],
        w.stride(0),
        group_size,
        *_strides(scales),
        *_strides(z),
        CODES=codes,
        E4M3=e4m3,
        TABLE=None if table is None else lut4.TABLES[table],
        HAS_ZEROS=zeros is not None,
        GROUP=min(group_size & -group_size, bk) if group_size < k else bk,
        BR=br,
        BK=bk,
        num_warps=4,
    )
    return out


def _strides(t: Tensor) -> tuple[int, int]:
    """Of rows and groups; 0 to broadcast."""
    return (t.stride(0) if t.shape[0] > 1 else 0), (t.stride(1) if t.shape[1] > 1 else 0)
