"""Ops of QAT's backward pass (qat.py): what surrounds its integer GEMMs, a pass over memory each.

    quantize_gradient   q[m, n]·s[m]   ≈ dy[m, n]·columns[n]     for dX, summed over n
                        qt[n, m]·st[n] ≈ dy[m, n]·rows[m]        for dW, summed over m
    transpose_codes     codes [R, K] as INT8 [K, R], the other operand of these sums
    rotate_back         (g ⊙ mask) hᵀ by blocks of R columns

The summed dimension of codes is padded with zeros to a multiple of 16, the bytes of one load.
Codes of the gradient are rounded up with the probability of their fraction, to 2^-17: their
expectation is the value. The scale of a row is its largest magnitude over 127, so none is clipped.
On a GPU they are Triton kernels (triton/training.py).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .. import packing, reference
from ._library import FLOATS, define, require_device, require_dtype


def _kernels(t: Tensor) -> bool:
    return t.is_cuda and importlib.util.find_spec("triton") is not None


def padded(size: Any) -> Any:
    return (size + 15) // 16 * 16


Quantised = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_gradient(dy: Tensor, rows: Tensor, columns: Tensor, seed: Tensor) -> None:
    op = "quantize_gradient"
    require_dtype(op, "dy", dy.dtype, FLOATS)
    require_device(op, dy, rows=rows, columns=columns, seed=seed)
    if dy.dim() != 2 or rows.numel() != dy.shape[0] or columns.numel() != dy.shape[1]:
        raise ValueError(
            f"{op}: dy is {tuple(dy.shape)} with {rows.numel()} factors of rows and "
            f"{columns.numel()} of columns; expected [M, N], M and N"
        )
    for name, t in (("rows", rows), ("columns", columns)):
        require_dtype(op, name, t.dtype, (torch.float32,))
    require_dtype(op, "seed", seed.dtype, (torch.int64,))


def _gradient_fake(dy: Tensor, rows: Tensor, columns: Tensor, seed: Tensor) -> Quantised:
    _check_gradient(dy, rows, columns, seed)
    m, n = dy.shape
    return (
        dy.new_empty((m, padded(n)), dtype=torch.int8),
        dy.new_empty((m, 1), dtype=torch.float32),
        dy.new_empty((n, padded(m)), dtype=torch.int8),
        dy.new_empty((n, 1), dtype=torch.float32),
    )


def _gradient(dy: Tensor, rows: Tensor, columns: Tensor, seed: Tensor) -> Quantised:
    _check_gradient(dy, rows, columns, seed)
    if _kernels(dy):
        from ..triton import training

        return training.quantise_gradient(
            dy, rows, columns, seed, padded(dy.shape[0]), padded(dy.shape[1])
        )
    hashed = reference.hashes(int(seed), dy.numel(), dy.device).view(dy.shape)
    wide = dy.float()
    return (
        *_stochastic(wide * columns.reshape(1, -1), hashed & 0xFFFF),
        *_stochastic((wide * rows.reshape(-1, 1)).T, (hashed >> 16).T),
    )


def _stochastic(t: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales [rows, 1]) of t [rows, columns], rounded by 16 random bits."""
    if not t.numel():
        return _with_zeros(t.to(torch.int8)), t.new_ones(t.shape[0], 1)
    amax = t.abs().amax(1, keepdim=True)
    smallest = torch.finfo(torch.float32).smallest_normal
    scale = torch.where(amax == 0, 1.0, (amax * (1 / 127)).clamp(min=smallest))
    # short of 127, which the largest would else exceed by roundings
    shifted = t * ((1 - 2.0**-20) / scale) + ((bits.float() + 0.5) * 2.0**-16 - 0.5)
    return _with_zeros(shifted.round().nan_to_num(0.0).to(torch.int8)), scale


def _with_zeros(codes: Tensor) -> Tensor:
    """codes [rows, columns], contiguous, with `padded` columns."""
    wide = codes.new_zeros(codes.shape[0], padded(codes.shape[1]))
    wide[:, : codes.shape[1]] = codes
    return wide


define(
    "quantize_gradient(Tensor dy, Tensor rows, Tensor columns, Tensor seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_gradient_fake,
    cpu=_gradient,
    cuda=_gradient,
)


def _check_codes(codes: Tensor, k: int) -> None:
    require_dtype("transpose_codes", "codes", codes.dtype, (torch.int8, torch.uint8))
    stored = k if codes.dtype == torch.int8 else packing.packed_size(k)
    if codes.dim() != 2 or codes.shape[1] != stored:
        raise ValueError(
            f"transpose_codes: codes is {tuple(codes.shape)}; expected [R, {stored}] for K={k}"
        )


def _transpose_fake(codes: Tensor, k: int) -> Tensor:
    _check_codes(codes, k)
    return codes.new_empty((k, padded(codes.shape[0])), dtype=torch.int8)


def _transpose(codes: Tensor, k: int) -> Tensor:
    _check_codes(codes, k)
    if _kernels(codes):
        from ..triton import training

        return training.transpose_codes(codes, k, padded(codes.shape[0]))
    wide = packing.unpack(codes, k, signed=True) if codes.dtype == torch.uint8 else codes
    return _with_zeros(wide.T)


define(
    "transpose_codes(Tensor codes, SymInt k) -> Tensor",
    fake=_transpose_fake,
    cpu=_transpose,
    cuda=_transpose,
)


def _check_rotation(g: Tensor, mask: Tensor, h: Tensor) -> None:
    op = "rotate_back"
    require_dtype(op, "g", g.dtype, FLOATS)
    require_dtype(op, "mask", mask.dtype, (torch.uint8,))
    require_dtype(op, "h", h.dtype, FLOATS)
    require_device(op, g, mask=mask, h=h)
    r = h.shape[0] if h.dim() == 2 else 0
    if r < 16 or r & (r - 1) or h.shape != (r, r) or g.dim() != 2 or g.shape[1] % r:
        raise ValueError(
            f"{op}: g is {tuple(g.shape)} and h {tuple(h.shape)}; expected [R, K] and a square "
            "matrix whose size is a power of two from 16 on and divides K"
        )
    if mask.shape != (g.shape[0], g.shape[1] // 8):
        raise ValueError(
            f"{op}: mask is {tuple(mask.shape)}; expected {(g.shape[0], g.shape[1] // 8)}"
        )


def _rotation_fake(g: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    _check_rotation(g, mask, h)
    return g.new_empty(g.shape)


def _rotation(g: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    _check_rotation(g, mask, h)
    h = h.to(g.dtype)
    if _kernels(g):
        from ..triton import training

        return training.rotate_back(g, mask, h)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    kept = ((mask[..., None] >> places) & 1).flatten(-2).bool()
    return (torch.where(kept, g, 0.0).view(-1, h.shape[0]) @ h.T).view(g.shape)


define(
    "rotate_back(Tensor g, Tensor mask, Tensor h) -> Tensor",
    fake=_rotation_fake,
    cpu=_rotation,
    cuda=_rotation,
)
