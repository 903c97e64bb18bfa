"""The quantised block types of GGUF: bytes of whole rows to codes, scales and zeros.

    type  weights  bytes  stored as                                     canonical
    Q4_0       32     18  fp16 d, 16 bytes of nibbles                   (q - 8)·d       signed INT4
    Q4_1       32     20  fp16 d, fp16 m, nibbles                       q·d + m         zeros -m/d
    Q5_0       32     22  fp16 d, 32 high bits, nibbles                 (q - 16)·d      INT8
    Q8_0       32     34  fp16 d, 32 int8                               q·d             INT8
    Q4_K      256    144  fp16 d, fp16 m, 8 · 6-bit (s, t), nibbles     q·ds - mt       zeros mt/ds
    Q6_K      256    210  nibbles, 2-bit pairs, 16 · int8 s, fp16 d     (q - 32)·ds     INT8

Groups are 32 weights, in Q6_K 16. Codes and scales are exact (the products d·s have at most 19
bits and are kept in float32). The one rounding is that of floating zeros, half an ulp: with it,
(q - zeros)·scale in float32 is within 2^-23·(|m| + |w|) of the exact w. A group of Q4_1 or Q4_K
whose scale is 0 has one value whatever its codes; it becomes code 0, scale 1, zero -value: exact.

In the blocks of 32, nibble byte j holds elements j (low) and j + 16 (high); ours holds neighbours
(packing.py). Not here: the file around the blocks (gguf.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..packing import pack

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Halves = Callable[[Bytes], Tensor]  # fp16 parameters of bytes [..., 2], checked to be finite


class Decoded(NamedTuple):
    """codes as `CanonicalWeight` has them, scales and zeros [N, K/group_size]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


class BlockType(NamedTuple):
    """``decode(blocks [N, K/weights, bytes], halves)``."""

    weights: int
    bytes: int
    bits: int
    group_size: int
    decode: Callable[[Bytes, Halves], Decoded]


def _q4_0(blocks: Bytes, halves: Halves) -> Decoded:
    # q - 8 in two's complement is q with its top bit flipped.
    codes = pack(_nibbles(blocks[..., 2:])).flatten(1) ^ 0x88
    return Decoded(codes, halves(blocks[..., :2]), None)


def _q4_1(blocks: Bytes, halves: Halves) -> Decoded:
    return _affine(
        _nibbles(blocks[..., 4:]), halves(blocks[..., :2]), halves(blocks[..., 2:4]).float()
    )


def _q5_0(blocks: Bytes, halves: Halves) -> Decoded:
    high = torch.from_numpy(np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little"))
    codes = (_nibbles(blocks[..., 6:]) | (high << 4)).to(torch.int8) - 16
    return Decoded(codes.flatten(1), halves(blocks[..., :2]), None)


def _q8_0(blocks: Bytes, halves: Halves) -> Decoded:
    codes = torch.from_numpy(blocks[..., 2:].copy()).view(torch.int8).flatten(1)
    return Decoded(codes, halves(blocks[..., :2]), None)


def _q4_k(blocks: Bytes, halves: Halves) -> Decoded:
    d, m = halves(blocks[..., :2]).float(), halves(blocks[..., 2:4]).float()
    packed = torch.from_numpy(blocks[..., 4:16].copy())
    first, second, third = packed.unflatten(-1, (3, 4)).unbind(-2)  # 4 bytes each
    # Six bits each: of the first four pairs in one byte, of the last four in nibbles and top bits.
    s = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), -1)  # [N, B, 8]
    t = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), -1)
    octets = torch.from_numpy(blocks[..., 16:].copy()).unflatten(-1, (4, 32))
    codes = torch.stack((octets & 15, octets >> 4), dim=-2)  # [N, B, 4, 2, 32]
    scales = (d.unsqueeze(-1) * s).flatten(1)
    return _affine(codes.flatten(1, 3), scales, -(m.unsqueeze(-1) * t).flatten(1))


def _q6_k(blocks: Bytes, halves: Halves) -> Decoded:
    octets = torch.from_numpy(blocks.copy())
    low = octets[..., :128].unflatten(-1, (2, 1, 2, 32))  # half, -, byte row, byte
    high = octets[..., 128:192].unflatten(-1, (2, 1, 1, 32))
    low = torch.cat((low & 15, low >> 4), dim=-3)  # [N, B, half, nibble, row, 32]
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8).view(2, 2, 1)
    codes = (low | (((high >> pairs) & 3) << 4)).to(torch.int8) - 32
    s = octets[..., 192:208].view(torch.int8)
    d = halves(blocks[..., 208:]).float()
    return Decoded(codes.flatten(1), (d.unsqueeze(-1) * s).flatten(1), None)


def _affine(codes: Tensor, scales: Tensor, minimum: Tensor) -> Decoded:
    """w = codes·scales + minimum; codes uint8 [N, G, group_size], below 16."""
    flat = scales == 0
    zeros = torch.where(flat, -minimum, -minimum / scales.float())
    codes = codes.masked_fill(flat.unsqueeze(-1), 0)
    return Decoded(pack(codes).flatten(1), torch.where(flat, 1.0, scales), zeros)


def _nibbles(octets: Bytes) -> Tensor:
    """[..., 16] bytes of (element j, element j + 16) to elements [..., 32]."""
    return torch.from_numpy(np.concatenate((octets & 0xF, octets >> 4), axis=-1))


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, 32, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, _q4_1),
    "Q5_0": BlockType(32, 22, 8, 32, _q5_0),
    "Q8_0": BlockType(32, 34, 8, 32, _q8_0),
    "Q4_K": BlockType(256, 144, 4, 32, _q4_k),
    "Q6_K": BlockType(256, 210, 8, 16, _q6_k),
}
