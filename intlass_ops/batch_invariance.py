"""The switch `batch_invariant()`: a row's result does not depend on how many rows there are.

Lives here: the switch, and the product one row at a time for paths that have nothing better. Not
here: what the kernels do about it (config/choice.py on a GPU, cpu.py on a CPU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_depth = 0


def enabled() -> bool:
    return _depth > 0


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """A context in which a row of a product does not depend on M, the number of rows beside it.

    By default the order in which a row of `matmul_int4_bf16_tn` and `matmul_int8_bf16_tn` is
    summed may change with M: another kernel, K split in other parts. With floating activations the
    last bits change with it, so one prompt may get another answer in another batch. Inside this
    context, ``f(x)[i:j]`` equals ``f(x[i:j])`` bit for bit for these ops, for `IntLinear` and for
    linears that ``backend="intlass"`` swapped, on one device and for rows that start on the same
    alignment. The price: a GPU takes one portable kernel, with one tile, for every M and does not
    split K; a CPU fills up to four rows, at least eight.

    Not covered: operators of PyTorch around these, gradients, and the ops on other weights
    (`mixed_mm`, FP4). Process-wide, as other threads may run parts of a graph. A compiled graph
    obeys the context it is called in; a CUDA graph replays what it recorded, so record it inside
    (with ``mode="reduce-overhead"``: make the first calls of every shape inside). For a whole
    process: ``contextlib.ExitStack().enter_context(batch_invariant())``, kept alive.

    >>> from intlass_ops import matmul_int8_bf16_tn
    >>> x, w = torch.randn(9, 256), torch.randint(-128, 128, (32, 256), dtype=torch.int8)
    >>> with batch_invariant():
    ...     rows = [matmul_int8_bf16_tn(x[i : i + 1], w, None, torch.ones(32)) for i in range(9)]
    ...     together = matmul_int8_bf16_tn(x, w, None, torch.ones(32))
    >>> torch.equal(torch.cat(rows), together)
    True
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def each_row(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """f of rows y [..., N] of their own: its loops are vectors and an end, with other roundings."""
    rows = [f(row) for row in y.reshape(-1, y.shape[-1]).unbind()] if y.numel() else []
    return torch.stack(rows).view(y.shape) if rows else y


def row_by_row(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T; the libraries behind `@` choose their order of summation by M."""
    rows = [row @ w.T for row in x.split(1)]
    return torch.cat(rows) if rows else x @ w.T
