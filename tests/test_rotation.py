"""Hadamard matrices are Hadamard, and every way of applying them is the matrix product."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from intlass_ops.rotation import hadamard_matrix, hadamard_transform, rotate


@pytest.mark.parametrize("n", [1, 2, 16, 32, 64, 128, 256])
def test_power_of_two_is_scipys(n: int) -> None:
    h = hadamard_matrix(n, normalized=False, dtype=torch.int32)
    assert torch.equal(h, torch.from_numpy(scipy.linalg.hadamard(n)).int())
    assert torch.equal(h, h.T)


@pytest.mark.parametrize("n", [12, 20, 24, 28, 36, 44, 48, 60, 108, 576, 768, 1536])
def test_other_orders_are_hadamard(n: int) -> None:
    h = hadamard_matrix(n, normalized=False, dtype=torch.float64)
    assert set(h.unique(sorted=True).tolist()) == {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("k", [5120, 8192, 11008, 13824, 14336, 28672])
def test_widths_of_common_models_have_a_transform(k: int) -> None:
    x = torch.randn(2, k, dtype=torch.float64)
    y = hadamard_transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    spike = torch.zeros(1, k, dtype=torch.float64)
    spike[0, 1] = 1.0
    torch.testing.assert_close(hadamard_transform(spike).abs(), torch.full_like(spike, k**-0.5))


def test_normalized_is_orthogonal() -> None:
    for n in (64, 12):
        h = hadamard_matrix(n, dtype=torch.float64)
        torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64))


@given(n=st.sampled_from([1, 2, 8, 12, 20, 24, 56, 64, 72, 144]), rows=st.integers(0, 3))
def test_transform_is_the_matrix_product(n: int, rows: int) -> None:
    x = torch.randint(-9, 10, (rows, 2, n)).double()
    whole = hadamard_transform(x) * n**0.5
    expected = x @ hadamard_matrix(n, normalized=False, dtype=torch.float64)
    torch.testing.assert_close(whole, expected)


def test_rotate_leaves_products_alone_and_rounds_once() -> None:
    h = hadamard_matrix(32)
    x, w = torch.randn(5, 128), torch.randn(7, 128)
    torch.testing.assert_close(rotate(x, h) @ rotate(w, h).T, x @ w.T, rtol=1e-4, atol=1e-4)
    half = x.to(torch.bfloat16)
    assert torch.equal(rotate(half, h), rotate(half.float(), h).to(torch.bfloat16))
    blockwise = torch.cat([part @ h for part in x.split(32, dim=-1)], -1)
    torch.testing.assert_close(rotate(x, h), blockwise)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 52, 92, 102])
def test_orders_without_a_construction_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"hadamard_matrix: .*n={n}"):
        hadamard_matrix(n)


@pytest.mark.parametrize("shape", [(32, 16), (48, 48), (0, 0)])
def test_rotate_names_the_shapes(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"rotate: a rotation \(\d+, \d+\) does not fit K=64"):
        rotate(torch.zeros(2, 64), torch.zeros(shape))


@pytest.mark.parametrize("x", [torch.ones(2, 64, dtype=torch.int8), torch.tensor(1.0)])
def test_only_floating_tensors_are_rotated(x: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="rotate: x is torch"):
        rotate(x, torch.eye(16))
    with pytest.raises(TypeError, match="hadamard_transform: x is torch"):
        hadamard_transform(x)


@pytest.mark.parametrize("k", [64, 12 * 4])
def test_autocast_rounds_no_rotation(k: int) -> None:
    x, h = torch.randn(3, k), hadamard_matrix(k)
    expected = rotate(x, h), hadamard_transform(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x, h), expected[0])
        assert torch.equal(hadamard_transform(x), expected[1])
