"""What the tests of the quantisers share: widths, symmetries, and how to read the codes."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from intlass_ops import quantize_int4, quantize_int8

BITS = {8: quantize_int8, 4: quantize_int4}
each_width = pytest.mark.parametrize("bits", [8, 4], ids="int{}".format)
each_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    if symmetric:
        return (-127, 127) if bits == 8 else (-7, 7)
    return (-128, 127) if bits == 8 else (0, 15)


def codes_of(q: Tensor, k: int, bits: int, symmetric: bool) -> Tensor:
    """int64 codes of what the quantiser returned."""
    assert q.dtype == (torch.int8 if bits == 8 else torch.uint8)
    return q.long() if bits == 8 else oracle.unpack(q, k, symmetric)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
