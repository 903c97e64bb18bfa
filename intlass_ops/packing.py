"""Storage of INT4 codes: two per byte, row-major, the layout every device and kernel reads.

Here: packing and unpacking in plain PyTorch. The ops that wrap them are in ops/packing.py.

    codes   q[..., K]          one integer per element, all in [-8, 7] (s4) or all in [0, 15] (u4)
    packed  p[..., ceil(K/2)]  uint8

        byte j:   | 7 6 5 4 | 3 2 1 0 |
                  | q[2j+1] |  q[2j]  |      even k in the low nibble; two's complement for s4

An odd K leaves the high nibble of the last byte zero. INT8 weights need no packing: int8 [N, K].
The CUDA kernels read these bytes as they are: a lane takes a 32-bit word, i.e. eight consecutive k,
and orders the activations to match (cuda/operands.cuh).

Activations may have a byte each instead, for tensor cores that take no INT4: int8 [..., K], or

    lanes   l[..., K/4]        int32      four bytes each, K a multiple of 32

        of every 32 k the even ones, then the odd ones:   q[0] q[2] ... q[30] q[1] q[3] ... q[31]

for hopper.cu: what a lane then wants of a word of W are its low or its high nibbles. The dtype says
which of the two it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

S4_MIN, S4_MAX = -8, 7
U4_MAX = 15


def packed_size(k: int) -> int:
    """Bytes of one row of ``k`` INT4 codes."""
    return (k + 1) // 2


def out_of_range(q: Tensor) -> str | None:
    """What is wrong with the values of ``q`` as INT4 codes, or None. Reads the data (syncs)."""
    if q.numel() == 0:
        return None
    low, high = (int(v) for v in torch.aminmax(q))
    if (low >= S4_MIN and high <= S4_MAX) or (low >= 0 and high <= U4_MAX):
        return None
    return (
        f"codes span [{low}, {high}]; INT4 codes lie in [{S4_MIN}, {S4_MAX}] (signed) "
        f"or in [0, {U4_MAX}] (unsigned)"
    )


def pack(q: Tensor) -> Tensor:
    """Pack codes [..., K] to uint8 [..., ceil(K/2)], modulo 16: check the range first."""
    nibbles = q.to(torch.uint8).contiguous() & 0xF
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor, k: int, signed: bool) -> Tensor:
    """Inverse of :func:`pack`: int8 codes [..., k]."""
    # One byte to the two bytes of a 16-bit word, low nibble first.
    words = packed.to(torch.int16, memory_format=torch.contiguous_format)
    words = words.bitwise_or_(words * 16).bitwise_and_(0x0F0F)
    codes = words.view(torch.int8)[..., :k].contiguous()
    return codes.bitwise_xor_(8).sub_(8) if signed else codes


def to_lanes(q: Tensor) -> Tensor:
    """Lay int8 codes [..., K], K a multiple of 32, out as lanes, int32 [..., K/4]."""
    pairs = q.view(*q.shape[:-1], q.shape[-1] // 32, 16, 2)
    return pairs.transpose(-1, -2).reshape(q.shape).view(torch.int32)


def from_lanes(lanes: Tensor) -> Tensor:
    """Inverse of :func:`to_lanes`: int8 codes [..., K]."""
    q = lanes.contiguous().view(torch.int8)
    halves = q.view(*q.shape[:-1], q.shape[-1] // 32, 2, 16)
    return halves.transpose(-1, -2).reshape(q.shape)
