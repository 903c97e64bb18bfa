"""4-bit codes that index a table of sixteen numbers: NF4, IQ4_NL and two orders of FP4.

    w = numbers[q] · scale, the scale of a group along K

    table    numbers                                                      where
    nf4      sixteen quantiles of a normal distribution, from -1 to 1     QLoRA, bitsandbytes
    iq4nl    integers from -127 to 113, denser around 0                   GGUF: IQ4_NL, IQ4_XS
    fp4      e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives         any scales but fp4.py's
    bnbfp4   bitsandbytes' FP4 in 192nds: 0, 1, 128, 192, 64, 96, 32, 48
             and their negatives: scale = amax / 192                      bitsandbytes

Codes pack two per byte like INT4 (packing.py), the even element in the low nibble. Tensor cores
multiply 16-bit floats: under bf16 or fp16 activations NF4's numbers are rounded to their type, as
is the weight when it is dequantised; all others have those numbers.
Sources: Dettmers et al., QLoRA (2023), section 3 and appendix E (tests/test_lut4.py derives them);
llama.cpp's kvalues_iq4nl; OCP Microscaling Formats v1.0, 5.3.3; bitsandbytes' dDequantizeFP4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packing

NF4 = "nf4"
IQ4NL = "iq4nl"
FP4 = "fp4"
BNBFP4 = "bnbfp4"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BNB_FP4 = (0.0, 1.0, 128.0, 192.0, 64.0, 96.0, 32.0, 48.0)
TABLES: dict[str, tuple[float, ...]] = {
    NF4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    IQ4NL: (
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
        1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    ),
    FP4: (*_E2M1, *(0.0 - number for number in _E2M1)),
    BNBFP4: (*_BNB_FP4, *(0.0 - number for number in _BNB_FP4)),
}  # fmt: skip

# What bitsandbytes calls a table: ours, and what its numbers are divided by.
BITSANDBYTES = {"nf4": (NF4, 1.0), "fp4": (BNBFP4, 192.0)}


def numbers(
    table: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The sixteen numbers of a table, rounded to ``dtype`` once."""
    return torch.tensor(TABLES[table], dtype=dtype, device=device)


def decode(packed: Tensor, k: int, table: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [..., k] of packed codes, rounded to ``dtype`` once."""
    return decode_codes(packing.unpack(packed, k, signed=False), table, dtype)


def decode_codes(codes: Tensor, table: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same of one code an element."""
    return numbers(table, dtype, codes.device)[codes.int()]


def encode(x: Tensor, table: str) -> Tensor:
    """Codes uint8, same shape, of the nearest numbers; halfway between two the upper one's.

    Values beyond the table saturate. NaN has no code and becomes that of the number nearest to 0.
    """
    ordered, codes = numbers(table, torch.float64, x.device).sort(stable=True)
    first = ordered[1:] != ordered[:-1]  # of two zeros the one that comes first
    ordered, codes = (torch.cat((t[:1], t[1:][first])) for t in (ordered, codes.to(torch.uint8)))
    halfway = (ordered[1:] + ordered[:-1]) / 2
    return codes[torch.bucketize(x.double().nan_to_num(0.0), halfway, right=True)]
