"""FP8 weights and what they are exactly.

Not here: tests (test_fp8_linear.py, test_formats_fp8.py), checkpoints (tiny_checkpoints.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass
class Fp8Weight:
    """w[n, k] = e4m3(q[n, k])·s[n // bn, k // bk] with a block of bn rows and bk columns."""

    q: Tensor  # [N, K] bytes
    s: Tensor  # [ceil(N/bn), ceil(K/bk)]
    block: tuple[int, int]

    def codes(self) -> Tensor:
        return self.q.to(torch.uint8).view(E4M3)

    def rows(self) -> Tensor:
        """The scales of each row, [N, ceil(K/bk)]."""
        return self.s.repeat_interleave(self.block[0], 0)[: len(self.q)]

    def exact(self) -> Tensor:
        """In float64, from the format's definition alone."""
        exponent, fraction = self.q % 128 // 8, self.q % 8 / 8
        size = torch.where(exponent == 0, fraction, 1 + fraction).double()  # 0: subnormal
        sign = torch.where(self.q < 128, 1, -1)
        values = sign * size * 2.0 ** (exponent.clamp(min=1) - 7)
        columns = self.rows().double().repeat_interleave(self.block[1], 1)
        return values * columns[:, : values.shape[1]]

    def dense(self) -> Tensor:
        return self.exact().float()


def draw_fp8(
    n: int,
    k: int,
    seed: int,
    *,
    block: tuple[int | None, int | None] = (1, None),
    dtype: torch.dtype = torch.float32,
) -> Fp8Weight:
    """Codes of numbers around 1; sizes of a block that are None are those of the weight."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(n, k, generator=rng).to(E4M3).view(torch.uint8).long()
    bn, bk = block[0] or n, block[1] or k
    s = (torch.rand(-(-n // bn), -(-k // bk), generator=rng) + 0.5) * 0.2
    return Fp8Weight(q, s.to(dtype), (bn, bk))


def all_codes() -> Tensor:
    """Every byte that is a number, 254 of them."""
    every = torch.arange(256)
    return every[every % 128 != 127]
