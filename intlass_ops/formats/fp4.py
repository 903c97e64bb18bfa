"""`StoredFp4`: the FP4 weight of a linear that is known but not yet read, MXFP4 or NVFP4.

Lives here: what compressed-tensors and ModelOpt have in common, tensor by tensor. Not here: which
layers are FP4 (their readers), experts (experts.py; those of gpt-oss: mxfp4.py), what an
`Fp4Linear` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fp4_linear import GROUPS, MXFP4, NVFP4, Fp4Linear
from .checkpoint import CACHE_SCALES, Layer

# What a file's scales are stored as.
_STORED = {MXFP4: torch.uint8, NVFP4: torch.float8_e4m3fn}


@dataclass(frozen=True)
class StoredFp4:
    """Shape and second scale of a weight; ``read()`` and ``read_scales()`` bring the rest.

    Codes and scales are the bytes that an `Fp4Linear` holds.
    """

    name: str
    kind: str  # "mxfp4" or "nvfp4"
    shape: tuple[int, int]
    global_scale: Tensor | None  # float32 []
    read: Callable[[], Tensor]
    read_scales: Callable[[], Tensor]

    @property
    def group_size(self) -> int:
        return GROUPS[self.kind]

    def load(self) -> Fp4Linear:
        """The weight with its codes."""
        return Fp4Linear(self.read(), self.read_scales(), self.global_scale)


@dataclass(frozen=True)
class Names:
    """What a library calls the tensors of a layer."""

    codes: str
    scales: str
    global_scale: str
    divides: bool  # whether weights are divided by it
    inputs: str  # scale of quantised activations, which stay in 16 bits here


def stored(layer: Layer, kind: str, names: Names) -> StoredFp4:
    """The weight of ``layer``, everything about it checked by the headers.

    FormatError for a tensor that does not fit, is missing, or has no meaning here.
    """
    n, width = layer.shape(names.codes, 2, (torch.uint8,))
    k, group = 2 * width, GROUPS[kind]
    if k % group:
        raise layer.fail(f"K={k} is not a multiple of {group}")
    groups = n, k // group
    layer.require(names.scales, groups, (_STORED[kind],))
    known = {names.codes, names.scales, names.inputs, "bias", *CACHE_SCALES}
    if kind == NVFP4:
        known.add(names.global_scale)
    more = sorted(layer.checkpoint.parts[layer.path] - known)
    if more:
        raise layer.fail(f"{', '.join(more)} of an FP4 layer: this is not read")

    return StoredFp4(
        layer.path,
        kind,
        (n, k),
        _global_scale(layer, names) if kind == NVFP4 else None,
        lambda: layer.take(names.codes, (n, width), (torch.uint8,)),
        lambda: take_scales(layer, names.scales, groups, kind),
    )


def take_scales(layer: Layer, name: str, shape: Sequence[int], kind: str) -> Tensor:
    """Scales as their bytes; FormatError for a NaN, which would hide in the sums of a row."""
    octets = layer.take(name, shape, (_STORED[kind],)).view(torch.uint8)
    # e8m0 has one, e4m3 one of each sign.
    nan = octets == 255 if kind == MXFP4 else (octets & 127) == 127
    if bool(nan.any()):
        raise layer.fail(f"{name} holds a NaN; the file is damaged")
    return octets


def _global_scale(layer: Layer, names: Names) -> Tensor:
    """What weights are multiplied by: of a divisor the reciprocal, rounded to float32."""
    header = layer.checkpoint.tensors.get(f"{layer.path}.{names.global_scale}")
    shape = (1,) if header is None or header.shape else ()
    value = layer.scales(names.global_scale, shape).double().reshape(())
    scale = (1 / value if names.divides else value).float()
    if not bool(torch.isfinite(scale)):
        raise layer.fail(f"{names.global_scale} is {value.item()}; the file is damaged")
    return scale
