"""GPTQ: quantise a weight column by column, each column making up for the errors of those before.

Minimises tr((w - ŵ) H (w - ŵ)ᵀ) greedily. With U the upper Cholesky factor of H⁻¹ (UᵀU = H⁻¹),
rounding column i leaves e = (w_i - ŵ_i) / U_ii, and the columns after it are corrected by
w_j -= e·U_ij, the least-squares answer for the columns still free.
Method: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022). The other quantisers, and what H is: calibrate.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from . import calibrate, reference
from .calibrate import QuantizedWeight

# Columns of a block that a Triton program holds in registers.
_TRITON_MAX_WIDTH = 256


def gptq(
    w: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    optimal_scales: bool = True,
) -> QuantizedWeight:
    """Quantise ``w`` [N, K] with error feedback through ``hessian`` [K, K]; float32 or float64.

    ``act_order``: take the columns by falling H_ii. Scales then come from the original weight and
    groups stay runs of consecutive k, so the result needs no permutation. Otherwise a group's
    scales come from its corrected weights when it is reached. ``block_size``: columns corrected at
    once, for speed, rounded up to whole groups; the result does not depend on it but for rounding.
    ``damping``: this share of the mean of H_ii is added to the diagonal. ``optimal_scales``: `mse`
    scales (weighted by H_ii) instead of those of round to nearest.
    ValueError where the damped Hessian is not positive definite. Inputs that are never active
    (H_ii = 0) count for nothing and are rounded to nearest.

    >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.5]])
    >>> gptq(torch.tensor([[7.0, -3.2, 0.4]]), x.T @ x).codes
    tensor([[ 7, -3,  0]], dtype=torch.int8)
    """
    calibrate._check("gptq", w, bits, group_size, symmetric)
    h = calibrate._checked_hessian("gptq", w, hessian).clone()
    n, k = w.shape
    g = group_size or k
    if block_size < 1:
        raise ValueError(f"gptq: block_size={block_size} is not positive")
    work = w.detach().to(h.dtype, copy=True)
    salience = h.diagonal().clone()

    def scales_of(part: Tensor, columns: slice) -> QuantizedWeight:
        if not optimal_scales:
            return calibrate.rtn(part, bits=bits, group_size=g, symmetric=symmetric)
        weights = salience[columns] if salience[columns].any() else None
        return calibrate.mse(part, bits=bits, group_size=g, symmetric=symmetric, weights=weights)

    scales = torch.empty(n, k // g, device=w.device)
    zeros = None if symmetric else torch.empty(n, k // g, dtype=torch.int32, device=w.device)
    fixed_scales = act_order or g == k
    if fixed_scales:
        _, scales, zeros = scales_of(work, slice(None))
    places = torch.arange(k, device=w.device)
    if act_order:
        places = salience.argsort(descending=True, stable=True)
        work, h = work[:, places].contiguous(), h[places][:, places]
    factor = _inverse_factor(h, damping).contiguous()
    codes = torch.empty(n, k, dtype=torch.int8, device=w.device)
    step = block_size if fixed_scales else -(-block_size // g) * g
    pass_over = _pass_over(work, min(step, k))
    for start in range(0, k, step):
        end = min(start + step, k)
        errors = work.new_empty(n, end - start)
        for first in range(start, end, step if fixed_scales else g):
            part = range(first, end if fixed_scales else first + g)
            if not fixed_scales:
                group = slice(first // g, first // g + 1)
                columns = slice(first, first + g)
                _, scales[:, group], z = scales_of(work[:, columns], columns)
                if zeros is not None and z is not None:
                    zeros[:, group] = z
            pass_over(work, factor, scales, zeros, places, codes, errors, start, part, bits)
        work[:, end:] -= errors @ factor[start:end, end:]
    return QuantizedWeight(codes if zeros is None else codes.to(torch.uint8), scales, zeros)


def _pass_over(work: Tensor, width: int) -> Callable[..., None]:
    """What takes a block's columns one by one: Triton, where it has a register for each."""
    if not work.is_cuda or work.dtype != torch.float32 or width > _TRITON_MAX_WIDTH:
        return _columns
    if importlib.util.find_spec("triton") is None:
        return _columns
    from .triton.gptq import columns

    return columns


def _columns(
    work: Tensor,
    factor: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    places: Tensor,
    codes: Tensor,
    errors: Tensor,
    start: int,
    part: range,
    bits: int,
) -> None:
    """Quantise columns ``part`` of ``work`` and correct those after them up to the block's end.

    ``places`` [K]: where each column lies in ``codes``; ``errors`` [N, width of the block from
    ``start``] takes what the columns beyond the block are corrected by.
    """
    end = start + errors.shape[1]
    g = codes.shape[1] // scales.shape[1]
    for i, place in zip(part, places[part.start : part.stop].tolist(), strict=True):
        group = slice(place // g, place // g + 1)
        s, z = scales[:, group], None if zeros is None else zeros[:, group]
        q = reference.quantize(work[:, i : i + 1], s, z, bits, None)
        codes[:, place] = q[:, 0]
        e = (work[:, i : i + 1] - (q if z is None else q - z) * s) / factor[i, i]
        work[:, i:end] -= e * factor[i, i:end]
        errors[:, i - start] = e[:, 0]


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with UᵀU = (H + damping)⁻¹. Overwrites ``h``."""
    diagonal = h.diagonal()
    mean = diagonal.mean() if diagonal.any() else diagonal.new_ones(())
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(h)
    upper = lower
    if not failed.item():
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed.item():
        raise ValueError(
            f"gptq: the Hessian with damping={damping} is not positive definite; use more data, "
            "more damping, or a float64 Hessian"
        )
    factor: Tensor = upper
    return factor
