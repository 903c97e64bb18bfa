"""`StoredLut4`: the weight of a linear in codes of a table (lut4.py), known but not yet read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lut4_linear import Lut4Linear


@dataclass(frozen=True)
class StoredLut4:
    """Shape of a weight and of its scales; ``read()`` and ``read_scales()`` bring them.

    Codes and scales are those of a `Lut4Linear`.
    """

    name: str
    table: str
    shape: tuple[int, int]
    groups: int
    scale_dtype: torch.dtype
    read: Callable[[], Tensor]
    read_scales: Callable[[], Tensor]

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.groups

    def load(self) -> Lut4Linear:
        """The weight with its codes."""
        return Lut4Linear(self.read(), self.read_scales(), table=self.table)
