"""Orthogonal rotations that spread outliers before quantisation: Hadamard matrices and products.

A rotation h [R, R] acts on consecutive blocks of R features, x.view(-1, R) @ h; with h orthogonal,
(x h)(w h)ᵀ = x wᵀ, so activations and weights may be rotated alike. Not here: quantisation.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .ops._library import without_autocast

_Matrix = npt.NDArray[np.int8]


def hadamard_matrix(
    n: int,
    *,
    normalized: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Hadamard matrix [n, n]: entries ±1/√n and h @ h.T = 1, or ±1 where not ``normalized``.

    n is a power of two (SciPy's, symmetric), or 2^j·m with m of one of Paley's constructions: m - 1
    a prime of the form 4i + 3, or m/2 - 1 a prime of the form 4i + 1. These are 12, 20, 24, 28, 36,
    … and with them the widths of common models (576, 1536, 5120, 11008, 13824, 14336, 28672).
    ValueError for any other n.

    >>> hadamard_matrix(2, normalized=False)
    tensor([[ 1.,  1.],
            [ 1., -1.]])
    >>> hadamard_matrix(576).shape  # 2^4 · 36
    torch.Size([576, 576])
    """
    power, odd = _factors(n)
    matrix = np.kron(_sylvester(power), odd)
    h = torch.from_numpy(matrix).to(dtype=torch.float64, device=device)
    return (h / math.sqrt(n) if normalized else h).to(dtype)


def rotate(x: Tensor, h: Tensor) -> Tensor:
    """x.view(-1, R) @ h for x [..., K], h [R, R], K a multiple of R; float32 sums, x's dtype.

    TypeError unless both are floating, ValueError for sizes or devices that do not fit.

    >>> rotate(torch.tensor([8.0, 0.0, 0.0, 0.0]), hadamard_matrix(4))
    tensor([4., 4., 4., 4.])
    """
    _require_floating("rotate", x=x, h=h)
    r = h.shape[0]
    if h.shape != (r, r) or r == 0 or x.shape[-1] % r:
        raise ValueError(
            f"rotate: a rotation {tuple(h.shape)} does not fit K={x.shape[-1]}; "
            "it must be [R, R] with R dividing K"
        )
    if h.device != x.device:
        raise ValueError(f"rotate: h is on {h.device}, the input on {x.device}")
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        return (x.to(wide).reshape(-1, r) @ h.to(wide)).view(x.shape).to(x.dtype)


def hadamard_transform(x: Tensor) -> Tensor:
    """x @ hadamard_matrix(K) for x [..., K] in O(K·(log K + m)) a row, K = 2^j·m; x's dtype.

    TypeError unless x is floating, ValueError for a K that no construction is known for.

    >>> hadamard_transform(torch.tensor([8.0, 0.0, 0.0, 0.0]))
    tensor([4., 4., 4., 4.])
    """
    _require_floating("hadamard_transform", x=x)
    k = x.shape[-1]
    _, odd = _factors(k)
    wide = torch.promote_types(x.dtype, torch.float32)
    m = odd.shape[0]
    y = x.to(wide)
    if m > 1:
        with without_autocast(x.device):
            y = y.reshape(-1, m) @ torch.from_numpy(odd).to(x.device, wide)
    half = m
    while half < k:
        a, b = y.reshape(x.numel() // (2 * half), 2, half).unbind(1)
        y = torch.stack((a + b, a - b), 1)
        half *= 2
    return (y.reshape(x.shape) / math.sqrt(k)).to(x.dtype)


def _require_floating(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if (
            t.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            or not t.ndim
        ):
            raise TypeError(
                f"{op}: {name} is {t.dtype} {tuple(t.shape)}; expected floating [..., K]"
            )


def _sylvester(power: int) -> _Matrix:
    import scipy.linalg  # here, so that a checkout without SciPy still imports

    matrix: _Matrix = scipy.linalg.hadamard(power, dtype=np.int8)
    return matrix


@lru_cache(maxsize=64)
def _factors(n: int) -> tuple[int, _Matrix]:
    """(2^j, matrix [m, m]) with n = 2^j·m and the smallest m that has a construction."""
    if n < 1:
        raise ValueError(f"hadamard_matrix: n={n} is not positive")
    power = n & -n
    while power:
        m = n // power
        matrix = _paley(m)
        if matrix is not None:
            return power, matrix
        power //= 2
    raise ValueError(f"hadamard_matrix: no construction is known here for n={n}")


def _paley(m: int) -> _Matrix | None:
    """Hadamard matrix of order m = 1, q + 1 or 2(q + 1), q prime; None where there is none."""
    if m == 1:
        return np.ones((1, 1), dtype=np.int8)
    if m % 4:
        return None
    if _is_prime(m - 1):
        return _bordered_residues(m - 1, -1) + np.eye(m, dtype=np.int8)
    q = m // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        conference = _bordered_residues(q, 1)
        diagonal = np.eye(q + 1, dtype=np.int8)
        return np.kron(conference, np.array([[1, 1], [1, -1]], dtype=np.int8)) + np.kron(
            diagonal, np.array([[1, -1], [-1, -1]], dtype=np.int8)
        )
    return None


def _bordered_residues(q: int, sign: int) -> _Matrix:
    """Quadratic characters χ(i - j) mod q, bordered by ones (and ``sign`` in the first column)."""
    character = np.full(q, -1, dtype=np.int8)
    character[(np.arange(q, dtype=np.int64) ** 2) % q] = 1
    character[0] = 0
    i = np.arange(q)
    matrix = np.zeros((q + 1, q + 1), dtype=np.int8)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = character[(i[:, None] - i[None, :]) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
