"""FP4 GEMMs on a GPU: the kernels for 16-bit activations, with e2m1 for weights; and decoding.

Not here: how codes and scales become fragments (fp4.cuh), which kernel (config/fp4.py), what
happens where none fits (ops/block_scaled_kernels.py).
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from .. import config, fp4, packing
from . import jit, launch, launch_mx
from .kernel import Launch
from .plans import ALIGNMENT, TYPE, Key, aligned, device_of, empty, remember, signature

_SCALES = {torch.float8_e8m0fnu: ("e8m0", 32), torch.float8_e4m3fn: ("e4m3", 16)}

_KINDS = {torch.uint8: "e2m1", torch.bfloat16: "bf16", torch.float16: "fp16"}
_DTYPES = {kind: dtype for dtype, kind in _KINDS.items()}

# The plan and its name; or None and what FP4 activations are decoded to first. None: no kernel
_plans: dict[Key, tuple[launch.MatmulPlan | None, str] | None] = {}
_decoders: dict[Key, Launch] = {}


def run(
    x: Tensor,
    w: Tensor,
    x_scales: Tensor | None,
    w_scales: Tensor,
    blocked: bool,
    alpha: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, str] | None:
    """(y [M, N], name of the kernel) of checked operands, x as [M, ...]; None if no kernel fits."""
    w_scales = _readable(w_scales, ALIGNMENT)
    x_scales = None if x_scales is None else _readable(x_scales)
    if not aligned(x) or x.stride(1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    operands = w, w_scales, blocked, alpha, k, out_dtype
    few = config.SKINNY_MAX_M
    done = _run(x, x_scales, *operands)
    if done is not None or not few < x.shape[0] <= config.FP4_MAX_M:
        return done
    parts, name = [], ""
    for first in range(0, x.shape[0], few):
        scales = x_scales
        if scales is not None and first:
            scales = _readable(scales.view(-1)[_offset(first, scales.dtype, blocked, k) :])
        done = _run(x[first : first + few], scales, *operands)
        if done is None:
            return None
        parts.append(done[0])
        name = done[1]
    return torch.cat(parts), name


def _run(
    x: Tensor,
    x_scales: Tensor | None,
    w: Tensor,
    w_scales: Tensor,
    blocked: bool,
    alpha: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    x_unit: int = 1,
    lane_order: bool = False,
    begun: launch_mx.Begun | None = None,
) -> tuple[Tensor, str] | None:
    """One product. ``x_unit``: what decoded activations were divided by; ``lane_order``: theirs.

    ``begun``: it was computed as INT8 if it could be, and is computed here if not.
    """
    out, flag, _ = begun or (None, None, "")
    only_if = -1 if flag is None else 1
    key = (
        signature(x),
        signature(w),
        w_scales.dtype,
        blocked,
        x_unit,
        lane_order,
        only_if,
        out_dtype,
        None if alpha is None else alpha.dtype,
        w.data_ptr() % ALIGNMENT,
    )
    if key in _plans:
        planned = _plans[key]
    else:
        kind = _KINDS[x.dtype]
        in_vectors = aligned(w) and w.stride(1) == 1
        shape = _shape(kind, x.shape[0], w.shape, in_vectors, w_scales.dtype, out_dtype, blocked)
        c = config.pick_fp4(device_of(x.device.index), shape)
        planned = None
        if isinstance(c, config.Hopper) and x_scales is not None:
            planned = None, c.x_kind
        elif c is not None:
            if isinstance(c, config.Hopper):
                c = replace(c, x_unit=x_unit, lane_order=lane_order, only_if=only_if)
            group = shape.group_size
            row = -(-k // group // 4) if blocked else k // group
            codes = map(launch.dtype_code, (None, alpha, None, None))
            rest = group, row, 1, 0, 0, row, 0, *codes
            planned = launch.bind(c, x, w, w.shape[0], k, out_dtype, rest), str(c)
        remember(_plans, key, planned)
    if planned is None:
        return None
    plan, name = planned
    if plan is None:
        assert x_scales is not None
        return _decoded(x.contiguous(), x_scales, w, w_scales, blocked, alpha, k, out_dtype, name)
    y = plan.run(x, w, w_scales, None, x_scales, None, alpha, None, out=out, flag=flag)
    return y, name


def _decoded(
    x: Tensor,
    x_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    blocked: bool,
    alpha: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    kind: str,
) -> tuple[Tensor, str] | None:
    """A product of activations that hopper.cu takes as ``kind``, or as INT8 where that is exact."""
    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    shape = _shape("e2m1", x.shape[0], w.shape, True, w_scales.dtype, out_dtype, blocked)
    begun = launch_mx.begin(x, w, x_scales, w_scales, blocked, alpha, shape, out_dtype)
    flag = None if begun is None else begun.flag
    x, unit = _decode_fp4(x, x_scales, blocked, kind, lane_order=True, flag=flag)
    rest = w, w_scales, blocked, alpha, k, out_dtype, int(unit)
    done = _run(x, None, *rest, lane_order=True, begun=begun)
    if done is None or begun is None:
        return done
    return done[0], f"{begun.kernel}; scales of a row beyond a factor of 8: {done[1]}"


@functools.lru_cache
def _shape(
    x_kind: str,
    m: int,
    w_shape: torch.Size,
    aligned: bool,
    scales: torch.dtype,
    out_dtype: torch.dtype,
    blocked: bool,
) -> config.Shape:
    scale_type, group_size = _SCALES[scales]
    return config.Shape(
        x_kind=x_kind,
        w_kind="e2m1",
        scale_type=scale_type,
        zero_type="float",
        out_type=TYPE[out_dtype],
        has_zeros=False,
        has_a_zero=False,
        aligned=aligned,
        m=m,
        n=w_shape[0],
        k=2 * w_shape[1],
        group_size=group_size,
        blocked=blocked,
    )


def _readable(scales: Tensor, alignment: int = 4) -> Tensor:
    """Contiguous, from where a lane may read so many at once."""
    scales = scales.contiguous()
    return scales if scales.data_ptr() % alignment == 0 else scales.clone()


def _offset(token: int, scales: torch.dtype, blocked: bool, k: int) -> int:
    """Bytes of the scales before those of a token, a multiple of 16, and of 15 tokens after it."""
    groups = k // _SCALES[scales][1]
    if not blocked:
        return token * groups
    tile = token // 128 * -(-groups // 4)
    return tile * 512 + token % 32 * 16 + token % 128 // 32 * 4


def decode(
    codes: Tensor, scales: Tensor, blocked: bool, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(d [R, K], f) with d·f = codes · scales exactly, in bf16, or fp16 for e4m3 scales.

    f makes room for the largest scales beside the largest codes.
    """
    codes, scales = codes.contiguous(), _readable(scales)
    four_bits = codes.dtype == torch.uint8
    if four_bits and dtype == torch.bfloat16:
        return _decode_fp4(codes, scales, blocked, "bf16", lane_order=False)
    shift = 4.0 if scales.dtype == torch.float8_e8m0fnu else 1.0
    if importlib.util.find_spec("triton") is not None:
        from ..triton import decode_blocks

        return decode_blocks.decode(codes, scales, blocked, dtype, 1 / shift), shift
    rows, k = codes.shape[0], codes.shape[1] * (2 if four_bits else 1)
    groups = k // (32 if shift == 4.0 else 16)
    plain = fp4.from_blocked(scales, rows, groups) if blocked else scales
    values = fp4.decode_e2m1(packing.unpack(codes, k, False)) if four_bits else codes.float()
    factors = fp4.scale_values(plain, torch.float64) / shift
    return (values.view(rows, groups, -1) * factors[:, :, None]).view(rows, k).to(dtype), shift


def _decode_fp4(
    codes: Tensor,
    scales: Tensor,
    blocked: bool,
    kind: str,
    *,
    lane_order: bool,
    flag: Tensor | None = None,
) -> tuple[Tensor, float]:
    """`decode` by decode_fp4.cu, to bf16 or fp16. ``lane_order``: for hopper.cu; whole 32 k.

    ``flag``: of launch_mx.py, where nothing is to be decoded unless it is 1.
    """
    if codes.data_ptr() % 4:
        codes = codes.clone()
    rows, k = codes.shape[0], 2 * codes.shape[1]
    scale_type, group = _SCALES[scales.dtype]
    index = codes.device.index
    only_if = -1 if flag is None else 1
    key = "decode", rows, k, scale_type, blocked, kind, lane_order, only_if, index
    launch_decode = _decoders.get(key)
    if launch_decode is None:
        c = config.DecodeFp4(kind, scale_type, blocked, lane_order, only_if)
        row = -(-k // group // 4) if blocked else k // group
        words = 0, 0, 0, 0, rows, k // 8, codes.stride(0), row
        launch_decode = jit.get(c, index).bind(c.grid(rows, k), (c.threads, 1, 1), 0, words, 4)
        remember(_decoders, key, launch_decode)
    out = empty((rows, k), (k, 1), _DTYPES[kind], codes.device)
    if out.numel():
        launch_decode(
            (
                codes.data_ptr(),
                scales.data_ptr(),
                out.data_ptr(),
                0 if flag is None else flag.data_ptr(),
            ),
            torch._C._cuda_getCurrentRawStream(index),
        )
    return out, float(config.FP4_UNIT[kind, scale_type])
