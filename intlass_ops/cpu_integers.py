"""Products of integers on a CPU: W8A8, W4A8 and W4A4 through PyTorch's INT8 product.

    sum_k (a - az)(q - z) = a·q - z·sum(a) - az·sum(q) + az·z·count        of every scale group

where a·q and the sums are integers and exact, and what follows is float64: rounded once, at the
end, like reference.py. Not here: floating activations (cpu.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import packing
from .ops.problem import Problem

_BLOCK_ELEMENTS = 1 << 17  # of the result: float64 sums that stay in cache


@functools.cache
def is_exact() -> bool:
    """Whether `torch._int_mm` sums exactly here: a processor without VNNI may add in 16 bits."""
    pairs = torch.tensor([[-128, -128], [127, 127], [-128, 127], [127, -128]], dtype=torch.int8)
    a = pairs.repeat(1, 32)
    try:
        product = torch._int_mm(a, a.T)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product.double(), a.double() @ a.double().T)


def matmul(
    p: Problem,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    a_zero: Tensor | None,
) -> Tensor:
    """float64 [M, N]: a [M, K] int8 codes, w as stored; scales, zeros [1 or N, 1 or G]."""
    m, g = a.shape[0], p.group_size
    out = torch.zeros(m, p.n, dtype=torch.float64)
    if not a.numel() or not p.n:
        return out
    block = max(64, _BLOCK_ELEMENTS // m)
    scales, zeros = scales.double(), None if zeros is None else zeros.double()
    az = None if a_zero is None else a_zero.double()
    groups = [slice(start, start + g) for start in range(0, p.k, g)]
    a_sums = [a[:, k].sum(1, keepdim=True).double() for k in groups] if zeros is not None else []
    for start in range(0, p.n, block):
        rows = slice(start, start + block)
        q = w[rows] if p.w_kind == "s8" else packing.unpack(w[rows], p.k, p.w_kind == "s4")
        for i, k in enumerate(groups):
            sums = _product(a[:, k], q[:, k])
            z = None if zeros is None else _of(zeros, rows, i)
            if z is not None:
                sums -= z * a_sums[i]
            if az is not None:
                count = q[:, k].shape[1]
                q_sums = q[:, k].sum(1).double()
                sums -= az * (q_sums if z is None else q_sums - z * count)
            out[:, rows] += sums.mul_(_of(scales, rows, i))
    return out


def _product(a: Tensor, q: Tensor) -> Tensor:
    """a @ q.T in float64. PyTorch 2.13's product is wrong for one column, or strides along K."""
    if a.shape[1] == 1:
        return a.double() * q.double().T
    return torch._int_mm(a.contiguous(), q.contiguous().T).double()


def _of(table: Tensor, rows: slice, group: int) -> Tensor:
    """The values of some rows in one group."""
    part = table[rows] if table.shape[0] > 1 else table
    return part[:, group if part.shape[1] > 1 else 0]
