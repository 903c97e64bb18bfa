"""A linear on quantised operands as a function with a gradient: what `QATLinear` computes (qat.py).

Forward the GEMMs of inference; backward the formulas that qat.py gives, in floating point or INT8.
The passes over memory around the integer products are ops (ops/training.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import config, packing
from .ops import matmul_int4_bf16_tn, matmul_int8_bf16_tn

SCHEMES = {"w4a4": (4, 4), "w4a8": (4, 8), "w8a8": (8, 8)}  # bits of weights and activations


def quantise(
    t: Tensor, h: Tensor, bits: int, method: str, *, layout: str = "packed", mask: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, of INT4 in a layout, scales [rows, 1], mask, empty if unwanted) of rows [R, K]."""
    codes, scales, kept = torch.ops.intlass.fused_quantize(
        t, h, f"int{bits}", method, t.shape[1], 1.0, mask, layout
    )
    return codes, scales, kept


def quantise_activations(
    x: Tensor, h: Tensor, bits: int, method: str, *, mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in the form that a product takes fastest: GPUs from sm_90 on would widen INT4.

    Where torch.compile leaves the number of tokens open, kernels that take bytes may be needed.
    """
    major = torch.cuda.get_device_properties(x.device).major if x.is_cuda else 0
    lanes = config.makes_lanes(major, h.shape[0], mask)
    lanes = lanes and _is_known(x.shape[0] > config.SKINNY_MAX_M)
    layout = "packed" if major < 9 else "lanes" if lanes else "bytes"
    return quantise(x, h, bits, method, layout=layout, mask=mask)


def _is_known(condition: Any) -> bool:
    """Whether a condition on sizes holds, whatever torch.compile leaves open."""
    if torch.compiler.is_compiling() or type(condition) is not bool:
        # It brings SymPy, most of the time that importing this package would take.
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def product(
    xq: Tensor,
    sx: Tensor,
    wq: Tensor,
    sw: Tensor,
    bias: Tensor | None,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    if wq.dtype == torch.uint8:
        return matmul_int4_bf16_tn(xq, wq, sw, k=k, a_scale=sx, bias=bias, out_dtype=dtype)
    return matmul_int8_bf16_tn(xq, wq, sx, sw, bias=bias, out_dtype=dtype)


def _codes(q: Tensor, k: int) -> Tensor:
    return packing.unpack(q, k, signed=True) if q.dtype == torch.uint8 else q


class StraightThrough(torch.autograd.Function):
    """y of rows x [M, K] and weight [N, K]; ``h`` the rotation, the rest as in `QATConfig`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        h: Tensor,
        scheme: str,
        method: str,
        backward: str,
    ) -> Tensor:
        w_bits, a_bits = SCHEMES[scheme]
        xq, sx, x_mask = quantise_activations(x, h, a_bits, method, mask=True)
        wq, sw, w_mask = quantise(weight, h, w_bits, method)
        ctx.save_for_backward(xq, sx, x_mask, wq, sw, w_mask, h)
        ctx.backward_in, ctx.dtypes = backward, (x.dtype, weight.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(xq, sx, wq, sw, bias, x.shape[1], x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xq, sx, x_mask, wq, sw, w_mask, h = ctx.saved_tensors
        dx = dw = db = None
        if any(ctx.needs_input_grad[:2]):
            products = (
                _int8_products if ctx.backward_in == "int8" and dy.numel() else _float_products
            )
            k = 8 * x_mask.shape[1]
            dx, dw = products(dy, xq, sx, wq, sw, k, ctx.dtypes, ctx.needs_input_grad)
        if dx is not None:
            dx = torch.ops.intlass.rotate_back(dx, x_mask, h)
        if dw is not None:
            dw = torch.ops.intlass.rotate_back(dw, w_mask, h)
        if ctx.needs_input_grad[2]:
            db = dy.float().sum(0).to(ctx.bias_dtype)
        return dx, dw, db, None, None, None, None


Products = tuple[Tensor | None, Tensor | None]


def _float_products(
    dy: Tensor,
    xq: Tensor,
    sx: Tensor,
    wq: Tensor,
    sw: Tensor,
    k: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, ...],
) -> Products:
    """dy ŵ and dyᵀ x̂ in the dtypes of x and w: the scale joins the operand that is no integer."""
    dx = dw = None
    if wanted[0]:
        dx = (dy.float() * sw.T).to(dtypes[0]) @ _codes(wq, k).to(dtypes[0])
    if wanted[1]:
        dw = (dy.float() * sx).to(dtypes[1]).T @ _codes(xq, k).to(dtypes[1])
    return dx, dw


def _int8_products(
    dy: Tensor,
    xq: Tensor,
    sx: Tensor,
    wq: Tensor,
    sw: Tensor,
    k: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, ...],
) -> Products:
    """The same of dy ⊙ sw and (dy ⊙ sx)ᵀ rounded to INT8, row by row and stochastically."""
    ops = torch.ops.intlass
    seed = torch.randint(2**62, (1,), device=dy.device)
    q, s, qt, st = ops.quantize_gradient(dy, sx, sw, seed)
    one = torch.ones((), device=dy.device)
    dx = dw = None
    if wanted[0]:
        dx = matmul_int8_bf16_tn(q, ops.transpose_codes(wq, k), s, one, out_dtype=dtypes[0])
    if wanted[1]:
        dw = matmul_int8_bf16_tn(qt, ops.transpose_codes(xq, k), st, one, out_dtype=dtypes[1])
    return dx, dw
