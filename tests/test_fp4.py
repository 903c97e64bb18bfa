"""FP4/FP8 codecs over all their codes, and the blocked scale layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intlass_ops import fp4

ALL_CODES = torch.arange(16, dtype=torch.uint8)


def e2m1_value(code: int) -> float:
    """From the definition: sign, two exponent bits with bias 1, one mantissa bit."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def test_e2m1_decode_follows_the_definition() -> None:
    decoded = fp4.decode_e2m1(ALL_CODES)
    assert decoded.tolist() == [e2m1_value(code) for code in range(16)]
    assert torch.signbit(decoded).tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_e2m1_codes_round_trip(dtype: torch.dtype) -> None:
    assert torch.equal(fp4.encode_e2m1(fp4.decode_e2m1(ALL_CODES, dtype)), ALL_CODES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_e2m1_encode_is_nearest_ties_to_even_for_every_16_bit_float(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    codes = fp4.encode_e2m1(x)
    values = fp4.decode_e2m1(ALL_CODES[:8], torch.float64)
    distance = (x.double().abs().clamp(max=1e9)[:, None] - values).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even_first = nearest.double() * torch.tensor([2.0, 1.0] * 4, dtype=torch.float64)
    assert torch.equal((codes & 7).long(), even_first.argmax(-1))
    assert torch.equal(codes >> 3, torch.signbit(x).to(torch.uint8))
    assert torch.equal(fp4.round_e2m1(x), fp4.decode_e2m1(codes, dtype))


def test_e2m1_of_nan_is_zero() -> None:
    nan = torch.tensor([torch.nan, -torch.nan])
    assert fp4.encode_e2m1(nan).tolist() == [0, 0]
    assert fp4.round_e2m1(nan).isnan().all()


def test_e4m3_grid_is_every_positive_finite_code() -> None:
    expected = []
    for code in range(1, 127):
        exponent, mantissa = code >> 3, code & 7
        expected.append(
            mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
    assert fp4.e4m3_grid().tolist() == expected
    assert expected[-1] == fp4.E4M3_MAX


def test_e4m3_encode_is_nearest_ties_to_even_and_saturates() -> None:
    grid = torch.cat([torch.zeros(1, dtype=torch.float64), fp4.e4m3_grid()])
    midpoints = (grid[:-1] + grid[1:]) / 2
    below, above = (torch.nextafter(midpoints.float(), torch.tensor(t)) for t in (0.0, torch.inf))
    code = torch.arange(126, dtype=torch.uint8)
    for x, expected in (
        (grid.float(), torch.arange(127, dtype=torch.uint8)),
        (below, code),
        (above, code + 1),
        (midpoints, code + (code & 1)),
        (torch.tensor([449.0, 480.0, 1e30, torch.inf]), torch.full((4,), 126, dtype=torch.uint8)),
    ):
        assert torch.equal(fp4.encode_e4m3(x).view(torch.uint8), expected)
        assert torch.equal(fp4.encode_e4m3(-x).view(torch.uint8), expected | 0x80)
    assert fp4.encode_e4m3(torch.tensor(torch.nan)).float().isnan()


def test_e8m0_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    scales = codes.view(torch.float8_e8m0fnu)
    values = fp4.scale_values(scales, torch.float64)
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255].isnan()
    assert torch.equal(fp4.e8m0_grid(), values[:255])
    assert torch.equal(fp4.scale_values(scales)[:255].double(), values[:255])
    assert torch.equal(fp4.encode_e8m0_floor(values).view(torch.uint8), codes)
    just_below = torch.nextafter(values[1:255], torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(fp4.encode_e8m0_floor(just_below).view(torch.uint8), codes[:254])


def test_e8m0_floor_of_what_it_cannot_hold() -> None:
    x = torch.tensor([0.0, 1e-60, 1e60, torch.inf, torch.nan], dtype=torch.float64)
    assert fp4.encode_e8m0_floor(x).view(torch.uint8).tolist() == [0, 0, 254, 255, 255]
    # float32 infinity's neighbour and a float32 subnormal are inside the range
    x = torch.tensor([torch.finfo(torch.float32).max, 2.0**-127])
    assert fp4.encode_e8m0_floor(x).view(torch.uint8).tolist() == [254, 0]


@given(rows=st.integers(0, 300), cols=st.integers(0, 11))
def test_blocked_layout_places_and_returns_every_scale(rows: int, cols: int) -> None:
    scales = torch.arange(1, rows * cols + 1, dtype=torch.int32).view(rows, cols)
    blocked = fp4.to_blocked(scales)
    tiles_c = -(-cols // 4)
    expected = torch.zeros_like(blocked)
    for r in range(0, rows, 7):
        for c in range(cols):
            tile = (r // 128) * tiles_c + c // 4
            expected[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    placed = expected != 0
    assert torch.equal(blocked[placed], expected[placed])
    assert blocked.numel() % 512 == 0
    assert int((blocked != 0).sum()) == rows * cols
    assert torch.equal(fp4.from_blocked(blocked, rows, cols), scales)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8])
def test_blocked_layout_keeps_the_scale_dtype(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (130, 5), dtype=torch.int32).to(torch.uint8)
    blocked = fp4.to_blocked(raw.view(dtype))
    assert blocked.dtype == dtype
    assert torch.equal(fp4.from_blocked(blocked, 130, 5).view(torch.uint8), raw)


def test_blocked_layout_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"to_blocked: expected scales \[R, C\], got shape \(3,\)"):
        fp4.to_blocked(torch.zeros(3))
    with pytest.raises(ValueError, match=r"from_blocked: scales \[129, 4\] fill 1024 .* got 512"):
        fp4.from_blocked(torch.zeros(512), 129, 4)
