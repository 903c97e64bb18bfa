"""GGUF's block types below four bits: codes that index grids of 4 or 8 numbers, ternary, binary.

    type     weights  bytes  a weight                       group  kept as
    IQ1_S        256     50  (grid + δ)·d(2s+1)                32  INT4, zeros 1 - δ
    IQ1_M        256     56  (grid + δ)·d(2s+1)                16  INT8: 8·grid ± 1
    IQ2_XXS      256     66  ±grid·d(2s+1)/8                   32  INT8
    IQ2_XS       256     74  ±grid·d(2s+1)/8                   16  INT8
    IQ2_S        256     82  ±grid·d(2s+1)/8                   16  INT8
    IQ3_XXS      256     98  ±grid·d(2s+1)/4                   32  INT8
    IQ3_S        256    110  ±grid·d(2s+1)                     32  INT4, zeros 7.5
    TQ1_0        256     54  t·d, five t a byte               256  INT4
    TQ2_0        256     66  t·d, four t a byte               256  INT4
    Q1_0         128     18  ±d, a bit each                   128  INT4

d is fp16, s has 3 or 4 bits, δ = ±1/8, t is -1, 0 or 1. The numbers of a grid are -1, 0 and 1
(IQ1), 8, 25 and 43 (IQ2), 4 to 62 (IQ3_XXS) or odd ones up to 15 (IQ3_S): integers all, so that
every weight is exactly a code times a scale. Kept in 4 or 8 bits, it takes more memory than in the
file. Grids are taken from the gguf package, which has the tables. Not here: the other types
(gguf_blocks.py), the file around them (gguf.py).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..packing import pack
from . import FormatError
from .gguf_blocks import BlockType, Bytes, Decoded, Halves

_EIGHTH = 0.125


def _iq1_s(blocks: Bytes, halves: Halves) -> Decoded:
    words = _words(blocks[..., 34:50], 16)  # one for each group
    high = (words[..., None] >> np.arange(0, 12, 3)) & 7
    index = blocks[..., 2:34] | (high.reshape(*high.shape[:2], 32) << 8)
    scales = _scaled(halves(blocks[..., :2]), 2 * ((words >> 12) & 7) + 1)
    delta = torch.from_numpy(np.where(words >> 15, -_EIGHTH, _EIGHTH)).float().flatten(1)
    return Decoded(pack(_rows("IQ1_S", index) + 1).flatten(1), scales, 1 - delta)


def _iq1_m(blocks: Bytes, halves: Halves) -> Decoded:
    words = _words(blocks[..., 48:], 16)
    bits = (words >> 12 << np.arange(0, 16, 4)).sum(-1).astype("<u2")
    d = halves(bits[..., None].view(np.uint8))
    s = ((words[..., None] >> np.arange(0, 12, 3)) & 7).reshape(*words.shape[:2], 16)
    nibbles = _nibbles(blocks[..., 32:48])
    codes = 8 * _rows("IQ1_M", blocks[..., :32] | ((nibbles & 7) << 8))
    delta = torch.from_numpy(np.where(nibbles & 8, -1, 1).astype(np.int8))
    codes += delta.repeat_interleave(8, -1)
    return Decoded(codes.flatten(1), _scaled(d, 2 * s + 1) * _EIGHTH, None)


def _iq2_xxs(blocks: Bytes, halves: Halves) -> Decoded:
    pairs = blocks[..., 2:].reshape(*blocks.shape[:2], 8, 8)  # four indices; signs and a scale
    signs, s = _signs_and_scale(pairs[..., 4:])
    codes = _rows("IQ2_XXS", pairs[..., :4].reshape(*blocks.shape[:2], 32)) * signs
    return Decoded(codes.flatten(1), _scaled(halves(blocks[..., :2]), 2 * s + 1) * _EIGHTH, None)


def _iq2_xs(blocks: Bytes, halves: Halves) -> Decoded:
    words = _words(blocks[..., 2:66], 16)
    codes = _rows("IQ2_XS", words & 511) * _looked_up(_SIGNS_OF_SEVEN, words >> 9)
    s = _nibbles(blocks[..., 66:])
    return Decoded(codes.flatten(1), _scaled(halves(blocks[..., :2]), 2 * s + 1) * _EIGHTH, None)


def _iq2_s(blocks: Bytes, halves: Halves) -> Decoded:
    high = (blocks[..., 66:74, None] >> np.arange(0, 8, 2)) & 3
    index = blocks[..., 2:34] | (high.astype(np.int64).reshape(*high.shape[:2], 32) << 8)
    codes = _rows("IQ2_S", index) * _looked_up(_SIGNS, blocks[..., 34:66])
    s = _nibbles(blocks[..., 74:])
    return Decoded(codes.flatten(1), _scaled(halves(blocks[..., :2]), 2 * s + 1) * _EIGHTH, None)


def _iq3_xxs(blocks: Bytes, halves: Halves) -> Decoded:
    signs, s = _signs_and_scale(blocks[..., 66:].reshape(*blocks.shape[:2], 8, 4))
    codes = _rows("IQ3_XXS", blocks[..., 2:66]) * signs
    return Decoded(codes.flatten(1), _scaled(halves(blocks[..., :2]), 2 * s + 1) * 0.25, None)


def _iq3_s(blocks: Bytes, halves: Halves) -> Decoded:
    high = np.unpackbits(blocks[..., 66:74], axis=-1, bitorder="little").astype(np.int64)
    odd = _rows("IQ3_S", blocks[..., 2:66] | (high << 8))
    odd *= _looked_up(_SIGNS, blocks[..., 74:106])
    codes = pack((odd + 15).to(torch.uint8) >> 1)  # w = (q - 7.5) * 2ds
    scales = 2 * _scaled(halves(blocks[..., :2]), 2 * _nibbles(blocks[..., 106:]) + 1)
    return Decoded(codes.flatten(1), scales, torch.full_like(scales, 7.5))


def _tq1_0(blocks: Bytes, halves: Halves) -> Decoded:
    parts = blocks[..., :32], blocks[..., 32:48], blocks[..., 48:52]
    digits = []
    for part, count in zip(parts, (5, 5, 4), strict=True):
        # A byte is a fraction of 256 in base three: times a power of three it begins with a digit.
        powers = np.array([3**i for i in range(count)], dtype=np.uint8)[:, None]
        shifted = (part[..., None, :] * powers).astype(np.uint16)
        digits.append((shifted * 3 >> 8).reshape(*part.shape[:2], -1))
    return _ternary(np.concatenate(digits, -1), halves(blocks[..., 52:]))


def _tq2_0(blocks: Bytes, halves: Halves) -> Decoded:
    places = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    digits = (blocks[..., :64].reshape(*blocks.shape[:2], 2, 1, 32) >> places) & 3
    return _ternary(digits, halves(blocks[..., 64:]))


def _q1_0(blocks: Bytes, halves: Halves) -> Decoded:
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    return _ternary(2 * bits, halves(blocks[..., :2]))


def _ternary(digits: np.ndarray, scales: Tensor) -> Decoded:
    codes = torch.from_numpy(digits.astype(np.int8)).flatten(1) - 1
    return Decoded(pack(codes & 15), scales, None)


def _words(octets: Bytes, bits: int) -> np.ndarray:
    return np.ascontiguousarray(octets).view(f"<u{bits // 8}").astype(np.int64)


def _nibbles(octets: Bytes) -> np.ndarray:
    """[..., bytes] to [..., 2 * bytes], the lower half of a byte first."""
    both = np.stack((octets & 15, octets >> 4), -1).astype(np.int64)
    return both.reshape(*octets.shape[:-1], -1)


def _scaled(d: Tensor, multiples: np.ndarray) -> Tensor:
    """d [N, B] times integers [N, B, groups], exact in float32."""
    return (d.float().unsqueeze(-1) * torch.from_numpy(multiples).float()).flatten(1)


def _signs_and_scale(words: Bytes) -> tuple[Tensor, np.ndarray]:
    """Words [N, B, 8, 4 bytes]: four times seven signs, the eighth of which makes their product 1;
    a scale."""
    wide = _words(words, 32)[..., 0]
    index = (wide[..., None] >> np.arange(0, 28, 7)) & 127
    return _looked_up(_SIGNS_OF_SEVEN, index).flatten(2), wide >> 28


def _rows(name: str, index: np.ndarray) -> Tensor:
    """int8 [N, B, 256], what the grid of a type has at indices [N, B, 32 or 64]."""
    return _looked_up(_grid(name), index)


def _looked_up(rows: Tensor, index: np.ndarray) -> Tensor:
    return rows[torch.from_numpy(index.astype(np.int64))].flatten(-2)


@functools.cache
def _grid(name: str) -> Tensor:
    try:
        from gguf import quants
    except ImportError as problem:
        raise FormatError(
            f"blocks of type {name} index a grid that the gguf package has: pip install gguf"
        ) from problem
    found = getattr(quants, name)
    found.init_grid()
    return torch.from_numpy(found.grid.astype(np.int8)).reshape(found.grid_shape)


_SIGNS = 1 - 2 * ((torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8)) & 1).char()
_SIGNS_OF_SEVEN = _SIGNS[torch.tensor([s | s.bit_count() % 2 << 7 for s in range(128)])]
GRID_TYPES = {
    "IQ1_S": BlockType(256, 50, 4, 32, _iq1_s),
    "IQ1_M": BlockType(256, 56, 8, 16, _iq1_m),
    "IQ2_XXS": BlockType(256, 66, 8, 32, _iq2_xxs),
    "IQ2_XS": BlockType(256, 74, 8, 16, _iq2_xs),
    "IQ2_S": BlockType(256, 82, 8, 16, _iq2_s),
    "IQ3_XXS": BlockType(256, 98, 8, 32, _iq3_xxs),
    "IQ3_S": BlockType(256, 110, 4, 32, _iq3_s),
    "TQ1_0": BlockType(256, 54, 4, 256, _tq1_0),
    "TQ2_0": BlockType(256, 66, 4, 256, _tq2_0),
    "Q1_0": BlockType(128, 18, 4, 128, _q1_0),
}
