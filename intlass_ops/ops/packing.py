"""Ops `intlass::pack_int4` and `intlass::unpack_int4`; the layout is described in packing.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing
from ._library import INTEGERS, NAMESPACE, define, require_dtype


def _check_pack(q: Tensor, batch_dims: int = 0) -> None:
    require_dtype("pack_int4", "q", q.dtype, INTEGERS)
    if q.dim() == batch_dims:
        raise ValueError("pack_int4: q is a scalar; expected codes [..., K]")


def _pack_fake(q: Tensor) -> Tensor:
    _check_pack(q)
    return q.new_empty((*q.shape[:-1], packing.packed_size(q.shape[-1])), dtype=torch.uint8)


def _pack(q: Tensor) -> Tensor:
    _check_pack(q)
    if problem := packing.out_of_range(q):
        raise ValueError(f"pack_int4: {problem}")
    return packing.pack(q)


def _check_unpack(packed: Tensor, k: int, batch_dims: int = 0) -> None:
    require_dtype("unpack_int4", "packed", packed.dtype, (torch.uint8,))
    if packed.dim() == batch_dims:
        raise ValueError("unpack_int4: packed is a scalar; expected bytes [..., ceil(K/2)]")
    if k < 0:
        raise ValueError(f"unpack_int4: k={k} is negative")
    if packing.packed_size(k) != packed.shape[-1]:
        raise ValueError(
            f"unpack_int4: k={k} needs {packing.packed_size(k)} bytes a row, "
            f"packed has {packed.shape[-1]}"
        )


def _unpack_fake(packed: Tensor, k: int, *, signed: bool = True) -> Tensor:
    _check_unpack(packed, k)
    return packed.new_empty((*packed.shape[:-1], k), dtype=torch.int8)


def _unpack(packed: Tensor, k: int, *, signed: bool = True) -> Tensor:
    _check_unpack(packed, k)
    return packing.unpack(packed, k, signed)


define("pack_int4(Tensor q) -> Tensor", fake=_pack_fake, cpu=_pack, cuda=_pack)
define(
    "unpack_int4(Tensor packed, SymInt k, *, bool signed=True) -> Tensor",
    fake=_unpack_fake,
    cpu=_unpack,
    cuda=_unpack,
)


def _pack_vmap(info: object, in_dims: tuple[int | None, ...], q: Tensor) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    q = q.movedim(in_dims[0], 0)
    _check_pack(q, batch_dims=1)
    return pack_int4(q), 0


def _unpack_vmap(
    info: object,
    in_dims: tuple[int | None, ...],
    packed: Tensor,
    k: int,
    *,
    signed: bool = True,
) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    packed = packed.movedim(in_dims[0], 0)
    _check_unpack(packed, k, batch_dims=1)
    return unpack_int4(packed, k, signed=signed), 0


torch.library.register_vmap(f"{NAMESPACE}::pack_int4", _pack_vmap)
torch.library.register_vmap(f"{NAMESPACE}::unpack_int4", _unpack_vmap)


def pack_int4(q: Tensor) -> Tensor:
    """Pack INT4 codes two to a byte, even k in the low nibble.

    ``q``: integer tensor [..., K], every value in [-8, 7] or every value in [0, 15].
    Returns uint8 [..., ceil(K/2)]; an odd K leaves the last high nibble zero.

    Raises TypeError for a dtype that is no integer, ValueError for a value outside the range (the
    values are read, so a CUDA tensor synchronises).

    >>> import torch
    >>> pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8))
    tensor([241,   7], dtype=torch.uint8)
    """
    out: Tensor = torch.ops.intlass.pack_int4(q)
    return out


def unpack_int4(packed: Tensor, k: int | None = None, *, signed: bool = True) -> Tensor:
    """Inverse of :func:`pack_int4`: uint8 [..., ceil(K/2)] to int8 codes [..., K].

    ``k`` is needed when K is odd (default: twice the bytes). ``signed`` reads a nibble as two's
    complement in [-8, 7], otherwise as [0, 15].

    Raises TypeError if ``packed`` is not uint8, ValueError if ``k`` does not fit its bytes.

    >>> import torch
    >>> unpack_int4(torch.tensor([241, 7], dtype=torch.uint8), 3)
    tensor([ 1, -1,  7], dtype=torch.int8)
    """
    if k is None:
        k = 2 * packed.shape[-1] if packed.dim() else 0
    out: Tensor = torch.ops.intlass.unpack_int4(packed, k, signed=signed)
    return out
