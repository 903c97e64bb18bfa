"""Rotation and quantisation on a GPU: from a tensor to one launch.

Not here: which configuration (config/), the formulas and argument checks (fused_quantize.py).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .. import config, fused_quantize, packing
from . import jit, tensor_map
from .early_launch import quantised
from .kernel import Launch
from .plans import ALIGNMENT, TYPE, Key, contiguous_strides, device_of, empty, remember, signature

_PARAMS = struct.Struct("=7q2f")
_WORDS = 5  # pointers, which come first

_Shape = tuple[int, ...]


class _Made(NamedTuple):
    """What one signature returns, and the launch that fills it."""

    launch: Launch | None  # None: nothing to compute
    outputs: tuple[tuple[_Shape, _Shape, torch.dtype], ...]  # shape, strides, dtype
    lays_out: bool  # codes in their layout
    x_rows: tuple[int, int, int, int, int] | None  # a tensor map's, where the kernel wants one


_made: dict[Key, _Made] = {}


def run(
    x: Tensor, h: Tensor, plan: fused_quantize.Plan, return_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (packed unless INT8), scales (FP8 as bytes) and mask (empty unless asked for)."""
    if x.dtype not in TYPE:
        x, h = x.float(), h.to(x.dtype).float()
    x, h = _aligned(x), _aligned(h.to(x.device, x.dtype))
    key = (signature(x), plan, return_mask)
    made = _made.get(key)
    if made is None:
        made = remember(_made, key, _make(x, plan, return_mask))
    codes, scales, mask = (empty(*output, x.device) for output in made.outputs)
    if made.launch is not None:
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        words = [t.data_ptr() for t in (x, h, codes, scales, mask)]
        tail = b"" if made.x_rows is None else tensor_map.of_rows(words[0], *made.x_rows)
        made.launch(words, stream, tail)
        quantised(x.device.index, stream, codes)
    return codes if made.lays_out else packing.to_lanes(codes), scales, mask


def _make(x: Tensor, plan: fused_quantize.Plan, return_mask: bool) -> _Made:
    *lead, k = x.shape
    integers = plan.format in ("int8", "int4")
    lays_out, codes = True, plan.stored(k)
    launch = x_rows = None
    if x.numel():
        device = device_of(x.device.index)
        c = config.pick_rotate_quantize(
            device,
            TYPE[x.dtype],
            plan.r,
            plan.format,
            plan.quest,
            return_mask,
            plan.group_size,
            plan.format == "nv" and plan.global_scale != 1,
            plan.layout,
        )
        pieces, group_pieces = x.numel() // c.piece, max(1, plan.group_size // c.piece)
        spread = fused_quantize.QUEST_E2M1
        if integers:
            spread = fused_quantize.QUEST_INT[8 if plan.format == "int8" else 4]
        grid = min(c.units(pieces, group_pieces), c.blocks_per_sm * device.sm_count)
        parameters = _PARAMS.pack(*[0] * _WORDS, pieces, group_pieces, plan.global_scale, spread)
        if isinstance(c, config.RotateHopper):
            row = 2 * plan.r
            x_rows = x.numel() // plan.r, row, row, c.box_rows, min(row, 128)
            parameters += bytes(tensor_map.NUM_BYTES)
        elif plan.layout == "lanes":
            lays_out, codes = False, (k, torch.int8)
        kernel = jit.get(c, x.device.index)
        launch = kernel.bind((grid, 1, 1), (c.threads, 1, 1), c.smem_bytes, parameters, _WORDS)
    stored = (
        codes,
        (k // plan.group_size, torch.float32 if integers else torch.uint8),
        (k // 8 if return_mask else 0, torch.uint8),
    )
    shapes = (((*lead, n), dtype) for n, dtype in stored)
    outputs = tuple((s, contiguous_strides(s), dtype) for s, dtype in shapes)
    return _Made(launch, outputs, lays_out, x_rows)


def _aligned(t: Tensor) -> Tensor:
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()
