"""NF4, the 4-bit numbers of QLoRA and bitsandbytes: sixteen quantiles of a normal distribution.

    w = NF4[q] · scale, groups of 64 along K (bitsandbytes' blocksize), scale = amax of the group

    q       0        1        2        3        4        5        6        7
    NF4    -1      -.6962   -.5251   -.3949   -.2844   -.1848   -.0911    0
    q       8        9       10       11       12       13       14       15
    NF4    .0796    .1609    .2461    .3379    .4407    .5626    .7230    1

Codes pack two per byte like INT4 (packing.py), the even element in the low nibble; bitsandbytes has
it in the high one (formats/bitsandbytes_nf4.py). Tensor cores multiply 16-bit floats: under bf16 or
fp16 activations the numbers are rounded to their type, as is the weight when it is dequantised.
Source: Dettmers et al., QLoRA (2023), section 3 and appendix E; tests/test_nf4.py derives them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packing

GROUP = 64
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def decode(packed: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [..., k] of packed codes, rounded to ``dtype`` once."""
    return decode_codes(packing.unpack(packed, k, signed=False), dtype)


def decode_codes(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of one code an element."""
    return torch.tensor(VALUES, dtype=dtype, device=codes.device)[codes.int()]


def encode(x: Tensor) -> Tensor:
    """Codes uint8, same shape, of the nearest numbers; halfway between two the upper one's.

    ``x``: within [-1, 1], others saturate. NaN has no code and becomes 0's.
    """
    table = torch.tensor(VALUES, dtype=torch.float64, device=x.device)
    codes = torch.bucketize(x.double(), (table[1:] + table[:-1]) / 2, right=True)
    return torch.where(x.isnan(), 7, codes).to(torch.uint8)
