"""y[M, K] = x[M, N] @ w[N, K] for a packed INT4 weight, as Triton kernels: dX of a W4A16 GEMM.

The sum runs over the rows of the weight, so a scale belongs to a row of it and some columns of the
result and cannot wait for the sum: weights become x's dtype in registers first, (q - z)·s rounded
once. Stripes of N that share a tile leave fp32 sums, which a second kernel adds in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, alpha_ptr, y_ptr, m, n, k, x_row, w_row, group_size,
    s_row, s_group, z_row, z_group, per_stripe,
    HAS_ZEROS: tl.constexpr, HAS_ALPHA: tl.constexpr, ONE_GROUP: tl.constexpr,
    STRIPES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of BM tokens by BK k; a group holds BK k, or BK is a whole number of groups."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first_k = tl.program_id(1) * BK
    byte = first_k // 2 + tl.arange(0, BK // 2)
    column = first_k + tl.arange(0, BK)
    stripe = tl.program_id(2)
    begin = stripe * per_stripe
    total = tl.zeros((BM, BK), tl.float32)
    for start in range(begin, tl.minimum(begin + per_stripe, n), BN):
        each = start + tl.arange(0, BN)
        here = each < n
        x = tl.load(
            x_ptr + row.to(tl.int64)[:, None] * x_row + each[None, :],
            mask=(row < m)[:, None] & here[None, :],
            other=0.0,
        )
        pair = tl.load(
            w_ptr + each.to(tl.int64)[:, None] * w_row + byte[None, :],
            mask=here[:, None] & (byte < (k + 1) // 2)[None, :],
            other=0,
        ).to(tl.int32)
        low, high = pair & 15, pair >> 4
        if not HAS_ZEROS:
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        q = tl.reshape(tl.join(low, high), (BN, BK)).to(tl.float32)
        if ONE_GROUP:
            group = first_k // group_size
            s = tl.load(s_ptr + each * s_row + group * s_group, mask=here, other=0.0)[:, None]
            if HAS_ZEROS:
                z = tl.load(z_ptr + each * z_row + group * z_group, mask=here, other=0.0)[:, None]
                q -= z.to(tl.float32)
        else:
            group = column // group_size
            inside = here[:, None] & (column < k)[None, :]
            at = each[:, None] * s_row + group[None, :] * s_group
            s = tl.load(s_ptr + at, mask=inside, other=0.0)
            if HAS_ZEROS:
                at = each[:, None] * z_row + group[None, :] * z_group
                q -= tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        w = (q * s.to(tl.float32)).to(x.dtype)
        total = tl.dot(x, w, total)
    if STRIPES == 1 and HAS_ALPHA:
        total *= tl.load(alpha_ptr).to(tl.float32)
    out = y_ptr + (stripe.to(tl.int64) * m + row[:, None]) * k + column[None, :]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=(row < m)[:, None] & (column < k)[None, :])


@triton.jit
def _add_stripes(
    parts_ptr, alpha_ptr, y_ptr, count,
    HAS_ALPHA: tl.constexpr, STRIPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    part = parts_ptr + at
    for _ in tl.static_range(STRIPES):
        total += tl.load(part, mask=at < count, other=0.0)
        part += count
    if HAS_ALPHA:
        total *= tl.load(alpha_ptr).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < count)


def matmul_nn(
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    alpha: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x [M, N] @ w [N, k], w packed; scales and zeros [1 or N, 1 or k/group_size]."""
    m, n = x.shape
    y = torch.empty(m, k, dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    w = w if w.stride(1) == 1 else w.contiguous()
    groups = max(scales.shape[1], 1 if zeros is None else zeros.shape[1])
    group_size = k // groups
    bm = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    bk = 128 if m > 16 else 64
    bn = 64 if m > 16 else 128
    tiles = triton.cdiv(m, bm) * triton.cdiv(k, bk)
    stripes = _stripes(x.device, tiles, triton.cdiv(n, bn))
    per_stripe = triton.cdiv(triton.cdiv(n, stripes), bn) * bn
    out = y if stripes == 1 else y.new_empty(stripes, m, k, dtype=torch.float32)
    z = scales if zeros is None else zeros
    main: Any = _kernel
    main[(triton.cdiv(m, bm), triton.cdiv(k, bk), stripes)](
        x,
        w,
        scales,
        z,
        scales if alpha is None else alpha,
        out,
        m,
        n,
        k,
        x.stride(0),
        w.stride(0),
        group_size,
        *_strides(scales),
        *_strides(z),
        per_stripe,
        HAS_ZEROS=zeros is not None,
        HAS_ALPHA=alpha is not None,
        ONE_GROUP=group_size % bk == 0,
        STRIPES=stripes,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=8 if bm == 128 else 4,
        num_stages=3,
    )
    if stripes > 1:
        add: Any = _add_stripes
        count = m * k
        add[(triton.cdiv(count, 1024),)](
            out,
            scales if alpha is None else alpha,
            y,
            count,
            HAS_ALPHA=alpha is not None,
            STRIPES=stripes,
            BLOCK=1024,
        )
    return y


def _stripes(device: torch.device, tiles: int, steps: int) -> int:
    """Blocks that share a tile: as many as keep the GPU busy with two steps each or more."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    stripes = 1
    while 2 * tiles * stripes <= 2 * processors and steps >= 4 * stripes and stripes < 16:
        stripes *= 2
    return stripes


def _strides(t: Tensor) -> tuple[int, int]:
    """Of rows and groups; 0 to broadcast."""
    return (t.stride(0) if t.shape[0] > 1 else 0), (t.stride(1) if t.shape[1] > 1 else 0)
