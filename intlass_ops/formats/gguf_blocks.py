"""The quantised block types of GGUF: bytes of whole rows to codes, scales and zeros.

    type  weights  bytes  stored as                                     canonical
    Q4_0       32     18  fp16 d, 16 bytes of nibbles                   (q - 8)·d       signed INT4
    Q4_1       32     20  fp16 d, fp16 m, nibbles                       q·d + m         zeros -m/d
    Q5_0       32     22  fp16 d, 32 high bits, nibbles                 (q - 16)·d      INT8
    Q5_1       32     24  fp16 d, fp16 m, 32 high bits, nibbles         q·d + m         INT8, zeros
    Q8_0       32     34  fp16 d, 32 int8                               q·d             INT8
    Q2_K      256     84  16 · 4-bit (s, t), 2-bit codes, fp16 d, m     q·ds - mt       zeros mt/ds
    Q3_K      256    110  high bits, 2-bit codes, 16 · 6-bit s, fp16 d  (q - 4)·d(s-32) signed INT4
    Q4_K      256    144  fp16 d, fp16 m, 8 · 6-bit (s, t), nibbles     q·ds - mt       zeros mt/ds
    Q5_K      256    176  the same with high bits before the nibbles    q·ds - mt       INT8, zeros
    Q6_K      256    210  nibbles, 2-bit pairs, 16 · int8 s, fp16 d     (q - 32)·ds     INT8
    IQ4_NL     32     18  fp16 d, nibbles                               table[q]·d       iq4nl
    IQ4_XS    256    136  fp16 d, 8 · 6-bit s, nibbles                  table[q]·d(s-32) iq4nl
    MXFP4      32     17  e8m0 s, nibbles of e2m1                       e2m1(q)·2^(s-127) FP4
    NVFP4      64     36  4 · e4m3 s, nibbles of e2m1, 16 and 16        e2m1(q)·s·scale   FP4

Groups are 32 weights, in Q2_K, Q3_K and Q6_K 16. Codes and scales are exact (the products d·s have
at most 19 bits and are kept in float32). The one rounding is that of floating zeros, half an ulp:
with it, (q - zeros)·scale in float32 is within 2^-23·(|m| + |w|) of the exact w. A group whose
scale is 0 and which has a minimum has one value whatever its codes; it becomes code 0, scale 1,
zero -value: exact. MXFP4 and NVFP4 are no canonical weights but what an `Fp4Linear` holds: ggml's
table has twice the values of e2m1, and ggml halves the scale. NVFP4's other scale is a tensor.

In the blocks of 32, nibble byte j holds elements j (low) and j + 16 (high); ours holds neighbours
(packing.py). Source of the layouts: ggml's quants, as the gguf package has them. Not here: types
below four bits (gguf_grids.py), the file around the blocks (gguf.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..fp4 import MXFP4_GROUP, NVFP4_GROUP
from ..lut4 import IQ4NL
from ..packing import pack

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Halves = Callable[[Bytes], Tensor]  # fp16 parameters of bytes [..., 2], checked to be finite


class Decoded(NamedTuple):
    """codes as `CanonicalWeight` has them, scales and zeros [N, K/group_size]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


class BlockType(NamedTuple):
    """``decode(blocks [N, K/weights, bytes], halves)``; ``bits`` as they are kept here.

    ``table``: whose numbers (lut4.py) its codes, packed then, index. INT8 holds them too.
    """

    weights: int
    bytes: int
    bits: int
    group_size: int
    decode: Callable[[Bytes, Halves], Decoded]
    table: str | None = None


def _q4_0(blocks: Bytes, halves: Halves) -> Decoded:
    # q - 8 in two's complement is q with its top bit flipped.
    codes = pack(_nibbles(blocks[..., 2:])).flatten(1) ^ 0x88
    return Decoded(codes, halves(blocks[..., :2]), None)


def _q4_1(blocks: Bytes, halves: Halves) -> Decoded:
    return _affine(
        _nibbles(blocks[..., 4:]), halves(blocks[..., :2]), halves(blocks[..., 2:4]).float()
    )


def _q5_0(blocks: Bytes, halves: Halves) -> Decoded:
    codes = _five_bits(blocks[..., 2:]).to(torch.int8) - 16
    return Decoded(codes.flatten(1), halves(blocks[..., :2]), None)


def _q5_1(blocks: Bytes, halves: Halves) -> Decoded:
    minimum = halves(blocks[..., 2:4]).float()
    return _affine(_five_bits(blocks[..., 4:]), halves(blocks[..., :2]), minimum, bits=8)


def _q8_0(blocks: Bytes, halves: Halves) -> Decoded:
    codes = torch.from_numpy(blocks[..., 2:].copy()).view(torch.int8).flatten(1)
    return Decoded(codes, halves(blocks[..., :2]), None)


def _q2_k(blocks: Bytes, halves: Halves) -> Decoded:
    octets = torch.from_numpy(blocks.copy())
    s, t = octets[..., :16] & 15, octets[..., :16] >> 4
    d, m = halves(blocks[..., 80:82]).float(), halves(blocks[..., 82:]).float()
    codes = _pairs_of_bits(octets[..., 16:80]).flatten(1).unflatten(-1, (-1, 16))
    scales = (d.unsqueeze(-1) * s).flatten(1)
    return _affine(codes, scales, -(m.unsqueeze(-1) * t).flatten(1))


def _q3_k(blocks: Bytes, halves: Halves) -> Decoded:
    octets = torch.from_numpy(blocks.copy())
    low = _pairs_of_bits(octets[..., 32:96])  # [N, B, half, place, 32]
    high = (octets[..., :32].unflatten(-1, (1, 1, 32)) >> _PLACES.view(2, 4, 1)) & 1
    codes = pack(((low | (high << 2)) + 12) & 15)  # q - 4 in two's complement
    nibbles, pairs = octets[..., 96:104], octets[..., 104:108].unsqueeze(-2)
    s = torch.cat((nibbles & 15, nibbles >> 4), -1)
    s |= ((pairs >> _PLACES[:4, None] * 2) & 3).flatten(-2) << 4
    d = halves(blocks[..., 108:]).float()
    return Decoded(codes.flatten(1), (d.unsqueeze(-1) * (s.float() - 32)).flatten(1), None)


def _q4_k(blocks: Bytes, halves: Halves) -> Decoded:
    codes = _nibbles_of_64(blocks[..., 16:])
    return _affine(codes.flatten(1, 2), *_scales_and_minima(blocks, halves))


def _q5_k(blocks: Bytes, halves: Halves) -> Decoded:
    high = torch.from_numpy(blocks[..., 16:48].copy()).unsqueeze(-2)  # a bit of each of 8 groups
    codes = _nibbles_of_64(blocks[..., 48:]) | (((high >> _PLACES[:, None]) & 1) << 4)
    return _affine(codes.flatten(1, 2), *_scales_and_minima(blocks, halves), bits=8)


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


def _iq4_nl(blocks: Bytes, halves: Halves) -> Decoded:
    codes = pack(_nibbles(blocks[..., 2:]))
    return Decoded(codes.flatten(1), halves(blocks[..., :2]), None)


def _iq4_xs(blocks: Bytes, halves: Halves) -> Decoded:
    octets = torch.from_numpy(blocks.copy())
    low = torch.stack((octets[..., 4:8] & 15, octets[..., 4:8] >> 4), -1).flatten(-2)
    high = ((octets[..., 2:4].unsqueeze(-1) >> _PLACES[:4] * 2) & 3).flatten(-2)
    s = (low | (high << 4)).float() - 32
    codes = pack(_nibbles(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16)))
    d = halves(blocks[..., :2]).float()
    return Decoded(codes.flatten(1), (d.unsqueeze(-1) * s).flatten(1), None)


class Fp4Type(NamedTuple):
    """A block holds ``scales`` bytes of scales, those of groups, and their codes."""

    weights: int
    bytes: int
    scales: int
    largest: int  # byte of a scale: others are a NaN, or negative

    def codes_of(self, blocks: Bytes) -> Tensor:
        """Blocks [N, K/weights, bytes] to the codes [N, K/2] of an `Fp4Linear`."""
        octets = blocks[..., self.scales :].reshape(*blocks.shape[:2], self.scales, -1)
        return pack(_nibbles(octets)).flatten(1)

    def scales_of(self, blocks: Bytes) -> Tensor:
        """And to the bytes of scales [N, groups]."""
        return torch.from_numpy(blocks[..., : self.scales].copy()).flatten(1)


def _affine(codes: Tensor, scales: Tensor, minimum: Tensor, bits: int = 4) -> Decoded:
    """w = codes·scales + minimum; codes uint8 [N, G, group_size], of ``bits`` here."""
    flat = scales == 0
    zeros = torch.where(flat, -minimum, -minimum / scales.float())
    codes = codes.masked_fill(flat.unsqueeze(-1), 0)
    stored = pack(codes) if bits == 4 else codes.to(torch.int8)
    return Decoded(stored.flatten(1), torch.where(flat, 1.0, scales), zeros)


def _scales_and_minima(blocks: Bytes, halves: Halves) -> tuple[Tensor, Tensor]:
    """ds and -mt [N, G] of Q4_K and Q5_K."""
    d, m = halves(blocks[..., :2]).float(), halves(blocks[..., 2:4]).float()
    packed = torch.from_numpy(blocks[..., 4:16].copy())
    first, second, third = packed.unflatten(-1, (3, 4)).unbind(-2)  # 4 bytes each
    # Six bits each: of the first four pairs in one byte, of the last four in nibbles and top bits.
    s = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), -1)  # [N, B, 8]
    t = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), -1)
    return (d.unsqueeze(-1) * s).flatten(1), -(m.unsqueeze(-1) * t).flatten(1)


def _nibbles(octets: Bytes) -> Tensor:
    """[..., n] bytes of (element j, element j + n) to elements [..., 2 * n]."""
    return torch.from_numpy(np.concatenate((octets & 0xF, octets >> 4), axis=-1))


def _nibbles_of_64(octets: Bytes) -> Tensor:
    """[N, B, 128] bytes of (element j, element j + 32) of each 64 to groups [N, B, 8, 32]."""
    bytes_of_64 = torch.from_numpy(octets.copy()).unflatten(-1, (4, 1, 32))
    return torch.cat((bytes_of_64 & 15, bytes_of_64 >> 4), dim=-2).flatten(2, 3)


def _five_bits(octets: Bytes) -> Tensor:
    """4 bytes of high bits, then nibbles."""
    high = torch.from_numpy(np.unpackbits(octets[..., :4], axis=-1, bitorder="little"))
    return _nibbles(octets[..., 4:]) | (high << 4)


def _pairs_of_bits(octets: Tensor) -> Tensor:
    """[N, B, 64] bytes to [N, B, half, place in a byte, 32]."""
    halves: Tensor = octets.unflatten(-1, (2, 1, 32))
    return (halves >> _PLACES[:4, None] * 2) & 3


_PLACES = torch.arange(8, dtype=torch.uint8)
FP4_TYPES = {
    "MXFP4": Fp4Type(MXFP4_GROUP, 17, scales=1, largest=254),
    "NVFP4": Fp4Type(4 * NVFP4_GROUP, 36, scales=4, largest=126),
}
BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, 32, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, _q4_1),
    "Q5_0": BlockType(32, 22, 8, 32, _q5_0),
    "Q5_1": BlockType(32, 24, 8, 32, _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, _q8_0),
    "Q2_K": BlockType(256, 84, 4, 16, _q2_k),
    "Q3_K": BlockType(256, 110, 4, 16, _q3_k),
    "Q4_K": BlockType(256, 144, 4, 32, _q4_k),
    "Q5_K": BlockType(256, 176, 8, 32, _q5_k),
    "Q6_K": BlockType(256, 210, 8, 16, _q6_k),
    "IQ4_NL": BlockType(32, 18, 8, 32, _iq4_nl, IQ4NL),
    "IQ4_XS": BlockType(256, 136, 8, 32, _iq4_xs, IQ4NL),
}
