"""FP4 GEMMs on a GPU: one launch of fp4.cu, or operands decoded for a dense product.

Not here: which of the two (ops/block_scaled.py), the configuration (config/).
"""

from __future__ import annotations

import importlib.util
import struct

import torch
from torch import Tensor

from .. import config, fp4, packing
from . import jit
from .kernel import Launch
from .plans import ALIGNMENT, TYPE, Key, device_of, remember, signature

_PARAMS = struct.Struct("=13q")
_WORDS = 6  # pointers, which come first
_KIND = {torch.uint8: "e2m1", torch.bfloat16: "bf16", torch.float16: "fp16"}

_plans: dict[Key, tuple[Launch, str]] = {}


def run(
    x: Tensor,
    w: Tensor,
    x_scales: Tensor | None,
    w_scales: Tensor,
    blocked: bool,
    alpha: Tensor | None,
    m: int,
    n: int,
    k: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, str]:
    """(y [M, N], name of the kernel) of checked operands, x as [M, ...]."""
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    if y.numel() == 0 or k == 0:
        return y.zero_(), "nothing to compute"
    x, w = _readable(x), _readable(w)
    w_scales = w_scales.contiguous()
    if x_scales is not None:
        x_scales = x_scales.contiguous()
    if alpha is not None:
        alpha = alpha.float()
    scale_words = all(s is None or s.data_ptr() % 4 == 0 for s in (x_scales, w_scales))
    key = (signature(x), signature(w), w_scales.dtype, blocked, scale_words, out_dtype)
    plan = _plans.get(key)
    if plan is None:
        group = 32 if w_scales.dtype == torch.float8_e8m0fnu else 16
        c = config.pick_fp4(
            device_of(x.device.index),
            _KIND[x.dtype],
            "e8m0" if group == 32 else "e4m3",
            TYPE[out_dtype],
            blocked,
            scale_words and (k // group) % 4 == 0,
            m,
            n,
            k,
        )
        row = -(-k // group // 4) if blocked else k // group
        strides = x.stride(0) * x.element_size(), w.stride(0)
        parameters = _PARAMS.pack(*[0] * _WORDS, m, n, k, *strides, row, row)
        kernel = jit.get(c, x.device.index)
        launch = kernel.bind(c.grid(m, n), (c.threads, 1, 1), 0, parameters, _WORDS)
        plan = remember(_plans, key, (launch, str(c)))
    launch, name = plan
    launch(
        (
            x.data_ptr(),
            w.data_ptr(),
            0 if x_scales is None else x_scales.data_ptr(),
            w_scales.data_ptr(),
            0 if alpha is None else alpha.data_ptr(),
            y.data_ptr(),
        ),
        torch._C._cuda_getCurrentRawStream(x.device.index),
    )
    return y, name


def _readable(t: Tensor) -> Tensor:
    """Unit stride along K, and rows that start where a lane's load of eight k may."""
    step = 4 if t.dtype == torch.uint8 else ALIGNMENT
    row = t.stride(0) * t.element_size()
    if t.stride(1) == 1 and row % step == 0 and t.data_ptr() % step == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def decode(
    codes: Tensor, scales: Tensor, blocked: bool, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(d [R, K], f) with d·f = codes · scales exactly, in bf16, or fp16 for e4m3 scales.

    f is 4 for e8m0, whose largest scales leave no room for codes above 1.
    """
    shift = 4.0 if scales.dtype == torch.float8_e8m0fnu else 1.0
    codes, scales = codes.contiguous(), scales.contiguous()
    if importlib.util.find_spec("triton") is not None:
        from ..triton import decode_blocks

        return decode_blocks.decode(codes, scales, blocked, dtype, 1 / shift), shift
    four_bits = codes.dtype == torch.uint8
    rows, k = codes.shape[0], codes.shape[1] * (2 if four_bits else 1)
    groups = k // (32 if shift == 4.0 else 16)
    plain = fp4.from_blocked(scales, rows, groups) if blocked else scales
    values = fp4.decode_e2m1(packing.unpack(codes, k, False)) if four_bits else codes.float()
    factors = fp4.scale_values(plain, torch.float64) / shift
    return (values.view(rows, groups, -1) * factors[:, :, None]).view(rows, k).to(dtype), shift
