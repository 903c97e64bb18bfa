"""rounding="stochastic": unbiased, decided by seed and index alone, independent between seeds.

Equal on CPU and GPU: test_cuda_ops.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quantize_case import BITS, code_range, codes_of, each_symmetry, each_width, random
from tolerance import assert_identical
from torch import Tensor

from intlass_ops import quantize_int8


def stochastic(x: Tensor, seed: int, bits: int = 8, **options: Any) -> Any:
    return BITS[bits](x, rounding="stochastic", seed=seed, **options)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -7, 2**40 + 3])
def test_stochastic_rounding_is_unbiased(seed: int, fraction: float, device: str) -> None:
    count = 1 << 18
    x = torch.full((count,), 3 + fraction, device=device)
    q = stochastic(x, seed, scale=torch.ones((), device=device)).double()
    assert set(q.unique().tolist()) == {3.0, 4.0}
    deviation = math.sqrt(fraction * (1 - fraction) / count)
    assert abs(q.mean().item() - 3 - fraction) < 4.5 * deviation
    # neighbours are independent: the mean of their products is the product of their means
    up = q - 3 - fraction
    for distance in (1, 2, 64, 4096):
        assert abs((up[distance:] * up[:-distance]).mean().item()) < 4.5 * deviation


def test_stochastic_rounding_of_negative_numbers_is_unbiased(device: str) -> None:
    x = torch.full((1 << 18,), -2.3, device=device)
    q = stochastic(x, 5, scale=torch.ones((), device=device)).double()
    assert set(q.unique().tolist()) == {-3.0, -2.0}
    assert abs(q.mean().item() + 2.3) < 4.5 * math.sqrt(0.21 / (1 << 18))


def test_what_has_a_code_keeps_it(device: str) -> None:
    """Also 127, beside which 1 - 2^-24 of a draw would be rounded up to 1."""
    x = torch.arange(-127.0, 128.0, device=device).repeat_interleave(1 << 12)
    assert_identical(stochastic(x, 1, scale=torch.ones((), device=device)), x.to(torch.int8))


_SEEDS = (*range(32), -1, -2, *(2**i for i in range(5, 63)))


def test_different_seeds_are_independent(device: str) -> None:
    """Seeds in sequence and seeds that differ in one bit."""
    count, one = 1 << 12, torch.ones((), device=device)
    x = torch.full((count,), 0.5, device=device)
    up = torch.stack([stochastic(x, seed, scale=one).double() for seed in _SEEDS]) - 0.5
    correlation = (up @ up.T / count * 4).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(count)
    # Sums over a tensor vary from seed to seed as sums of independent draws do.
    sums = up.sum(dim=1) * 2 / math.sqrt(count)
    assert 0.6 < sums.square().mean() < 1.5
    assert abs(sums.mean()) * math.sqrt(len(_SEEDS)) < 4.5


@each_symmetry
@each_width
def test_stochastic_codes_depend_on_seed_and_index_alone(
    bits: int, symmetric: bool, device: str
) -> None:
    x = random(16, 96).to(device)
    q, scale, zero = stochastic(x, 11, bits, symmetric=symmetric)
    again, _, _ = stochastic(x, 11, bits, symmetric=symmetric)
    assert_identical(again, q)
    head, _, _ = stochastic(x[:5], 11, bits, symmetric=symmetric)
    assert_identical(head, q[:5])
    other, _, _ = stochastic(x, 12, bits, symmetric=symmetric)
    assert not torch.equal(other, q)
    # one of the two neighbours, and the scale of rounding to nearest
    nearest, same_scale, _ = BITS[bits](x, symmetric=symmetric)
    assert_identical(scale, same_scale)
    steps = x.double() / scale.double() + (0 if zero is None else zero.double())
    codes = codes_of(q, 96, bits, symmetric)
    low, high = code_range(bits, symmetric)
    assert ((codes - steps).abs() < 1 + 1e-4).all()
    assert low <= codes.min() <= codes.max() <= high
    assert not torch.equal(nearest, q)


def test_without_a_seed_each_call_draws_anew_from_torch(device: str) -> None:
    x = random(8, 64).to(device)
    torch.manual_seed(3)
    first, second = (quantize_int8(x, rounding="stochastic")[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_identical(quantize_int8(x, rounding="stochastic")[0], first)
