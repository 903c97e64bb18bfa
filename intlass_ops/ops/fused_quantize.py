"""Op `intlass::fused_quantize`: rotation and quantisation of activations in one step.

The formulas, checks and Python functions are in ../fused_quantize.py, the kernel in
../cuda/rotate_quantize.cu and rotate_hopper.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import fused_quantize
from ..cuda import launch_rotate_quantize
from ._library import define, require_device, without_autocast

_FORMATS = ("int8", "int4", "mx", "nv")
_LAYOUTS = ("packed", "bytes", "lanes")


def _plan(
    x: Tensor,
    h: Tensor,
    format_: str,
    method: str,
    group_size: int,
    global_scale: float,
    layout: str,
) -> fused_quantize.Plan:
    if format_ not in _FORMATS:
        raise ValueError(f"fused_quantize: format={format_!r}; expected one of {_FORMATS}")
    if layout not in _LAYOUTS:
        raise ValueError(f"fused_quantize: layout={layout!r}; expected one of {_LAYOUTS}")
    op = f"fused_quantize_{format_}"
    require_device(op, x, h=h)
    return fused_quantize.plan_of(op, format_, x, h, method, group_size, global_scale, layout)


def _fake(
    x: Tensor,
    h: Tensor,
    format_: str,
    method: str,
    group_size: int,
    global_scale: float = 1.0,
    mask: bool = False,
    layout: str = "packed",
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(x, h, format_, method, group_size, global_scale, layout)
    *lead, k = x.shape
    codes = plan.stored(k)
    scales = torch.float32 if plan.format in ("int8", "int4") else torch.uint8
    return (
        x.new_empty((*lead, codes[0]), dtype=codes[1]),
        x.new_empty((*lead, k // plan.group_size), dtype=scales),
        x.new_empty((*lead, k // 8 if mask else 0), dtype=torch.uint8),
    )


def _cpu(
    x: Tensor,
    h: Tensor,
    format_: str,
    method: str,
    group_size: int,
    global_scale: float = 1.0,
    mask: bool = False,
    layout: str = "packed",
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(x, h, format_, method, group_size, global_scale, layout)
    with without_autocast(x.device):
        codes, scales, bits = fused_quantize.reference(x, h, plan)
    return codes, scales, bits if mask else bits[..., :0].contiguous()


def _cuda(
    x: Tensor,
    h: Tensor,
    format_: str,
    method: str,
    group_size: int,
    global_scale: float = 1.0,
    mask: bool = False,
    layout: str = "packed",
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(x, h, format_, method, group_size, global_scale, layout)
    return launch_rotate_quantize.run(x, h, plan, mask)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.op = f"fused_quantize_{inputs[2]}"


def _backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        f"{ctx.op}: quantised values have no gradient; detach the input, or train with QATLinear"
    )


define(
    "fused_quantize(Tensor x, Tensor h, str format, str method, SymInt group_size, "
    "float global_scale=1.0, bool mask=False, str layout='packed') -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    setup_context=_setup,
    backward=_backward,
)
