"""`StoredWeight`: a quantised weight that is known but not yet read.

Lives here: what all formats share on the way to `CanonicalWeight`: zero points that vanish into
signed codes, act-order as a permutation, groups checked. Not here: the formats' bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import packing
from ..ops.problem import GROUP_STEP
from . import CanonicalWeight
from .checkpoint import Layer

_ZERO_DTYPES = {4: torch.uint8, 8: torch.int16}


@dataclass(frozen=True)
class StoredWeight:
    """Shape and parameters of a weight; ``read()`` brings its codes.

    ``zeros`` None: signed codes. Otherwise they are those of unsigned codes; ``read()`` gives 8-bit
    codes as int8 all the same, 128 below the unsigned ones.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    scales: Tensor  # [N, K/group_size]
    zeros: Tensor | None
    order: Tensor | None
    read: Callable[[], Tensor]

    @property
    def group_size(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    def load(self) -> CanonicalWeight:
        """The weight with its codes."""
        zeros = self.zeros
        if zeros is not None and self.bits == 8:
            zeros = (zeros.float() if zeros.is_floating_point() else zeros) - 128
        return CanonicalWeight(
            self.name,
            self.read(),
            self.scales,
            zeros,
            self.bits,
            self.group_size,
            self.shape,
            self.order,
        )


def group_size_of(layer: Layer, k: int, groups: int) -> int:
    """K / groups, refused where our ops do not take it."""
    if k % groups:
        raise layer.fail(f"K={k} is not a multiple of its {groups} groups")
    size = k // groups
    if groups > 1 and size % GROUP_STEP:
        raise layer.fail(f"group_size={size} is not a multiple of {GROUP_STEP}")
    return size


def act_order(layer: Layer, groups_of_k: Tensor, groups: int) -> Tensor | None:
    """The permutation that makes the groups of ``groups_of_k`` [K] contiguous; None if they are."""
    k = groups_of_k.numel()
    size = group_size_of(layer, k, groups)
    index = groups_of_k.long()
    if bool((index < 0).any()) or bool((index >= groups).any()):
        raise layer.fail(f"g_idx points outside the {groups} groups")
    if groups == 1 or torch.equal(index, torch.arange(k) // size):
        return None
    counts = torch.bincount(index, minlength=groups)
    if bool((counts != size).any()):
        raise layer.fail(
            f"g_idx gives group {int((counts != size).nonzero()[0])} another number of inputs than "
            f"group_size={size}"
        )
    return index.argsort(stable=True)


def unsigned(
    name: str,
    bits: int,
    shape: tuple[int, int],
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    codes: Callable[[], Tensor],
) -> StoredWeight:
    """From ``codes()``: uint8 [N, K/2] (4 bits, our packing) or [N, K], unsigned, not yet ordered.

    ``zeros`` [N, G] of the unsigned codes, integer or floating; None: the middle, 2^(bits-1). If
    all are the middle the codes become signed and the zeros vanish; nothing is rounded either way.
    """
    middle = 1 << (bits - 1)
    signed = zeros is None or bool((zeros == middle).all())

    def read() -> Tensor:
        q = codes()
        if order is not None:
            if bits == 4:
                q = packing.pack(packing.unpack(q, shape[1], signed=False)[:, order])
            else:
                q = q[:, order]
        # Minus the middle in two's complement is the top bit flipped.
        if bits == 8:
            return (q ^ 0x80).view(torch.int8)
        return q ^ _odd_end(shape[1], q) if signed else q.contiguous()

    kept = None
    if zeros is not None and not signed:
        kept = zeros if zeros.is_floating_point() else zeros.to(_ZERO_DTYPES[bits])
    return StoredWeight(name, bits, shape, scales, kept, order, read)


def _odd_end(k: int, q: Tensor) -> Tensor:
    """0x88 for each byte; an odd K leaves the last high nibble zero."""
    flip = torch.full((q.shape[1],), 0x88, dtype=torch.uint8)
    if k % 2:
        flip[-1] = 0x08
    return flip


def fields(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] to its fields, lowest first: uint8 [..., n * 32 / bits].

    Of 3 bits they run on from word to word: n is a multiple of 3.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    if bits == 3:
        return _of_three_bits(octets)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((octets.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _of_three_bits(octets: Tensor) -> Tensor:
    """Eight fields of each three bytes; the third and the sixth are in two of them."""
    a, b, c = octets.unflatten(-1, (-1, 3)).unbind(-1)
    eight = (a, a >> 3, (a >> 6) | (b << 2), b >> 1, b >> 4, (b >> 7) | (c << 1), c >> 2, c >> 5)
    return (torch.stack(eight, -1) & 7).flatten(-2)
