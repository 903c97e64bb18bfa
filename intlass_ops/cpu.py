"""Fast CPU GEMM paths (placeholder until the measured ones land)."""

from __future__ import annotations

from torch import Tensor


def matmul_int4_a16(
    a: Tensor, packed_w: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, k: int
) -> Tensor | None:
    return None


def matmul_int8_a16(a: Tensor, b: Tensor, scales: Tensor, group_size: int) -> Tensor | None:
    return None
