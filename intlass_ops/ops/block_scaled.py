"""GEMMs of the OCP microscaling formats and NVFP4: the functions that people call.

Not here: the op that they all call, its checks and kernels (block_scaled_kernels.py), the formats
(fp4.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import require_dtype
from .block_scaled_kernels import FORMATS


def _call(
    op: str,
    format_: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    alpha: Tensor | float | None,
    out_dtype: torch.dtype | None,
    blocked: bool,
    b_is_kn: bool = False,
) -> Tensor:
    codes, scales, _ = FORMATS[format_]
    for name, t, dtype in (
        ("b", b, codes),
        ("a_scale", a_scale, scales),
        ("b_scale", b_scale, scales),
    ):
        if t is not None:
            require_dtype(op, name, t.dtype, (dtype,))
    if a_scale is not None:
        require_dtype(op, "a", a.dtype, (codes,))
        a, a_scale = a.view(torch.uint8), a_scale.view(torch.uint8)
    b, b_scale = b.view(torch.uint8), b_scale.view(torch.uint8)
    if alpha is not None and not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=torch.float32, device=a.device)
    y: Tensor = torch.ops.intlass.matmul_block_scaled(
        a, b, a_scale, b_scale, format_, blocked, b_is_kn, alpha, out_dtype
    )
    return y


def matmul_mxf4_bf16_tn(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    alpha: Tensor | float | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """MXFP4 GEMM: y[..., n] = alpha · Σ_k a[..., k]·b[n, k], both in e2m1 with e8m0 scales of 32 k.

    ``a`` uint8 [..., K/2], ``b`` uint8 [N, K/2], the even element in the low nibble; ``a_scale``
    and ``b_scale`` float8_e8m0fnu in the order of `to_blocked`. With ``a`` bf16, fp16 or fp32 [...,
    K] and ``a_scale`` None only the weights are FP4 (W4A16; fp32 has no kernel of its own).
    ``out_dtype``: bf16, or that of a floating ``a``. K is a multiple of 32, M and N are any. No FP4
    units are needed: bf16 holds a code times its scale exactly. Sums are float32's; on a CPU those
    of two FP4 operands float64's. Large products of two FP4 operands are INT8's on Hopper where the
    scales of each row lie within a factor of 8: exact, up to 1.7 times as fast, with N·K + M·K
    bytes of workspace.

    Returns [..., N], differentiable in a floating ``a``. TypeError, ValueError: see the message.

    >>> from intlass_ops.fp4 import to_blocked
    >>> ones = torch.full((1, 16), 0x22, dtype=torch.uint8)  # 2 is the code of 1.0
    >>> two = to_blocked(torch.full((1, 1), 2.0).to(torch.float8_e8m0fnu))
    >>> matmul_mxf4_bf16_tn(ones, ones, two, two, torch.tensor(1.0))
    tensor([[128.]], dtype=torch.bfloat16)
    """
    op = "matmul_mxf4_bf16_tn"
    return _call(op, "mxf4", a, b, a_scale, b_scale, alpha, out_dtype, blocked=True)


def matmul_ada_mxf4_bf16_tn(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    alpha: Tensor | float | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`matmul_mxf4_bf16_tn` with plain scales, [..., K/32] and [N, K/32].

    >>> ones = torch.full((1, 16), 0x22, dtype=torch.uint8)
    >>> two = torch.full((1, 1), 2.0).to(torch.float8_e8m0fnu)
    >>> matmul_ada_mxf4_bf16_tn(ones, ones, two, two, torch.tensor(1.0))
    tensor([[128.]], dtype=torch.bfloat16)
    """
    op = "matmul_ada_mxf4_bf16_tn"
    return _call(op, "mxf4", a, b, a_scale, b_scale, alpha, out_dtype, blocked=False)


def matmul_nvf4_bf16_tn(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    alpha: Tensor | float | None = None,
    *,
    blocked: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """NVFP4: as :func:`matmul_mxf4_bf16_tn` with float8_e4m3fn scales of 16 k.

    alpha is 1 / (global scale of a · global scale of b). ``blocked`` False: plain scales.

    >>> from intlass_ops.fp4 import to_blocked
    >>> ones = torch.full((1, 16), 0x22, dtype=torch.uint8)
    >>> two = to_blocked(torch.full((1, 2), 2.0).to(torch.float8_e4m3fn))
    >>> matmul_nvf4_bf16_tn(ones, ones, two, two, torch.tensor(1.0))
    tensor([[128.]], dtype=torch.bfloat16)
    """
    op = "matmul_nvf4_bf16_tn"
    return _call(op, "nvf4", a, b, a_scale, b_scale, alpha, out_dtype, blocked)


def matmul_mxf8_bf16_tn(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    alpha: Tensor | float | None = None,
    *,
    blocked: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """MXFP8: as :func:`matmul_mxf4_bf16_tn`, a [..., K] and b [N, K] in float8_e4m3fn.

    >>> from intlass_ops.fp4 import to_blocked
    >>> ones = torch.ones(1, 32).to(torch.float8_e4m3fn)
    >>> two = to_blocked(torch.full((1, 1), 2.0).to(torch.float8_e8m0fnu))
    >>> matmul_mxf8_bf16_tn(ones, ones, two, two, torch.tensor(1.0))
    tensor([[128.]], dtype=torch.bfloat16)
    """
    op = "matmul_mxf8_bf16_tn"
    return _call(op, "mxf8", a, b, a_scale, b_scale, alpha, out_dtype, blocked)


def matmul_mxf8_bf16_nn(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    alpha: Tensor | float | None = None,
    *,
    blocked: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`matmul_mxf8_bf16_tn` with b [K, N]; its scales are still those of [N, K/32].

    >>> from intlass_ops.fp4 import to_blocked
    >>> ones = torch.ones(1, 32).to(torch.float8_e4m3fn)
    >>> two = to_blocked(torch.full((1, 1), 2.0).to(torch.float8_e8m0fnu))
    >>> matmul_mxf8_bf16_nn(ones, ones.T, two, two, torch.tensor(1.0))
    tensor([[128.]], dtype=torch.bfloat16)
    """
    op = "matmul_mxf8_bf16_nn"
    return _call(op, "mxf8", a, b, a_scale, b_scale, alpha, out_dtype, blocked, b_is_kn=True)
