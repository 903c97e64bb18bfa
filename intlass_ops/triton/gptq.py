"""GPTQ's pass over the columns of one block as a Triton kernel: rows go their ways independently.

The method is in ../gptq.py. A program holds its rows of the block in registers, so that a column
costs no launch and no trip to memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..reference import code_range

_ROWS = 8


@triton.jit
def _kernel(
    work_ptr, factor_ptr, scales_ptr, zeros_ptr, place_ptr, codes_ptr, errors_ptr,
    n, k, groups, group_size, start, first, last, width, low, high,
    HAS_ZEROS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Columns first … last - 1 of the block [start, start + width); place: their k in codes."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < n
    column = tl.arange(0, W)
    mask = inside[:, None] & (column < width)[None, :]
    at = row[:, None] * k + start + column[None, :]
    w = tl.load(work_ptr + at, mask=mask, other=0.0)
    for i in range(first, last):
        place = tl.load(place_ptr + start + i)
        group = place // group_size
        scale = tl.load(scales_ptr + row * groups + group, mask=inside, other=1.0)
        zero = tl.zeros((ROWS,), tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + row * groups + group, mask=inside, other=0).to(tl.float32)
        line = (start + i).to(tl.int64) * k + start
        x = tl.sum(tl.where(column[None, :] == i, w, 0.0), 1)
        r = tl.minimum(tl.maximum(tl.div_rn(x, scale), low - zero - 1.0), high - zero + 1.0)
        # 1.5·2^23: the sum has no room for a fraction, so it is rounded half to even
        q = tl.minimum(tl.maximum((r + 12582912.0) - 12582912.0 + zero, low), high)
        q = tl.where(r == r, q, 0.0)
        tl.store(codes_ptr + row * k + place, q.to(tl.int8), mask=inside)
        own = tl.broadcast_to(tl.load(factor_ptr + line + i), (ROWS,))
        error = tl.div_rn(x - (q - zero) * scale, own)
        tl.store(errors_ptr + row * width + i, error, mask=inside)
        after = (column >= i) & (column < width)
        w -= error[:, None] * tl.load(factor_ptr + line + column, mask=after, other=0.0)[None, :]
    tl.store(work_ptr + at, w, mask=mask)


def columns(
    work: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    places: Tensor,
    codes: Tensor,
    errors: Tensor,
    start: int,
    part: range,
    bits: int,
) -> None:
    """What gptq.py's `_columns` does, on contiguous float32 tensors."""
    n, k = work.shape
    width = errors.shape[1]
    low, high = code_range(bits, zeros is None)
    kernel: Any = _kernel
    if not n:
        return
    kernel[(triton.cdiv(n, _ROWS),)](
        work,
        factor,
        scales,
        scales if zeros is None else zeros,
        places,
        codes,
        errors,
        n,
        k,
        scales.shape[1],
        k // scales.shape[1],
        start,
        part.start - start,
        part.stop - start,
        width,
        float(low),
        float(high),
        HAS_ZEROS=zeros is not None,
        ROWS=_ROWS,
        W=max(triton.next_power_of_2(width), 16),
        num_warps=4,
    )
