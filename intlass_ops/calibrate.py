"""Post-training weight quantisers: weight (and statistics of its inputs) -> codes, scales, zeros.

    rtn   round to nearest, scale from the largest magnitude
    mse   least Σ(w - ŵ)² of each group, exact (scales/)
    hqq   half-quadratic: least Σ|w - ŵ|^p over floating zeros; no data
    gptq  error feedback through the Hessian of the layer's inputs
    awq   a scale per input channel, searched for least output error, before rounding

All return the canonical form w ≈ (codes - zeros)·scales with groups along K. Their Hessian is
H = Σ xᵀx over the inputs x of the layer (`InputStatistics`), so that the squared output error of a
quantised weight is tr((w - ŵ) H (w - ŵ)ᵀ). Not here: replacing modules (quantize.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, scales


class QuantizedWeight(NamedTuple):
    """w[N, K] ≈ (codes - zeros)·scales.

    >>> codes = torch.tensor([[1, -2]], dtype=torch.int8)
    >>> QuantizedWeight(codes, torch.tensor([[0.5]]), None).dequantize()
    tensor([[ 0.5000, -1.0000]])
    """

    codes: Tensor  # [N, K] int8, or uint8 in [0, 15] where there are zeros
    scales: Tensor  # [N, K/group_size] float32
    zeros: Tensor | None  # [N, K/group_size] int32, or float32 from hqq; None: symmetric

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        n, k = self.codes.shape
        s = reference.expand_groups(self.scales, n, k)
        if self.zeros is None:
            return self.codes * s
        return (self.codes.float() - reference.expand_groups(self.zeros.float(), n, k)) * s


class InputStatistics:
    """Sums over the inputs of one linear layer; memory K² floats, whatever the amount of data.

    hessian [K, K] = Σ xᵀx and mean_abs [K] = mean |x|, in ``dtype``, over all tokens seen.

    >>> statistics = InputStatistics(2)
    >>> statistics.update(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    >>> statistics.hessian
    tensor([[1., 2.],
            [2., 5.]])
    """

    def __init__(
        self,
        k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(k, k, dtype=dtype, device=device)
        self._sum_abs = torch.zeros(k, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add activations [..., K]."""
        k = self.hessian.shape[0]
        if x.shape[-1] != k:
            raise ValueError(f"InputStatistics: x has {x.shape[-1]} features, the layer has K={k}")
        rows = x.reshape(-1, k).to(self.hessian)
        self.hessian.addmm_(rows.T, rows)
        self._sum_abs += rows.abs().sum(0)
        self.tokens += rows.shape[0]

    @property
    def mean_abs(self) -> Tensor:
        return self._sum_abs / max(self.tokens, 1)


class QuantizationError(NamedTuple):
    """How far ŵ is from w. ``output`` is relative too: ‖(w - ŵ)xᵀ‖ / ‖w xᵀ‖; None without data."""

    mse: float
    relative: float  # ‖w - ŵ‖ / ‖w‖
    largest: float
    sqnr_db: float  # -20·log10(relative)
    output: float | None


def quantization_error(
    w: Tensor, w_hat: Tensor, hessian: Tensor | None = None
) -> QuantizationError:
    """Error metrics of an approximation; ``hessian`` [K, K] is that of the layer's inputs.

    >>> round(quantization_error(torch.ones(2, 2), torch.full((2, 2), 0.9)).relative, 3)
    0.1
    """
    if w.shape != w_hat.shape:
        raise ValueError(
            f"quantization_error: w is {tuple(w.shape)}, its approximation {tuple(w_hat.shape)}"
        )
    w, r = w.double(), w.double() - w_hat.double()
    relative = r.norm() / w.norm() if w.any() else r.norm()
    output = None
    if hessian is not None:
        output = float(output_error(r, hessian) / output_error(w, hessian)) ** 0.5
    return QuantizationError(
        mse=float(r.square().mean()),
        relative=float(relative),
        largest=float(r.abs().max()),
        sqnr_db=float(-20 * relative.log10()),
        output=output,
    )


def output_error(residual: Tensor, hessian: Tensor) -> Tensor:
    """tr(R H Rᵀ) of residuals R [N, K]: the squared error of the layer's output. A scalar."""
    return ((residual @ hessian.to(residual)) * residual).sum()


def rtn(
    w: Tensor, *, bits: int = 4, group_size: int | None = None, symmetric: bool = True
) -> QuantizedWeight:
    """Round ``w`` [N, K] to nearest; scale = amax / qmax, or the range over 2^bits - 1.

    >>> rtn(torch.tensor([[7.0, -3.2, 0.4, 1.0]])).dequantize()
    tensor([[ 7., -3.,  0.,  1.]])
    """
    _check("rtn", w, bits, group_size, symmetric)
    if symmetric:
        naive = scales.int4_naive if bits == 4 else scales.int8_naive
        s, q = naive(w, group_size=group_size)
        return QuantizedWeight(q, s, None)
    s, z, q = scales.uint4_naive(w, group_size=group_size)
    return QuantizedWeight(q, s, z)


def mse(
    w: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    weights: Tensor | None = None,
) -> QuantizedWeight:
    """Least Σ weights·(w - ŵ)² of each group over all scales (and zeros); see scales/.

    >>> mse(torch.tensor([[7.0, -3.2, 0.4, 1.0]])).dequantize()
    tensor([[ 7.0712, -3.0305,  0.0000,  1.0102]])
    """
    _check("mse", w, bits, group_size, symmetric)
    if symmetric:
        optimal = scales.int4_optimal if bits == 4 else scales.int8_optimal
        s, q = optimal(w, group_size=group_size, weights=weights)
        return QuantizedWeight(q, s, None)
    s, z, q = scales.uint4_optimal(w, group_size=group_size, weights=weights)
    return QuantizedWeight(q, s, z)


def hqq(
    w: Tensor,
    *,
    group_size: int | None = 64,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QuantizedWeight:
    """u4 codes with floating zeros that lessen Σ|w - ŵ|^p, 0 < p < 1, of each group.

    The scale is that of the group's range. With an auxiliary e for the error w - ŵ, alternate
        e = sign(r)·max(|r| - |r|^(p-1)/β, 0),  r = w - ŵ      (the ℓp proximal step)
        z = mean(q - (w - e)/s)                                 (least squares)
    while β grows by κ; each group keeps the best zero it met, the first being round-to-nearest's.
    Method: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).

    >>> hqq(torch.tensor([[7.0, -3.2, 0.4, 1.0]]), group_size=4).codes
    tensor([[15,  0,  5,  6]], dtype=torch.uint8)
    """
    _check("hqq", w, 4, group_size, False)
    if not 0 < p < 1:
        raise ValueError(f"hqq: p={p} is not between 0 and 1")
    n, k = w.shape
    s, z, _ = scales.uint4_naive(w, group_size=group_size)
    x = w.detach().float().reshape(s.numel(), k // s.shape[1])
    scale, zero = s.reshape(-1, 1), z.reshape(-1, 1).float()
    # Groups are independent: on a CPU in blocks that stay in its cache.
    rows = max(1, _CPU_BLOCK // max(x.shape[1], 1)) if x.device.type == "cpu" else x.shape[0]
    blocks = zip(x.split(rows), scale.split(rows), zero.split(rows), strict=True)
    codes, zeros = zip(
        *(_half_quadratic(*block, p, beta, kappa, iterations) for block in blocks), strict=True
    )
    return QuantizedWeight(torch.cat(codes).view(n, k), s, torch.cat(zeros).view(s.shape))


_CPU_BLOCK = 1 << 16


def _half_quadratic(
    x: Tensor, scale: Tensor, zero: Tensor, p: float, beta: float, kappa: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """(codes, zeros) of groups x [G, g] with scales and first zeros [G, 1]."""
    codes = reference.quantize(x, scale, zero, 4, None)
    best_zero, best_codes = zero, codes
    best = (x - (codes - zero) * scale).abs().pow(p).sum(-1, keepdim=True)
    for _ in range(iterations):
        r = x - (codes - zero) * scale
        e = r.sign() * (r.abs() - r.abs().pow(p - 1) / beta).clamp(min=0)
        zero = (codes - (x - e) / scale).mean(-1, keepdim=True)
        codes = reference.quantize(x, scale, zero, 4, None)
        error = (x - (codes - zero) * scale).abs().pow(p).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_zero = torch.where(better, zero, best_zero)
        best_codes = torch.where(better, codes, best_codes)
        beta *= kappa
    return best_codes.to(torch.uint8), best_zero


def awq(
    w: Tensor,
    hessian: Tensor,
    *,
    mean_abs: Tensor | None = None,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    optimal_scales: bool = False,
    steps: int = 20,
    powers_of_two: bool = False,
) -> tuple[QuantizedWeight, Tensor]:
    """Quantise w·c for the channel scales c [K] of least output error; returns (weight, c).

    The layer then computes (x / c) @ ŵᵀ: divide its input by c, or fold 1/c into what makes it.
    c = m^α / √(max·min), α in {0, 1/steps, …, 1 - 1/steps}, m = ``mean_abs`` [K] of the inputs, by
    default their root mean square from H. α = 0 is no scaling, so the result is never worse.
    ``powers_of_two`` rounds c to such: x / c is then exact in any floating-point type.
    Method: Lin et al., "AWQ: Activation-aware Weight Quantization" (2023).

    >>> weight, c = awq(torch.tensor([[7.0, -3.2, 0.4, 1.0]]), torch.eye(4))
    >>> weight.dequantize() / c
    tensor([[ 7., -3.,  0.,  1.]])
    """
    _check("awq", w, bits, group_size, symmetric)
    h = _checked_hessian("awq", w, hessian)
    quantize = mse if optimal_scales else rtn
    magnitude = h.diagonal().clamp(min=0).sqrt() if mean_abs is None else mean_abs.to(h)
    # Channels never seen keep a scale in the middle of the others.
    seen = magnitude > 0
    magnitude = torch.where(seen, magnitude, magnitude[seen].median() if seen.any() else 1.0)
    x = w.detach().to(h.dtype)
    best: tuple[float, QuantizedWeight, Tensor] | None = None
    for step in range(steps):
        c = magnitude ** (step / steps)
        c = (c / (c.max() * c.min()).sqrt()).float()
        c = c.log2().round().exp2() if powers_of_two else c
        q = quantize(x * c, bits=bits, group_size=group_size, symmetric=symmetric)
        error = float(output_error(q.dequantize() / c - x, h))
        if best is None or error < best[0]:
            best = (error, q, c)
    if best is None:
        raise ValueError(f"awq: steps={steps} leaves nothing to try")
    return best[1], best[2]


def _check(op: str, w: Tensor, bits: int, group_size: int | None, symmetric: bool) -> None:
    if w.ndim != 2:
        raise ValueError(f"{op}: expected a weight [N, K], got shape {tuple(w.shape)}")
    if not w.is_floating_point():
        raise TypeError(f"{op}: w has dtype {w.dtype}; expected a floating one")
    k = w.shape[1]
    if not k or (group_size is not None and (group_size < 1 or k % group_size)):
        raise ValueError(f"{op}: K={k} is not a multiple of group_size={group_size or k}")
    if bits not in (4, 8):
        raise ValueError(f"{op}: bits={bits}; expected 4 or 8")
    if bits == 8 and not symmetric:
        raise ValueError(f"{op}: 8-bit weights are symmetric; set symmetric=True")


def _checked_hessian(op: str, w: Tensor, hessian: Tensor) -> Tensor:
    k = w.shape[1]
    if hessian.shape != (k, k):
        raise ValueError(f"{op}: hessian is {tuple(hessian.shape)}, expected {(k, k)}")
    if not bool(hessian.isfinite().all()):
        raise ValueError(f"{op}: the Hessian holds an infinity or a NaN")
    return hessian.to(w.device, torch.promote_types(hessian.dtype, torch.float32))
