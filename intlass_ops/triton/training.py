"""What QAT does to memory between its integer GEMMs, as Triton kernels of one pass each.

    quantise_gradient   dy to INT8, rounded stochastically: by rows, and transposed by columns
    transpose_codes     INT8 or packed INT4 codes [R, K] to INT8 [K, R]
    rotate_back         (g ⊙ mask) hᵀ

An INT8 GEMM wants both operands with the summed dimension innermost: each tensor that a gradient
sums over its rows is written transposed, and the summed dimension padded with zeros, so that rows
start where its loads may. The formulas and checks are in ../ops/training.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # scale: its reciprocal is finite


@triton.jit
def _scale(amax_bits):
    """amax / 127 from the bits of amax; 1 for zeros, NaN stays."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.where(amax == 0.0, 1.0, amax * (1 / 127))
    return tl.where(scale < _SMALLEST, _SMALLEST, scale)


@triton.jit
def _tile(dy_ptr, rows_ptr, columns_ptr, row, column, m, n, dy_row):
    """(dy ⊙ factors of the columns, dy ⊙ factors of the rows), zeros outside."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * dy_row + column[None, :]
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    of_rows = tl.load(rows_ptr + row, mask=row < m, other=0.0)
    of_columns = tl.load(columns_ptr + column, mask=column < n, other=0.0)
    return dy * of_columns[None, :], dy * of_rows[:, None]


@triton.jit
def _largest_kernel(
    dy_ptr, rows_ptr, columns_ptr, amax_ptr, m, n, dy_row, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Maxima of magnitudes as bits, which order like integers and put NaN above infinity."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    by_row, by_column = _tile(dy_ptr, rows_ptr, columns_ptr, row, column, m, n, dy_row)
    by_row = tl.max(by_row.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    by_column = tl.max(by_column.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    tl.atomic_max(amax_ptr + row, by_row, mask=row < m, sem="relaxed")
    tl.atomic_max(amax_ptr + m + column, by_column, mask=column < n, sem="relaxed")


@triton.jit
def _stochastic(t, reciprocal, bits):
    """floor(t·reciprocal + uniform) of |t·reciprocal| < 127 and 16 random bits.

    The sum of a number and 1.5·2^23 is rounded to an integer, and ends in its bits: conversions
    are slow instructions. With half a step off the nearest integer is the one below.
    """
    uniform = (0x3F800000 | (bits << 7)).to(tl.float32, bitcast=True) - (1.5 - 2**-17)
    shifted = (t * reciprocal + uniform) + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _round_kernel(
    dy_ptr, rows_ptr, columns_ptr, amax_ptr, seed_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, m, n, dy_row,
    wide_m, wide_n, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    by_row, by_column = _tile(dy_ptr, rows_ptr, columns_ptr, row, column, m, n, dy_row)
    s = _scale(tl.load(amax_ptr + row, mask=row < m, other=0))
    st = _scale(tl.load(amax_ptr + m + column, mask=column < n, other=0))
    tl.store(s_ptr + row, s, mask=(row < m) & (tl.program_id(1) == 0))
    tl.store(st_ptr + column, st, mask=(column < n) & (tl.program_id(0) == 0))

    # reference.hashes of the index, modulo 2^32: 16 bits for each of the two roundings
    seed = tl.load(seed_ptr)
    hashed = (row * n)[:, None].to(tl.uint32) + column[None, :].to(tl.uint32) ^ seed.to(tl.uint32)
    hashed = (hashed ^ (hashed >> 16)) * 0x7FEB352D
    hashed = (hashed ^ (hashed >> 15)) * 0x846CA68B
    hashed = hashed ^ (hashed >> 16) ^ (seed >> 32).to(tl.uint32)

    # short of 127, which the largest would else exceed by roundings
    below_one: tl.constexpr = 1.0 - 2**-20
    q = _stochastic(by_row, (below_one / s)[:, None], hashed & 0xFFFF)
    at = row.to(tl.int64)[:, None] * wide_n + column[None, :]
    tl.store(q_ptr + at, q, mask=(row < m)[:, None] & (column < wide_n)[None, :])
    q = _stochastic(by_column, (below_one / st)[None, :], hashed >> 16)
    at = column.to(tl.int64)[:, None] * wide_m + row[None, :]
    tl.store(qt_ptr + at, tl.trans(q), mask=(column < n)[:, None] & (row < wide_m)[None, :])


def quantise_gradient(
    dy: Tensor, rows: Tensor, columns: Tensor, seed: Tensor, wide_m: int, wide_n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q [M, wide_n], s [M, 1], qt [N, wide_m], st [N, 1]) of dy [M, N]; factors [M] and [N]."""
    m, n = dy.shape
    q = dy.new_empty(m, wide_n, dtype=torch.int8)
    qt = dy.new_empty(n, wide_m, dtype=torch.int8)
    s, st = (dy.new_empty(size, 1, dtype=torch.float32) for size in (m, n))
    if dy.numel() == 0:
        return q.zero_(), s.fill_(1.0), qt.zero_(), st.fill_(1.0)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    amax = dy.new_zeros(m + n, dtype=torch.int32)
    common = dy, rows.contiguous(), columns.contiguous(), amax
    largest: Any = _largest_kernel
    bm, bn = 64, 128
    largest[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
        *common, m, n, dy.stride(0), BM=bm, BN=bn, num_warps=4
    )
    rounding: Any = _round_kernel
    bm, bn = 32, 128
    rounding[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
        *common, seed, q, s, qt, st, m, n, dy.stride(0), wide_m, wide_n, BM=bm, BN=bn, num_warps=4
    )
    return q, s, qt, st


@triton.jit
def _transpose_kernel(
    codes_ptr, out_ptr, rows, wide, k, stored, codes_row, FOUR_BITS: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A tile of BR rows by BK bytes of codes, which hold BK or 2·BK k."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    byte = tl.program_id(1) * BK + tl.arange(0, BK)
    at = row.to(tl.int64)[:, None] * codes_row + byte[None, :]
    codes = tl.load(codes_ptr + at, mask=(row < rows)[:, None] & (byte < stored)[None, :], other=0)
    codes = tl.trans(codes)
    there = (row < wide)[None, :]
    if FOUR_BITS:
        pair = codes.to(tl.int32)
        at = 2 * byte.to(tl.int64)[:, None] * wide + row[None, :]
        low, high = ((pair & 15) ^ 8) - 8, ((pair >> 4) ^ 8) - 8
        tl.store(out_ptr + at, low.to(tl.int8), mask=there & (2 * byte < k)[:, None])
        tl.store(out_ptr + at + wide, high.to(tl.int8), mask=there & (2 * byte + 1 < k)[:, None])
    else:
        at = byte.to(tl.int64)[:, None] * wide + row[None, :]
        tl.store(out_ptr + at, codes, mask=there & (byte < k)[:, None])


def transpose_codes(codes: Tensor, k: int, wide: int) -> Tensor:
    """INT8 [k, wide] of INT8 codes [R, k] or signed INT4 codes, packed."""
    rows = codes.shape[0]
    out = torch.empty(k, wide, dtype=torch.int8, device=codes.device)
    if out.numel():
        codes = codes if codes.stride(1) == 1 else codes.contiguous()
        four_bits = codes.dtype == torch.uint8
        br, bk = 128, 64 if four_bits else 128
        kernel: Any = _transpose_kernel
        kernel[(triton.cdiv(rows, br), triton.cdiv(codes.shape[1], bk))](
            codes,
            out,
            rows,
            wide,
            k,
            codes.shape[1],
            codes.stride(0),
            FOUR_BITS=four_bits,
            BR=br,
            BK=bk,
            num_warps=8,
        )
    return out


@triton.jit
def _rotate_back_kernel(
    g_ptr, mask_ptr, h_ptr, out_ptr, count, BLOCKS: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """BLOCKS rows of R values, of which g has `count`."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = (block < count)[:, None]
    at = block.to(tl.int64)[:, None] * R + tl.arange(0, R)[None, :]
    byte = block.to(tl.int64)[:, None] * (R // 8) + tl.arange(0, R // 8)[None, :]
    bits = tl.load(mask_ptr + byte, mask=there, other=0).to(tl.int32)
    kept = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    g = tl.load(g_ptr + at, mask=there, other=0.0)
    g = tl.where(tl.reshape(kept, (BLOCKS, R)) != 0, g, tl.zeros_like(g))
    transposed = tl.load(h_ptr + tl.arange(0, R)[:, None] + tl.arange(0, R)[None, :] * R)
    out = tl.dot(g, transposed, input_precision="ieee")
    tl.store(out_ptr + at, out.to(g.dtype), mask=there)


def rotate_back(g: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    """(g ⊙ mask) hᵀ of g [R, K] by blocks of h; h has the dtype of g."""
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    if out.numel():
        r = h.shape[0]
        blocks = max(2048 // r, 16)
        count = g.numel() // r
        kernel: Any = _rotate_back_kernel
        kernel[(triton.cdiv(count, blocks),)](
            g.contiguous(), mask.contiguous(), h.contiguous(), out, count, BLOCKS=blocks, R=r
        )
    return out
