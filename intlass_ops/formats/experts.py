"""The stored weights of single experts as one layer of all of them; nothing is rounded.

Not here: which weights belong together (integrations/expert_checkpoints.py), experts that a file
has fused already (mxfp4.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..fp8_linear import FP8
from ..lowering.storage import INT4, INT4_PAIR, INT8
from ..nn import Activation
from ..ops.problem import GROUP_STEP
from ..packing import packed_size
from . import FormatError
from .fp4 import StoredFp4
from .fp8 import StoredFp8
from .layers import AnyStored, LayerSpec, fp4_spec, fp8_spec, half
from .lut4 import StoredLut4
from .stored import StoredWeight

_Stored = TypeVar("_Stored", StoredWeight, StoredFp4, StoredFp8)
# For each piece of N (gate, up), the weights of all experts.
_Parts = Sequence[Sequence[_Stored]]
_Read = dict[str, Callable[[], Tensor]]


def stacked(
    name: str,
    parts: Sequence[Sequence[AnyStored]],
    activation: Activation,
    alternating: bool = False,
) -> tuple[LayerSpec, _Read]:
    """Spec of an `IntExpertLinear` or its kin of FP4 or FP8, and how to get each of its tensors.

    ``parts``: for each piece of N (gate, up), the weights of all experts. ``alternating``: rows of
    the pieces take turns (gate, up, gate, …), where else one piece follows the other.

    Raises FormatError where experts differ in shape, bits or groups, or need a form that only
    single linears have (act-order).
    """
    _check_alike(name, parts)
    if isinstance(parts[0][0], StoredLut4):
        raise FormatError(f"{name}: experts in {parts[0][0].table} are not read")
    if alternating and len({row[0].shape for row in parts}) > 1:
        raise FormatError(f"{name}: gate and up, whose rows alternate, differ in shape")
    integers = [[each for each in row if isinstance(each, StoredWeight)] for row in parts]
    if any(integers):
        return _integers(name, integers, activation, alternating)
    fp8 = [[each for each in row if isinstance(each, StoredFp8)] for row in parts]
    if any(fp8):
        return _fp8(name, fp8, alternating)
    fp4 = [[each for each in row if isinstance(each, StoredFp4)] for row in parts]
    return _fp4(name, fp4, alternating)


def _check_alike(name: str, parts: Sequence[Sequence[AnyStored]]) -> None:
    first = parts[0][0]
    for row in parts:
        for stored in row:
            if _form(stored) != _form(first):
                raise FormatError(f"{name}: {first.name} and {stored.name} are not stored alike")
    for row in parts:
        if len(row) != len(parts[0]) or any(stored.shape != row[0].shape for stored in row):
            raise FormatError(f"{name}: the experts differ in number or shape")


def _form(stored: AnyStored) -> tuple[Any, ...]:
    """All of a weight that is the same in the whole layer, but for the number of rows."""
    if isinstance(stored, StoredFp4):
        return stored.kind, stored.shape[1]
    if isinstance(stored, StoredFp8):  # groups may differ
        return FP8, stored.shape[1]
    if isinstance(stored, StoredLut4):
        return stored.table, stored.shape[1]
    return stored.bits, stored.shape[1], stored.scales.shape[1], stored.scales.dtype


def _fp4(name: str, parts: _Parts[StoredFp4], alternating: bool) -> tuple[LayerSpec, _Read]:
    scales = [[each.global_scale for each in row if each.global_scale is not None] for row in parts]
    by_piece = any(row != scales[0] for row in scales)
    rows = {row[0].shape[0] for row in parts}
    if by_piece and alternating:
        raise FormatError(f"{name}: gate and up, whose rows alternate, have other global scales")
    if by_piece and len(rows) > 1:
        raise FormatError(
            f"{name}: gate and up have other global scales, and other sizes: {sorted(rows)} rows"
        )
    spec = fp4_spec(parts[0][0].kind, _shape(parts), len(parts) if by_piece else 1)
    read = _gathered(
        spec,
        parts,
        {"weight": lambda stored: stored.read(), "scales": lambda stored: stored.read_scales()},
        alternating,
    )
    if scales[0]:
        every = torch.stack([torch.stack(row) for row in scales], 1)
        read["global_scale"] = lambda: every if by_piece else every[:, 0].contiguous()
    return spec, read


def _fp8(name: str, parts: _Parts[StoredFp8], alternating: bool) -> tuple[LayerSpec, _Read]:
    """Scales of the smallest groups that all experts have: others are repeated."""
    every, (experts, n, k) = [stored for row in parts for stored in row], _shape(parts)
    groups = math.lcm(*(stored.groups for stored in every))
    if k % groups or (groups > 1 and k // groups % GROUP_STEP):
        sizes = sorted({stored.group_size for stored in every})
        raise FormatError(f"{name}: the experts differ in their groups: {sizes}")
    dtype = functools.reduce(torch.promote_types, (stored.scale_dtype for stored in every))
    spec = fp8_spec((experts, n, k), groups, dtype)

    def scales_of(stored: StoredFp8) -> Tensor:
        return stored.read_scales().repeat_interleave(groups // stored.groups, 1)

    of_one: dict[str, Callable[[StoredFp8], Tensor]] = {
        "weight": lambda stored: stored.read(),
        "scales": scales_of,
    }
    return spec, _gathered(spec, parts, of_one, alternating)


def _integers(
    name: str, parts: _Parts[StoredWeight], activation: Activation, alternating: bool
) -> tuple[LayerSpec, _Read]:
    every = [stored for row in parts for stored in row]
    for stored in every:
        if stored.order is not None:
            raise FormatError(f"{stored.name}: act-order is not read for experts")
    first, (experts, n, k) = every[0], _shape(parts)
    if first.bits == 4 and k % 2:
        raise FormatError(f"{name}: K={k} is odd")
    signed = all(stored.zeros is None for stored in every)
    zero_types = {stored.zeros.dtype for stored in every if stored.zeros is not None}
    zero_type = torch.float32 if len(zero_types) > 1 else next(iter(zero_types), torch.uint8)
    if first.bits == 8 and not signed:
        if activation is not None:
            raise FormatError(f"{name}: 8-bit zero points with quantised activations")
        return _halves(parts, zero_type, alternating)

    def codes_of(stored: StoredWeight) -> Tensor:
        # Signed codes among unsigned ones: eight more, in both nibbles, is the top bit flipped.
        codes = stored.read()
        return codes if signed or stored.zeros is not None else codes ^ 0x88

    code_type, width = (torch.uint8, k // 2) if first.bits == 4 else (torch.int8, k)
    groups = first.scales.shape[1]
    tensors = [
        ("weight", code_type, (experts, n, width)),
        ("scales", first.scales.dtype, (experts, n, groups)),
    ]
    of_one = {"weight": codes_of, "scales": lambda stored: stored.scales}
    if not signed:
        tensors.append(("zeros", zero_type, (experts, n, groups)))
        of_one["zeros"] = lambda stored: _zeros_of(stored, zero_type)
    spec = LayerSpec(INT4 if first.bits == 4 else INT8, k, activation, tuple(tensors))
    return spec, _gathered(spec, parts, of_one, alternating)


def _zeros_of(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Of signed codes, those of the unsigned ones."""
    if stored.zeros is None:
        return torch.full(stored.scales.shape, 1 << stored.bits - 1, dtype=dtype)
    return stored.zeros.to(dtype)


def _halves(
    parts: _Parts[StoredWeight], zero_type: torch.dtype, alternating: bool
) -> tuple[LayerSpec, _Read]:
    """An `IntExpertPairLinear` of 8-bit codes, of which all are signed: 128 less."""
    (experts, n, k), groups = _shape(parts), parts[0][0].scales.shape[1]
    tensors = (
        ("weight", torch.uint8, (experts, 2, n, packed_size(k))),
        ("scales", torch.float32, (experts, 2, n, groups)),
        ("zeros", zero_type, (experts, 2, n, groups)),
    )
    of_one: dict[str, Callable[[StoredWeight], Tensor]] = {
        "weight": lambda stored: torch.stack([half(stored.read(), shift) for shift in (0, 4)]),
        "scales": lambda stored: stored.scales.float() * torch.tensor([1, 16]).view(2, 1, 1),
        "zeros": lambda stored: _zeros_of(stored, zero_type) * torch.tensor([1, 0]).view(2, 1, 1),
    }
    read = _gathered(LayerSpec(INT4_PAIR, k, None, tensors), parts, of_one, alternating)
    flat = tuple((each, dtype, (e, 2 * n, wide)) for each, dtype, (e, _, _, wide) in tensors)
    return LayerSpec(INT4_PAIR, k, None, flat), {name: _flat(get) for name, get in read.items()}


def _flat(get: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: get().flatten(1, 2)


def _shape(parts: _Parts[_Stored]) -> tuple[int, int, int]:
    """[experts, N, K] of the layer."""
    return len(parts[0]), sum(row[0].shape[0] for row in parts), parts[0][0].shape[1]


def _gathered(
    spec: LayerSpec,
    parts: _Parts[_Stored],
    of_one: dict[str, Callable[[_Stored], Tensor]],
    alternating: bool,
) -> _Read:
    """How to get tensors of the layer from ``of_one``: what gets the same of a single weight."""

    def gather(name: str) -> Tensor:
        ((dtype, shape),) = ((d, s) for each, d, s in spec.tensors if each == name)
        found, start = torch.empty(shape, dtype=dtype), 0
        # One after the other: all of them and the layer would be twice its size.
        for piece, row in enumerate(parts):
            end = start + row[0].shape[0]
            rows = slice(piece, None, len(parts)) if alternating else slice(start, end)
            for expert, stored in enumerate(row):
                found[expert, ..., rows, :] = of_one[name](stored)
            start = end
        return found

    return {name: functools.partial(gather, name) for name in of_one}
