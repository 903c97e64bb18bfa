"""Quotients from a reciprocal in two parts (quantize.cu, rotate_codes.cuh) round as division does.

With high = 1 / d and low = (1 - high·d)·high, each rounded, x·high + x·low is x / d but for a
factor of 1 ± 3·2^-48, before its only rounding that matters. The integer next to it is then another
than that of the rounded x / d only where x / d comes so close to the middle between two floats, one
of which is half an integer. There are few such pairs, and all are tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from fractions import Fraction

import oracle
import pytest
import torch

from intlass_ops import quantize_int8


def exponent_of(v: Fraction) -> int:
    guess = v.numerator.bit_length() - v.denominator.bit_length()
    return guess if v >= Fraction(2) ** guess else guess - 1


def rounded(v: Fraction) -> Fraction:
    """The float32 next to v > 0, ties to even, whatever its exponent."""
    ulp = Fraction(2) ** (exponent_of(v) - 23)
    return round(v / ulp) * ulp


def close_pairs() -> Iterator[tuple[int, int, Fraction]]:
    """(x, d, m): mantissas of 24 bits, and the middle m that x / d is within 2^-46 of.

    m = odd / 2^j, and odd·d is a number of up to 49 bits whose last ones x does not have: they are
    zeros but for 3·2^-48 of the number.
    """
    for k, above, bits in itertools.product(range(256), (True, False), (24, 25, 26)):
        half = Fraction(2 * k + 1, 2)
        ulp = Fraction(2) ** (exponent_of(half) - 23 - (half == Fraction(1, 2) and not above))
        middle = half + ulp / 2 if above else half - ulp / 2
        odd = middle.numerator
        inverse = pow(odd, -1, 2**bits)
        for rest in range(-8, 9):
            for d in range(rest * inverse % 2**bits, 2**24, 2**bits):
                x = (odd * d - rest) >> bits
                if d >= 2**23 and 2**23 <= x < 2**24:
                    yield x, d, middle


def quotient(x: Fraction, d: Fraction | int, high: Fraction) -> Fraction:
    """x / d as the kernels compute it."""
    rest = 1 - high * d
    low = rounded(rounded(abs(rest)) * high) * (1 if rest > 0 else -1) if rest else 0
    product = rounded(abs(x * low)) * (1 if low > 0 else -1) if low else 0
    return rounded(x * high + product)


def test_quotients_round_as_division_does() -> None:
    """Below 256; but for one divisor, which quantize.cu excepts."""
    wrong, tried = [], 0
    for x, d, middle in close_pairs():
        tried += 1
        power = exponent_of(middle * d / x * Fraction(3, 2))
        scaled = x * Fraction(2) ** power
        found, exact = quotient(scaled, d, rounded(Fraction(1, d))), rounded(scaled / d)
        if round(found) != round(exact):
            wrong.append((x, d))
    assert tried > 2000
    assert wrong == [(2**23, 2**24 - 1)]


def test_quotients_by_e4m3_need_no_rounded_reciprocal() -> None:
    """A d of four bits leaves every quotient a 30th of a unit from where rounding changes."""
    draw = random.Random(0)
    for d, off in itertools.product(range(8, 16), (-2, -1, 0, 1, 2)):
        high = rounded(Fraction(1, d)) + off * Fraction(1, 2**26)
        for x in (2**23, 2**24 - 1, *(draw.randrange(2**23, 2**24) for _ in range(200))):
            assert quotient(Fraction(x), d, high) == rounded(Fraction(x, d)), (x, d, off)


@pytest.mark.parametrize("rows", [1, 2000])
def test_the_divisor_that_is_excepted(rows: int, device: str) -> None:
    scale = 2 - 2.0**-23
    x = torch.zeros(rows, 8)
    x[:, 0], x[:, 1], x[:, 2] = 127 * scale, 1, -1
    expected = oracle.quantize(x, 8)
    assert expected.scale[0] == scale
    assert expected.codes[0, 1] == 1  # 1 / scale is .50000003
    q, got_scale, _ = quantize_int8(x.to(device))
    assert torch.equal(got_scale.cpu().flatten(), expected.scale.flatten())
    assert torch.equal(q.cpu(), expected.codes.to(torch.int8))
