"""What the ops must compute, written from the contract alone: float64, plain indexing, no imports
from intlass_ops. Arguments are those of the ops; results live on the arguments' device.

Not here: how a result is compared (tolerance.py), where the arguments come from (strategies.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------- rounding


def round_to(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to ``dtype`` in one rounding, half to even, subnormals and overflow included.

    Divides by the distance between neighbouring numbers (a power of two, so without error) and
    rounds to an integer: no detour over another type.
    """
    info = torch.finfo(dtype)
    mantissa_bits = int(1 - np.log2(info.eps))
    smallest = int(np.log2(info.smallest_normal)) + 1 - mantissa_bits
    finite = torch.where(exact.isfinite(), exact, 0.0)
    shift = (torch.frexp(finite).exponent.long() - mantissa_bits).clamp(min=smallest)
    rounded = torch.round(finite * power_of_two(-shift)) * power_of_two(shift)
    infinite = ~exact.isfinite() | (rounded.abs() > info.max)
    return torch.where(infinite, exact * torch.inf, rounded).to(dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """float64 2^exponent from int64, by its bits: a library's exp2 may be an ulp off."""
    return ((exponent + 1023) << 52).view(torch.float64)


# ----------------------------------------------------------------------------------------- packing


def pack(codes: Tensor) -> Tensor:
    """Codes [..., K] to bytes [..., ceil(K/2)], even k in the low nibble; zero behind odd K."""
    padded = torch.nn.functional.pad(codes.long() % 16, (0, codes.shape[-1] % 2))
    pairs = padded.reshape(*codes.shape[:-1], padded.shape[-1] // 2, 2)
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)


def unpack(packed: Tensor, k: int, signed: bool) -> Tensor:
    """Bytes to int64 codes [..., k]."""
    columns = torch.arange(k, device=packed.device)
    nibbles = (packed.long()[..., columns // 2] >> (4 * (columns % 2))) % 16
    return nibbles - 16 * (nibbles >= 8) if signed else nibbles


# ------------------------------------------------------------------------------------------ matmul


class Expected(NamedTuple):
    """float64 results and the magnitude that tolerance.py measures errors against."""

    y: Tensor
    magnitude: Tensor


def _gelu_tanh(v: Tensor) -> Tensor:
    return 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda v: torch.where(v < 0, 0.0, v),
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "gelu": lambda v: 0.5 * v * torch.erfc(-v / 2**0.5),
    "gelu_tanh": _gelu_tanh,
}
STEEPEST = 1.13  # the largest slope of them all: an error before may be so much larger after


def per_weight(table: Tensor, n: int, k: int) -> Tensor:
    """A scalar, [N], [N, 1] or [N, G] table as float64 [N, K]: column k has group k // (K/G)."""
    if table.numel() == 1:
        return table.double().reshape(1, 1).expand(n, k)
    table = table.double() if table.dim() == 2 else table.double().reshape(n, 1)
    groups = table.shape[1]
    group_size = k // groups
    column_group = torch.arange(k, device=table.device) // max(group_size, 1)
    return table[:, column_group]


def e4m3(codes: Tensor) -> Tensor:
    """float64 of FP8 codes, from the definition of the format; none of them a NaN."""
    bits = codes.view(torch.uint8).long()
    exponent, fraction = bits % 128 // 8, (bits % 8).double() / 8
    magnitude = (fraction + (exponent > 0)) * power_of_two(exponent.clamp(min=1) - 7)
    return torch.where(bits < 128, magnitude, -magnitude)


_OF_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1
_OF_BITSANDBYTES = (0.0, 1.0, 128.0, 192.0, 64.0, 96.0, 32.0, 48.0)  # 192nds
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Numbers that codes index, by the name of the table.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    "iq4nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "fp4": (*_OF_FP4, *(-number for number in _OF_FP4)),
    "bnbfp4": (*_OF_BITSANDBYTES, *(-number for number in _OF_BITSANDBYTES)),
}


def numbers(table: str, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float64 of codes, each number rounded to ``dtype``."""
    exact = torch.tensor(TABLES[table], dtype=torch.float64, device=codes.device)
    return round_to(exact, dtype).double()[codes.long()]


def weight(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    table: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """float64 [N, K] = (q - zeros) * scales.

    ``table``: packed codes index its numbers, in ``dtype``.
    """
    n = w.shape[0]
    if table is not None:
        q = numbers(table, unpack(w, k, False), dtype)
    elif w.dtype == torch.float8_e4m3fn:
        q = e4m3(w)
    else:
        q = w.double() if w.dtype == torch.int8 else unpack(w, k, zeros is None).double()
    if zeros is not None:
        q = q - per_weight(zeros, n, k)
    return q * per_weight(scales, n, k)


def activations(a: Tensor, a_zero: Tensor | None, k: int) -> Tensor:
    """float64 [M, K] = a - a_zero."""
    rows = int(np.prod(a.shape[:-1]))
    if a.dtype == torch.uint8:
        a = unpack(a, k, a_zero is None)
    x = a.double().reshape(rows, k)
    return x if a_zero is None else x - a_zero.double().reshape(-1, 1)


def matmul(
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    k: int | None = None,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    alpha: Tensor | float | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    table: str | None = None,
) -> Expected:
    """activation(alpha * a_scale * ((a - a_zero) @ w.T) + bias) + residual for each op, before
    any rounding. ``table``: packed weights index its numbers, in the dtype of ``a``."""
    if k is None:
        k = a.shape[-1] * (2 if a.dtype == torch.uint8 else 1)
    x = activations(a, a_zero, k)
    dense = weight(w, scales, zeros, k, table, a.dtype)
    y, magnitude = x @ dense.T, x.abs() @ dense.abs().T
    for factor in (a_scale, alpha):
        if factor is not None:
            f = torch.as_tensor(factor, dtype=torch.float64, device=y.device).reshape(-1, 1)
            y, magnitude = y * f, magnitude * f.abs()
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    if activation is not None:
        y, magnitude = ACTIVATIONS[activation](y), STEEPEST * magnitude
    shape = (*a.shape[:-1], w.shape[0])
    y, magnitude = y.reshape(shape), magnitude.reshape(shape)
    if residual is not None:
        y, magnitude = y + residual.double(), magnitude + residual.double().abs()
    return Expected(y, magnitude)


# ---------------------------------------------------------------------------------------- quantise


class Quantized(NamedTuple):
    """Unpacked int64 codes, float32 scales and int64 zero points, in the op's shapes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def quantize(
    x: Tensor,
    bits: int,
    granularity: str = "token",
    group_size: int | None = None,
    symmetric: bool = True,
) -> Quantized:
    """Segment by segment in numpy float32, ties to even, as the docstrings of the ops say."""
    values = x.detach().cpu().float().numpy()
    *lead, k = values.shape
    length, shape = {
        "token": (k, (*lead, 1)),
        "channel": (
            values[0].size if values.shape[0] else 0,
            (values.shape[0], *[1] * (x.dim() - 1)),
        ),
        "tensor": (values.size, ()),
        "group": (group_size, (*lead, k // (group_size or 1))),
    }[granularity]
    number = int(np.prod(shape))
    segments = values.reshape(number, length or 0)
    codes = np.zeros(segments.shape, np.int64)
    scale, zero = np.ones(number, np.float32), np.zeros(number, np.int64)
    with np.errstate(all="ignore"):
        for i, segment in enumerate(segments):
            codes[i], scale[i], zero[i] = _quantize_segment(segment, bits, symmetric)
    return Quantized(
        torch.from_numpy(codes.reshape(values.shape)),
        torch.from_numpy(scale.reshape(shape)),
        None if symmetric else torch.from_numpy(zero.reshape(shape)),
    )


_F = np.float32


def _quantize_segment(
    segment: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.float32, int]:
    zero = 0
    if symmetric:
        low_code, high_code = {8: (-127, 127), 4: (-7, 7)}[bits]
        span, levels = np.max(np.abs(segment), initial=_F(0)), high_code
    else:
        low_code, high_code = {8: (-128, 127), 4: (0, 15)}[bits]
        low, high = np.min(segment, initial=_F(0)), np.max(segment, initial=_F(0))
        span, levels = high - low, high_code - low_code
    scale = _F(1) if span == 0 else span / _F(levels)
    if scale == 0:
        scale = np.nextafter(_F(0), _F(1))
    if not symmetric:
        steps = np.rint(low / scale)
        zero = 0 if np.isnan(steps) else low_code - int(steps)
        zero = min(max(zero, low_code), high_code)
    steps = np.rint(segment / scale).astype(np.float64) + zero
    codes = np.where(np.isnan(steps), 0, np.clip(steps, low_code, high_code))
    return codes.astype(np.int64), scale, zero
