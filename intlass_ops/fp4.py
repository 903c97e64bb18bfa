"""FP4 element and FP8 scale formats of MXFP4 and NVFP4: codes, values and scale layout.

    format   element          scale    group   value
    MXFP4    e2m1             e8m0       32    decode(q) · 2^(b - 127)
    NVFP4    e2m1             e4m3       16    decode(q) · s / global_scale

    e2m1 code   s e e m  (bit 3 … bit 0)     magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6

Scales are held in torch's own float8_e4m3fn and float8_e8m0fnu. FP4 codes pack two per byte like
INT4 (packing.py), the even element in the low nibble. Not here: how to choose a scale (scales/).
Sources: OCP Microscaling Formats (MX) v1.0; NVIDIA's description of NVFP4 and, for the blocked
layout of scales, of cuBLAS's block-scaled matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

MXFP4_GROUP, NVFP4_GROUP = 32, 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TILE_ROWS, _TILE_COLS = 128, 4


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 value, ties to the even code, saturating at ±6; dtype and NaN are kept."""
    a = x.abs()
    spacing = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0)).to(x.dtype)
    rounded = (torch.round(a / spacing) * spacing).clamp(max=E2M1_MAX)
    return torch.copysign(rounded, x)


def encode_e2m1(x: Tensor) -> Tensor:
    """e2m1 codes of ``x``: uint8 in [0, 15], same shape; the sign of zero is kept.

    Rounds like :func:`round_e2m1`. e2m1 has no NaN: it becomes code 0, and its scale must carry it.
    """
    values = round_e2m1(x)
    a = values.abs()
    # On the grid the code is linear in each binade: 2a up to 2, then a + 2 up to 4, then a/2 + 4.
    code = torch.where(a <= 2, 2 * a, torch.where(a <= 4, a + 2, a / 2 + 4))
    code = torch.where(torch.isnan(x), 0, code).to(torch.uint8)
    return code | (torch.signbit(values) & ~torch.isnan(x)).to(torch.uint8) << 3


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of e2m1 ``codes`` (integers in [0, 15], unchecked), same shape."""
    table = torch.tensor(
        _MAGNITUDES + tuple(-m for m in _MAGNITUDES), dtype=dtype, device=codes.device
    )
    return table[codes.long()]


def encode_e4m3(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn, ties to even, saturating at ±448; NaN stays NaN."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e8m0_floor(x: Tensor) -> Tensor:
    """Largest power of two not above ``x``, as float8_e8m0fnu, clamped to [2^-127, 2^127].

    ``x`` >= 0; anything that has no logarithm to speak of (NaN, infinity) becomes the NaN of e8m0.
    """
    return e8m0_floor_code(x).view(torch.float8_e8m0fnu)


def e8m0_floor_code(x: Tensor) -> Tensor:
    """The bytes of `encode_e8m0_floor`, for compilers that do not know the type."""
    x = x.double()
    exponent = torch.frexp(x).exponent - 1
    exponent = torch.where(x > 0, exponent, -127).clamp(-127, 127)
    return torch.where(torch.isfinite(x), exponent + 127, 255).to(torch.uint8)


def scale_values(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of e4m3, e8m0 or ordinary floating ``scales``.

    e8m0 is decoded by hand: 2^-127 is subnormal in float32, which a device may flush to zero on the
    way, and torch's conversion is not implemented everywhere.
    """
    if scales.dtype != torch.float8_e8m0fnu:
        return scales.to(dtype)
    return e8m0_values(scales.view(torch.uint8)).to(dtype)


def e8m0_values(code: Tensor) -> Tensor:
    """float64 values of e8m0 in its bytes."""
    value = torch.ldexp(torch.ones_like(code, dtype=torch.float64), code.int() - 127)
    return torch.where(code == 255, torch.nan, value)


def as_int8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] and bf16 scales of the same values, exactly.

    ``packed`` uint8 [..., K/2] and ``scales`` [..., K/g], the bytes of e8m0 (g = 32) or of e4m3
    (g = 16). Twice an e2m1 value is an integer, and bf16 has half of every scale.
    """
    k = 2 * packed.shape[-1]
    values = torch.tensor(_MAGNITUDES, device=packed.device) * 2
    values = torch.cat((values, -values)).to(torch.int8)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)  # of each byte
    # On a CPU three times as fast as a look-up by pairs[packed].
    found = pairs.view(torch.int16).flatten().index_select(0, packed.flatten().int())
    codes = found.view(torch.int8).view(*packed.shape[:-1], k)
    if scales.shape[-1] * MXFP4_GROUP == k:
        return codes, (e8m0_values(scales) / 2).to(torch.bfloat16)
    return codes, (scales.view(torch.float8_e4m3fn).float() / 2).to(torch.bfloat16)


def group_size_of(op: str, k: int, groups: int) -> int:
    """32 (MXFP4) or 16 (NVFP4), of a row of K codes with so many scales; else ValueError."""
    for size in (MXFP4_GROUP, NVFP4_GROUP):
        if groups > 0 and groups * size == k:
            return size
    raise ValueError(
        f"{op}: {groups} scales a row of K={k}; MXFP4 has one for {MXFP4_GROUP} codes, NVFP4 for "
        f"{NVFP4_GROUP}"
    )


def e4m3_grid(device: torch.device | None = None) -> Tensor:
    """The 126 positive finite e4m3 values, ascending, float64."""
    codes = torch.arange(1, 127, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).double()


def e8m0_grid(device: torch.device | None = None) -> Tensor:
    """The 255 e8m0 values 2^-127 … 2^127, ascending, float64."""
    exponents = torch.arange(-127, 128, device=device)
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents)


def to_blocked(scales: Tensor) -> Tensor:
    """Row-major scales [R, C] to the blocked order of FP4/FP8 matrix units: 1-D, zero padded.

    R is padded to a multiple of 128 and C to one of 4. The 128×4 tiles follow each other row by
    row; inside a tile element (r, c) lies at (r % 32)·16 + (r // 32)·4 + c.

    >>> scales = torch.ones(100, 3, dtype=torch.float8_e8m0fnu)
    >>> to_blocked(scales).shape  # 128 rows of 4
    torch.Size([512])
    """
    if scales.ndim != 2:
        raise ValueError(f"to_blocked: expected scales [R, C], got shape {tuple(scales.shape)}")
    rows, cols = scales.shape
    raw = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    tiles_r, tiles_c = -(-rows // _TILE_ROWS), -(-cols // _TILE_COLS)
    padded = raw.new_zeros(tiles_r * _TILE_ROWS, tiles_c * _TILE_COLS)
    padded[:rows, :cols] = raw
    # [tile row, r // 32, r % 32, tile column, c] -> [tile row, tile column, r % 32, r // 32, c]
    tiles = padded.view(tiles_r, 4, 32, tiles_c, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def blocked_size(rows: int, cols: int) -> int:
    """Elements of `to_blocked` of scales [rows, cols]."""
    return -(-rows // _TILE_ROWS) * -(-cols // _TILE_COLS) * _TILE_ROWS * _TILE_COLS


def from_blocked(blocked: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of :func:`to_blocked`: row-major [rows, cols] without the padding.

    >>> scales = torch.rand(100, 3)
    >>> torch.equal(from_blocked(to_blocked(scales), 100, 3), scales)
    True
    """
    tiles_r, tiles_c = -(-rows // _TILE_ROWS), -(-cols // _TILE_COLS)
    expected = blocked_size(rows, cols)
    if blocked.numel() != expected:
        raise ValueError(
            f"from_blocked: scales [{rows}, {cols}] fill {expected} elements, got {blocked.numel()}"
        )
    raw = blocked.reshape(-1)
    raw = raw.view(torch.uint8) if blocked.element_size() == 1 else raw
    tiles = raw.view(tiles_r, tiles_c, 32, 4, 4).permute(0, 3, 2, 1, 4)
    flat = tiles.reshape(tiles_r * _TILE_ROWS, tiles_c * _TILE_COLS)
    return flat[:rows, :cols].contiguous().view(blocked.dtype)
