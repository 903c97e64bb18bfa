"""Rotation and quantisation of activations in one step, to INT8, INT4, MXFP4 or NVFP4.

x [..., K] is cut into rows of R, rotated by h [R, R] (any matrix, in x's dtype) and quantised:

    xh = x.view(-1, R) @ h        float32 sums, not rounded before the quantisation

`method` chooses the scale of each group: "abs_max" from the largest magnitude, "quest" the multiple
of the group's spread that loses least on Gaussian data, which clips the tails. `return_mask` adds
the trust mask of straight-through training: element 8j + i is bit i of byte j, 1 where it was not
clipped. A group of zeros has codes 0; an infinity or a NaN makes its group's scale not finite.
The op `intlass::fused_quantize` (ops/fused_quantize.py) is one kernel on a GPU
(cuda/rotate_quantize.cu, on Hopper rotate_hopper.cu); here is the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import fp4, packing

# Of a unit Gaussian, the scale of least squared error: [-7, 7] and [-127, 127] by rms; e2m1 by its
# largest magnitude over the standard deviation (the constant of QuTLASS).
QUEST_INT = {4: 0.3534, 8: 0.0309}
QUEST_E2M1 = 2.92247856 / 6
_TINY = 1e-8
_ROTATIONS = (16, 32, 64, 128, 256)


_INTEGERS = ("int8", "int4")


class Plan(NamedTuple):
    """One call, checked: what the reference and the kernel both work from."""

    format: str  # int8, int4, mx, nv
    quest: bool
    r: int
    group_size: int
    global_scale: float
    layout: str = "packed"  # of int4: two codes a byte, "bytes" or "lanes" (packing.py)

    @property
    def bits(self) -> int:
        """That a code takes as it is stored."""
        wide = self.format == "int4" and self.layout != "packed"
        return 8 if self.format == "int8" or wide else 4

    def stored(self, k: int) -> tuple[int, torch.dtype]:
        """Columns and dtype of the codes of a row."""
        if self.bits == 4:
            return k // 2, torch.uint8
        lanes = self.format == "int4" and self.layout == "lanes"
        return (k // 4, torch.int32) if lanes else (k, torch.int8)


def fused_quantize_int8(
    x: Tensor,
    h: Tensor,
    *,
    method: str = "abs_max",
    group_size: int | None = None,
    return_mask: bool = False,
) -> tuple[Tensor, ...]:
    """(codes int8 [..., K] in [-127, 127], scales float32 [..., K/group_size][, mask]).

    group_size None: one scale per row. xh ≈ codes·scales, scale = amax / 127 or 0.0309·rms.
    ``x`` floating [..., K], ``h`` [R, R] with R in 16, 32, 64, 128, 256, taken in x's dtype; K is a
    multiple of R and of group_size, one of which divides the other. ``method``: "abs_max", or
    "quest", which clips. ``return_mask`` adds the mask uint8 [..., K/8] of what was not clipped. No
    gradient. Raises TypeError or ValueError naming the values that do not fit.

    >>> codes, scales = fused_quantize_int8(torch.ones(2, 32), torch.eye(16))
    >>> codes[0, 0], scales.shape
    (tensor(127, dtype=torch.int8), torch.Size([2, 1]))
    """
    plan = plan_of("fused_quantize_int8", "int8", x, h, method, group_size)
    return _run(x, h, plan, return_mask)


def fused_quantize_int4(
    x: Tensor,
    h: Tensor,
    *,
    method: str = "abs_max",
    group_size: int | None = None,
    return_mask: bool = False,
    packed: bool = True,
) -> tuple[Tensor, ...]:
    """(codes uint8 [..., K/2], two signed codes in [-7, 7] a byte, scales float32[, mask]).

    group_size None: one scale per row. xh ≈ codes·scales, scale = amax / 7 or 0.3534·rms.
    packed False: codes int8 [..., K]. Tensor cores of sm_90 and later take no INT4 activations: a
    GEMM with these codes computes the same and need not widen them first.
    Arguments and errors as in :func:`fused_quantize_int8`.

    >>> codes, scales = fused_quantize_int4(torch.ones(2, 32), torch.eye(16))
    >>> codes[0, 0], scales.shape  # 119 is 7 and 7
    (tensor(119, dtype=torch.uint8), torch.Size([2, 1]))
    """
    layout = "packed" if packed else "bytes"
    plan = plan_of("fused_quantize_int4", "int4", x, h, method, group_size, layout=layout)
    return _run(x, h, plan, return_mask)


def fused_quantize_mx(
    x: Tensor, h: Tensor, *, method: str = "quest", return_mask: bool = False
) -> tuple[Tensor, ...]:
    """MXFP4: (codes uint8 [..., K/2], scales float8_e8m0fnu [..., K/32][, mask]).

    quest    s = 2^floor(log2(2.92247856/6·std + 1e-8)), xh ≈ codes·s
    abs_max  s = 2^floor(log2(amax + 1e-8)),             xh ≈ codes·s / 3: give the GEMM alpha 1/3
                                                         (1/9 where both operands are so)
    Arguments and errors as in :func:`fused_quantize_int8`.

    >>> codes, scales = fused_quantize_mx(torch.ones(2, 64), torch.eye(32))
    >>> codes.shape, scales.shape
    (torch.Size([2, 32]), torch.Size([2, 2]))
    """
    plan = plan_of("fused_quantize_mx", "mx", x, h, method, 32)
    return _run(x, h, plan, return_mask)


def fused_quantize_nv(
    x: Tensor,
    h: Tensor,
    global_scale: float = 1.0,
    *,
    method: str = "abs_max",
    return_mask: bool = False,
) -> tuple[Tensor, ...]:
    """NVFP4: (codes uint8 [..., K/2], scales float8_e4m3fn [..., K/16][, mask]).

    s = e4m3(global_scale·amax / 6), or e4m3(global_scale·2.92247856/6·std) for quest;
    xh ≈ codes·s / global_scale: give the GEMM alpha 1/global_scale.
    Arguments and errors as in :func:`fused_quantize_int8`.

    >>> codes, scales = fused_quantize_nv(torch.ones(2, 64), torch.eye(32))
    >>> codes.shape, scales.shape
    (torch.Size([2, 32]), torch.Size([2, 4]))
    """
    plan = plan_of("fused_quantize_nv", "nv", x, h, method, 16, global_scale)
    return _run(x, h, plan, return_mask)


def plan_of(
    op: str,
    format_: str,
    x: Tensor,
    h: Tensor,
    method: str,
    group_size: int | None,
    global_scale: float = 1.0,
    layout: str = "packed",
) -> Plan:
    if not x.is_floating_point() or x.ndim == 0:
        raise TypeError(f"{op}: x is {x.dtype} {tuple(x.shape)}; expected floating [..., K]")
    if method not in ("abs_max", "quest"):
        raise ValueError(f"{op}: method={method!r}; expected 'abs_max' or 'quest'")
    k, r = x.shape[-1], h.shape[0] if h.ndim else 0
    if h.shape != (r, r) or r not in _ROTATIONS:
        raise ValueError(f"{op}: h is {tuple(h.shape)}; expected [R, R] with R in {_ROTATIONS}")
    if h.is_complex():
        raise TypeError(f"{op}: h has dtype {h.dtype}; expected a real one")
    g = k if group_size is None else group_size
    if not k or k % r:
        raise ValueError(f"{op}: K={k} is not a multiple of R={r}")
    if g < 8 or k % g:
        raise ValueError(f"{op}: K={k} is not a multiple of group_size={g}, or it is below 8")
    if max(g, r) % min(g, r):
        raise ValueError(f"{op}: of group_size={g} and R={r} one must divide the other")
    if layout == "lanes" and k % 32:
        raise ValueError(f"{op}: K={k} is not a multiple of 32, as lanes need")
    if not 0 < global_scale < float("inf"):
        raise ValueError(f"{op}: global_scale={global_scale} is not a positive number")
    return Plan(format_, method == "quest", r, g, float(global_scale), layout)


def _run(x: Tensor, h: Tensor, plan: Plan, return_mask: bool) -> tuple[Tensor, ...]:
    codes, scales, mask = torch.ops.intlass.fused_quantize(
        x,
        h,
        plan.format,
        "quest" if plan.quest else "abs_max",
        plan.group_size,
        plan.global_scale,
        return_mask,
        plan.layout,
    )
    if plan.format == "mx":
        scales = scales.view(torch.float8_e8m0fnu)
    if plan.format == "nv":
        scales = scales.view(torch.float8_e4m3fn)
    return (codes, scales, mask) if return_mask else (codes, scales)


def reference(x: Tensor, h: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (packed unless INT8), scales (FP8 as bytes) and mask, in float32 arithmetic."""
    rotated = x.float().reshape(-1, plan.r) @ h.to(x.dtype).float()
    return quantize_rotated(rotated.view(x.shape), plan)


def quantize_rotated(rotated: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the rotation: `reference` of float32 [..., K] that are rotated already."""
    shape, k = rotated.shape, rotated.shape[-1]
    groups = rotated.reshape(*shape[:-1], k // plan.group_size, plan.group_size)
    stored, factor, divisor = _group_scales(groups, plan)
    y = groups * factor / divisor
    if plan.format in _INTEGERS:
        qmax = 127 if plan.format == "int8" else 7
        q = torch.round(y)
        mask = q.abs() <= qmax
        codes = q.clamp(-qmax, qmax).nan_to_num(0.0).to(torch.int8).reshape(shape)
    else:
        # abs_max of MX multiplies by 3 after the scale; the mask is about what the scale leaves.
        mask = y.abs() < fp4.E2M1_MAX * (3 if plan.format == "mx" and not plan.quest else 1)
        codes = fp4.encode_e2m1(y).reshape(shape)
    if plan.bits == 4:
        codes = packing.pack(codes)
    elif plan.layout == "lanes":
        codes = packing.to_lanes(codes)
    bits = mask.reshape(*shape[:-1], k // 8, 8).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=rotated.device)
    return codes, stored.squeeze(-1), (bits << places).sum(-1, dtype=torch.uint8)


def _group_scales(groups: Tensor, plan: Plan) -> tuple[Tensor, float, Tensor]:
    """(scale as stored, factor, divisor) of groups [..., g]; codes round xh·factor / divisor."""
    amax = groups.abs().amax(-1, keepdim=True)
    if plan.format in _INTEGERS:
        bits = 8 if plan.format == "int8" else 4
        # by a tensor: CUDA would multiply by a Python number's reciprocal
        scale = amax / torch.full_like(amax, 2 ** (bits - 1) - 1)
        if plan.quest:
            scale = QUEST_INT[bits] * groups.square().mean(-1, keepdim=True).sqrt()
        scale = torch.where(scale == 0, 1.0, scale)
        return scale, 1.0, scale
    centred = groups - groups.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    if plan.format == "mx":
        code = fp4.e8m0_floor_code((QUEST_E2M1 * spread if plan.quest else amax) + _TINY)
        return code, 1.0 if plan.quest else 3.0, fp4.e8m0_values(code).float()
    sixth = amax / torch.full_like(amax, fp4.E2M1_MAX)
    base = plan.global_scale * (QUEST_E2M1 * spread if plan.quest else sixth)
    scale = fp4.encode_e4m3(torch.where(base.isfinite(), base, torch.nan))
    value = scale.float()
    # A scale too small for e4m3 is 0 and stands for a group of zeros.
    divisor = torch.where(value == 0, torch.inf, value)
    return scale.view(torch.uint8), plan.global_scale, divisor
