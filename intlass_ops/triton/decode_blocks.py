"""Block-scaled FP4 and FP8 codes to bf16 or fp16, as a Triton kernel.

For products of many tokens, where decoding an operand once costs little beside the product. The
formats are in ../fp4.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _half(code):
    """The fp16 number whose exponent and mantissa start with those of e4m3: 2^8 too small."""
    code = code.to(tl.int32)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _e4m3(code):
    value = _half(code).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _e2m1(code):
    c = (code & 7).to(tl.float32)
    value = tl.where(c < 4.0, 0.5 * c, tl.where(c < 6.0, c - 2.0, 2.0 * c - 8.0))
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def _e8m0_quarter(code):
    """2^(code - 129): down to 2^-129, which float32 holds as a subnormal."""
    field = code.to(tl.int32) - 2
    bits = tl.where(field > 0, field << 23, 1 << (22 + tl.minimum(field, 0)))
    return tl.where(code == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _kernel(
    codes_ptr, scales_ptr, out_ptr, rows, k, groups, scale_tiles,
    FOUR_BITS: tl.constexpr, E8M0: tl.constexpr, BLOCKED: tl.constexpr,
    BR: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """BR rows by BG groups a program."""
    G: tl.constexpr = 32 if E8M0 else 16
    row = tl.program_id(0) * BR + tl.arange(0, BR)[:, None]
    group = tl.program_id(1) * BG + tl.arange(0, BG)[None, :]
    inside = (row < rows) & (group < groups)
    if BLOCKED:
        tile = (row // 128) * scale_tiles + group // 4
        at = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4
    else:
        at = row * groups + group
    code = tl.load(scales_ptr + at, mask=inside, other=0)
    scale = _e8m0_quarter(code) if E8M0 else _e4m3(code)

    first = tl.program_id(1) * BG * G
    if FOUR_BITS:
        byte = first // 2 + tl.arange(0, BG * G // 2)[None, :]
        at = row.to(tl.int64) * (k // 2) + byte
        pair = tl.load(codes_ptr + at, mask=(row < rows) & (byte < k // 2), other=0)
        value = tl.reshape(tl.join(_e2m1(pair & 15), _e2m1(pair >> 4)), (BR, BG * G))
    else:
        column = first + tl.arange(0, BG * G)[None, :]
        at = row.to(tl.int64) * k + column
        value = _e4m3(tl.load(codes_ptr + at, mask=(row < rows) & (column < k), other=0))
    value = tl.reshape(value, (BR, BG, G)) * scale[:, :, None]
    column = first + tl.arange(0, BG * G)[None, :]
    out = tl.reshape(value, (BR, BG * G)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * k + column, out, mask=(row < rows) & (column < k))


def decode(
    codes: Tensor, scales: Tensor, blocked: bool, dtype: torch.dtype, factor: float
) -> Tensor:
    """codes · scales · factor; contiguous operands, factor 1/4 with e8m0 scales, else 1."""
    e8m0, four_bits = scales.dtype == torch.float8_e8m0fnu, codes.dtype == torch.uint8
    if factor != (0.25 if e8m0 else 1.0):
        raise ValueError(f"decode: factor={factor} with scales {scales.dtype}")
    rows, k = codes.shape[0], codes.shape[1] * (2 if four_bits else 1)
    groups = k // (32 if e8m0 else 16)
    out = torch.empty(rows, k, dtype=dtype, device=codes.device)
    br, bg = 8, 512 // (32 if e8m0 else 16)
    kernel: Any = _kernel
    if out.numel():
        kernel[(triton.cdiv(rows, br), triton.cdiv(groups, bg))](
            codes.view(torch.uint8),
            scales.view(torch.uint8),
            out,
            rows,
            k,
            groups,
            triton.cdiv(groups, 4),
            FOUR_BITS=four_bits,
            E8M0=e8m0,
            BLOCKED=blocked,
            BR=br,
            BG=bg,
        )
    return out
