"""The stored weights of single experts as one layer of all of them; nothing is rounded.

Not here: which weights belong together (integrations/expert_checkpoints.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..lowering.storage import INT4, INT8
from ..nn import Activation
from . import FormatError
from .layers import LayerSpec
from .stored import StoredWeight


def stacked(
    name: str, parts: Sequence[Sequence[StoredWeight]], activation: Activation
) -> tuple[LayerSpec, dict[str, Callable[[], Tensor]]]:
    """Spec of an `IntExpertLinear`, and how to get each of its tensors.

    ``parts``: for each piece of N (gate, up), the weights of all experts.

    Raises FormatError where experts differ in shape, bits or groups, or need a form that only
    single linears have (act-order, 8 bits with zero points).
    """
    every = [stored for row in parts for stored in row]
    first = every[0]
    for stored in every:
        alike = (stored.bits, stored.shape[1], stored.scales.shape[1], stored.scales.dtype)
        if alike != (first.bits, first.shape[1], first.scales.shape[1], first.scales.dtype):
            raise FormatError(f"{name}: {first.name} and {stored.name} are not stored alike")
        if stored.order is not None or (stored.bits == 8 and stored.zeros is not None):
            raise FormatError(
                f"{stored.name}: act-order and 8-bit zero points are not read for experts"
            )
    for row in parts:
        if len(row) != len(parts[0]) or any(stored.shape != row[0].shape for stored in row):
            raise FormatError(f"{name}: the experts differ in number or shape")
    experts, k = len(parts[0]), first.shape[1]
    if first.bits == 4 and k % 2:
        raise FormatError(f"{name}: K={k} is odd")
    n = sum(row[0].shape[0] for row in parts)
    signed = all(stored.zeros is None for stored in every)
    zero_types = {stored.zeros.dtype for stored in every if stored.zeros is not None}
    zero_type = torch.float32 if len(zero_types) > 1 else next(iter(zero_types), torch.uint8)

    def codes_of(stored: StoredWeight) -> Tensor:
        # Signed codes among unsigned ones: eight more, in both nibbles, is the top bit flipped.
        codes = stored.read()
        return codes if signed or stored.zeros is not None else codes ^ 0x88

    def zeros_of(stored: StoredWeight) -> Tensor:
        if stored.zeros is None:
            return torch.full(stored.scales.shape, 8, dtype=zero_type)
        return stored.zeros.to(zero_type)

    def gathered(get: Callable[[StoredWeight], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([torch.stack([get(s) for s in row]) for row in parts], dim=1)

    code_type, width = (torch.uint8, k // 2) if first.bits == 4 else (torch.int8, k)
    groups = first.scales.shape[1]
    tensors = [
        ("weight", code_type, (experts, n, width)),
        ("scales", first.scales.dtype, (experts, n, groups)),
    ]
    read = {"weight": gathered(codes_of), "scales": gathered(lambda stored: stored.scales)}
    if not signed:
        tensors.append(("zeros", zero_type, (experts, n, groups)))
        read["zeros"] = gathered(zeros_of)
    kind = INT4 if first.bits == 4 else INT8
    return LayerSpec(kind, k, activation, tuple(tensors)), read
