"""Readers of the quantised weights users bring: one file a format, all into one canonical form.

`CanonicalWeight` is that form, of integers: w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g] with
g = k // group_size, in the storage the ops take (intlass_ops/packing.py). FP4 is in fp4.py, FP8 in
fp8.py, codes of tables in lut4.py. Not here: models and modules (integrations/).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import IntlassError
from ..ops import dequantize

__all__ = ["CanonicalWeight", "FormatError"]


_ROWS = 1024


class FormatError(IntlassError, ValueError):
    """A file is damaged, or holds something this package does not read. Names file and tensor."""


@dataclass(frozen=True)
class CanonicalWeight:
    """One quantised weight [N, K]. ``zeros`` None: signed codes.

    ``order`` (act-order): column j of the codes belongs to input order[j], so that groups are
    contiguous; the layer computes x[..., order] @ w.T.
    """

    name: str
    codes: Tensor  # uint8 [N, ceil(K/2)] for 4 bits, int8 [N, K] for 8
    scales: Tensor  # [N, K/group_size]
    zeros: Tensor | None  # like scales
    bits: int
    group_size: int
    shape: tuple[int, int]
    order: Tensor | None = None  # int64 [K]

    @property
    def nbytes(self) -> int:
        """What the weight takes in memory, parameters included."""
        tensors = (self.codes, self.scales, self.zeros, self.order)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]: float32 arithmetic, then one rounding to ``dtype``."""
        n, k = self.shape
        dense = torch.empty(n, k, dtype=dtype, device=self.codes.device)
        # In blocks of rows: float32 steps of a whole vocabulary would be several times its size.
        for start in range(0, n, _ROWS):
            rows = slice(start, start + _ROWS)
            zeros = None if self.zeros is None else self.zeros[rows]
            dense[rows] = dequantize(self.codes[rows], self.scales[rows], zeros, k=k, dtype=dtype)
        return dense if self.order is None else dense[:, self.order.argsort()]

    def take_rows(self, order: Tensor) -> CanonicalWeight:
        """The weight with its rows in ``order``; exact, since groups run along K."""
        return replace(
            self,
            codes=self.codes[order],
            scales=self.scales[order],
            zeros=None if self.zeros is None else self.zeros[order],
        )
