"""Leaves of a slice as far as a compile may know them: all but their values.

Lives here: `LeafMeta`, and `synthetic`, which makes a leaf of random contents of the kind that its
shape and dtype suggest. Not here: what is measured with them (probing.py, activations.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .fp8 import CODES


@dataclass(frozen=True)
class LeafMeta:
    """What probing needs to know about a leaf: never its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    index_into: int | None  # the leaf is used as an index into a dimension of this size


def synthetic(
    meta: LeafMeta, numel: int, seed: int, device: torch.device, *, small: bool = False
) -> Tensor:
    """Random contents for a leaf: full-range codes, weight-like or scale-like floats.

    small: wide integers too few to be packed codes are zero points, and as many as the weight has
    elements are codes that nobody packed: in [0, 15] both. Bytes too few to be packed codes are
    exponents of scales that float16 holds too, where 127 is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    extent = 1 + sum((s - 1) * t for s, t in zip(meta.shape, meta.stride, strict=True) if s)
    extent = 0 if 0 in meta.shape else extent
    many = 2 * math.prod(meta.shape) >= numel
    if meta.index_into is not None:
        values = torch.arange(extent) * meta.index_into // max(extent, 1)
        flat = values.to(meta.dtype)
    elif meta.dtype == torch.bool:
        flat = torch.randint(0, 2, (extent,), generator=generator).bool()
    elif meta.dtype.is_floating_point and not (many and meta.dtype == CODES):
        if many:
            flat = torch.randn(extent, generator=generator).to(meta.dtype)
        else:
            flat = (torch.rand(extent, generator=generator) + 0.5).to(meta.dtype)
    elif small and _wide_but_small(meta, numel):
        flat = torch.randint(0, 16, (extent,), generator=generator).to(meta.dtype)
    elif small and meta.dtype == torch.uint8 and 16 * math.prod(meta.shape) <= numel:
        flat = torch.randint(120, 136, (extent,), dtype=torch.uint8, generator=generator)
    else:
        bytes_ = torch.randint(
            0, 256, (extent * meta.dtype.itemsize,), dtype=torch.uint8, generator=generator
        )
        # No byte may look like the exponent of an infinity: scales are often stored as bytes. Nor
        # is one a NaN of FP8.
        bytes_ = torch.where((bytes_ & 0x7C) == 0x7C, bytes_ ^ 0x40, bytes_)
        flat = bytes_.view(meta.dtype)
    return flat.to(device).as_strided(meta.shape, meta.stride)


def _wide_but_small(meta: LeafMeta, numel: int) -> bool:
    few = meta.dtype.itemsize >= 4 and 16 * math.prod(meta.shape) <= numel
    # int8 and FP8 stay what they are: weights of 8 bits.
    return few or (meta.dtype not in (torch.int8, CODES) and math.prod(meta.shape) >= numel)
