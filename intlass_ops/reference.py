"""The mathematics in plain PyTorch: oracle of every test and slow-but-sure CPU kernel.

Everything is computed in float64 (the quantisers in float32, the precision they are defined in) and
rounded once at the end. No checks here: arguments arrive validated and normalised by ops/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

QMIN = {8: -128, 4: -8}
QMAX = {8: 127, 4: 7}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}
# The reference never holds more than this many float64 weights at once.
_CHUNK_ELEMENTS = 1 << 24


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to ``dtype`` once, half to even.

    PyTorch converts float64 to bf16/fp16 through float32, which rounds twice; rounding to odd in
    float32 first makes the second rounding the only one that counts.
    """
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    f = x.to(torch.float32)
    error = x - f.double()
    even = (f.view(torch.int32) & 1) == 0
    toward = torch.nextafter(f, torch.copysign(torch.full_like(f, torch.inf), error.float()))
    adjust = (error != 0) & even & torch.isfinite(f)
    return torch.where(adjust, toward, f).to(dtype)


def expand_groups(per_group: Tensor, n: int, k: int) -> Tensor:
    """[1 or N, 1 or G] parameters to one value per weight, [N, K]."""
    groups = per_group.shape[1]
    full = per_group.expand(n, groups)
    return full.repeat_interleave(k // groups, dim=1) if k else full.new_empty(n, 0)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """w[N, K] = (codes - zeros) * scales in float64; scales and zeros are [1 or N, 1 or G]."""
    n, k = codes.shape
    w = codes.double()
    if zeros is not None:
        w = w - expand_groups(zeros.double(), n, k)
    return w * expand_groups(scales.double(), n, k)


def matmul(
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    a_scale: Tensor | None = None,
    a_zero: Tensor | None = None,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """float64 [M, N] = alpha * a_scale * ((a - a_zero) @ w.T) + bias, before the rounding.

    a [M, K] float or integer codes; codes [N, K]; a_scale, a_zero [1 or M, 1]; alpha [1]; bias [N].
    """
    n, k = codes.shape
    x = a.double() if a_zero is None else a.double() - a_zero.double()
    out = x.new_empty(a.shape[0], n)
    rows = max(1, _CHUNK_ELEMENTS // max(k, 1))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        s = scales[part] if scales.shape[0] > 1 else scales
        z = zeros[part] if zeros is not None and zeros.shape[0] > 1 else zeros
        torch.mm(x, dequantize(codes[part], s, z).T, out=out[:, part])
    return scale_and_shift(out, a_scale, alpha, bias)


def scale_and_shift(
    out: Tensor, a_scale: Tensor | None, alpha: Tensor | None, bias: Tensor | None
) -> Tensor:
    """alpha * a_scale * out + bias, in place, for float64 ``out``."""
    if a_scale is not None:
        out *= a_scale.double()
    if alpha is not None:
        out *= alpha.double()
    if bias is not None:
        out += bias.double()
    return out


def seed_key(seed: int) -> int:
    """64 bits that differ in half their places for any two seeds (the splitmix64 finaliser).

    Indices are combined with the key by XOR: small seeds themselves would only permute the draws of
    a tensor, and steps 0, 1, 2, ... of a training run would all make the same error in its sum.
    """
    mask = 0xFFFFFFFFFFFFFFFF
    key = (seed + 0x9E3779B97F4A7C15) & mask
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
    return key ^ (key >> 31)


def hashes(key: int, count: int, device: torch.device) -> Tensor:
    """``count`` 32-bit numbers, as int64, that depend on (key, index) alone.

    A 32-bit finaliser hash (Wellons' lowbias32) of index and key: the same numbers on every
    device, in any launch order and inside a captured graph.
    """
    mask = 0xFFFFFFFF
    x = torch.arange(count, device=device, dtype=torch.int64)
    x = ((x & mask) ^ (((x >> 32) * 0x9E3779B9) & mask) ^ (key & mask)) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return x ^ (x >> 16) ^ ((key >> 32) & mask)


def uniform(seed: int, count: int, device: torch.device) -> Tensor:
    """``count`` float32 values in [0, 1) that depend on (seed, index) alone."""
    return (hashes(seed_key(seed), count, device) >> 8).to(torch.float32) * 2.0**-24


def quantization_parameters(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each row of x [S, L], float32 arithmetic; both [S, 1].

    symmetric:  scale = amax / qmax,               x ~ q * scale,            q in [-qmax, qmax]
    asymmetric: scale = (xmax - xmin) / (2^b - 1), x ~ (q - zero) * scale, range includes zero
    A row of zeros gets scale 1; a scale that underflows is the smallest positive float; NaN stays.
    """
    x = x.float()
    if symmetric:
        span = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
        levels, low = QMAX[bits], None
    else:
        low, high = (
            (x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0))
            if x.shape[1]
            else (x.new_zeros(x.shape[0], 1), x.new_zeros(x.shape[0], 1))
        )
        span, levels = high - low, 2**bits - 1
    # A tensor as divisor: CUDA multiplies by the reciprocal of a number, which rounds twice.
    scale = torch.where(span == 0, 1.0, (span / torch.full_like(span, levels)).clamp(min=2.0**-149))
    if low is None:
        return scale, None
    first = -128 if bits == 8 else 0
    zero = (first - torch.round(low / scale)).nan_to_num(0.0).clamp(first, first + levels)
    return scale, zero.to(torch.int32)


def quantize_full_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [S, L] and scales float32 [S, 1] of the rows of x, symmetric, as torchao has them.

    scale = max(amax / 127.5, 2^-23), rounded to the dtype of x
    q = round(x * (1 / scale)), saturated to [-128, 127], NaN to 0; float32

    In PyTorch's arithmetic: a CUDA tensor is multiplied by the reciprocal of 127.5, which differs
    in float32 only (tests/test_quantize_full_range.py).
    """
    amax = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    scale = (amax / 127.5).clamp(min=2.0**-23).float()
    q = torch.mul(x, 1 / scale).round_().clamp_(-128, 127).nan_to_num_(0.0)
    return q.to(torch.int8), scale


def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    seed: int | None,
) -> Tensor:
    """Integer codes of x [S, L]: round(x / scale) + zero, saturated, NaN to 0; int8.

    ``seed`` None rounds half to even, else stochastically: up if uniform() is below the fraction.
    A floating ``zero`` is added before the rounding, an integer one after it.
    """
    r = x.float() / scale.float()
    if zero is not None and zero.is_floating_point():
        r = r + zero.float()
    if seed is None:
        r = torch.round(r)
    else:
        below = torch.floor(r)
        r = below + (uniform(seed, r.numel(), r.device).view_as(r) < r - below)
    if zero is not None and not zero.is_floating_point():
        r = r + zero.float()
    low, high = code_range(bits, zero is None)
    return r.clamp(low, high).nan_to_num(0.0).to(torch.int8)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Codes a quantiser may emit: symmetric drops the most negative one; asymmetric INT4 is u4."""
    if symmetric:
        return -QMAX[bits], QMAX[bits]
    return (0, 15) if bits == 4 else (-128, 127)
