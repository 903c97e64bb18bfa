"""`quantize_(model, config)`: replace the linears of a model by quantised ones, in place.

Here: the schemes and round-to-nearest weight quantisation. The modules are nn.py's, the arithmetic
ops/quantize.py's, the other methods calibrated.py's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import calibrated, packing
from .calibrate import QuantizedWeight
from .calibrated import Method
from .integrations.experts import experts_left
from .nn import Activation, IntLinear
from .ops import quantize_int4, quantize_int8
from .ops._library import FLOATS
from .ops.problem import GROUP_STEP
from .qat import QATConfig, prepare_qat_


@dataclass(frozen=True)
class Scheme:
    """Weight bits, group size along K (None: one scale a row), symmetry, activation type, and how
    weights become codes.

    >>> Scheme(4, 64, True, 'int8') == Int8DynamicActivationInt4Weight(64)
    True
    """

    bits: int
    group_size: int | None
    symmetric: bool
    activation: Activation
    method: Method = "rtn"


def Int4WeightOnly(
    group_size: int | None = 128, symmetric: bool = False, method: Method = "rtn"
) -> Scheme:
    """W4A16: INT4 weights with one scale (and zero point, unless symmetric) per group.

    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> quantize_(model, Int4WeightOnly(group_size=32, method='mse'))
    >>> model[0].weight.shape, model[0].scales.shape
    (torch.Size([8, 32]), torch.Size([8, 2]))
    """
    return Scheme(4, group_size, symmetric, None, method)


def Int8WeightOnly(group_size: int | None = None, method: Method = "rtn") -> Scheme:
    """W8A16: symmetric INT8 weights, one scale per output channel (or per group).

    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> quantize_(model, Int8WeightOnly())
    >>> model[0].weight.dtype, model[0].scales.shape
    (torch.int8, torch.Size([8, 1]))
    """
    return Scheme(8, group_size, True, None, method)


def Int8DynamicActivationInt8Weight(method: Method = "rtn") -> Scheme:
    """W8A8: activations to INT8 per token on every call, weights INT8 per output channel.

    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> quantize_(model, Int8DynamicActivationInt8Weight())
    >>> model(torch.ones(2, 64)).shape
    torch.Size([2, 8])
    """
    return Scheme(8, None, True, "int8", method)


def Int8DynamicActivationInt4Weight(group_size: int | None = 128, method: Method = "rtn") -> Scheme:
    """W4A8: activations to INT8 per token on every call, symmetric INT4 weights per group.

    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> quantize_(model, Int8DynamicActivationInt4Weight(group_size=32))
    >>> model(torch.ones(2, 64)).shape
    torch.Size([2, 8])
    """
    return Scheme(4, group_size, True, "int8", method)


def Int4DynamicActivationInt4Weight(group_size: int | None = 128, method: Method = "rtn") -> Scheme:
    """W4A4: activations to INT4 per token on every call, symmetric INT4 weights per group.

    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> quantize_(model, Int4DynamicActivationInt4Weight(group_size=32))
    >>> model(torch.ones(2, 64)).shape
    torch.Size([2, 8])
    """
    return Scheme(4, group_size, True, "int4", method)


def quantize_(
    model: nn.Module,
    config: Scheme | QATConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    calibration: Sequence[Any] | None = None,
    progress: bool = True,
) -> None:
    """Replace every nn.Linear of ``model`` by an `IntLinear`, in place.

    ``config``: one of `Int4WeightOnly`, `Int8WeightOnly`, `Int8DynamicActivationInt8Weight`,
    `Int8DynamicActivationInt4Weight`, `Int4DynamicActivationInt4Weight`. Its ``method`` makes the
    codes: "rtn" rounds to nearest; "mse" finds the scales of least squared error; "hqq" fits
    floating zero points (INT4 with zeros); "gptq" feeds errors back through the statistics of the
    layers' inputs, which it collects from ``calibration``: batches that ``model`` is called with
    (a tensor, a tuple of arguments or a mapping of named ones), read once for every 2 GiB of
    statistics. With data "mse" weighs errors by the mean square of their inputs, which matters
    where few inputs are large. ``progress`` shows a bar on a terminal if `rich` is installed. A
    `QATConfig` makes trainable `QATLinear`s instead, of which `convert_` makes integer layers after
    training.
    ``filter_fn(module, name)`` picks the linears (default: all). A module that occurs twice stays
    shared. Fused experts (3-D parameters) stay as they are, with a warning that says how much of
    the model they are. Scales of INT4 weights take the weight's dtype under "rtn", all others are
    fp32.

    Raises, before anything is changed and naming the layer, ValueError for a K that is 0 or not a
    multiple of the group size and TypeError for a weight that is not fp32, bf16 or fp16; TypeError
    for a model that is itself a Linear; ValueError for a method that does not fit.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 64))
    >>> quantize_(model, Int4WeightOnly(group_size=128))
    >>> model[0]
    IntLinear(in_features=256, out_features=64, scheme=w4a16, group_size=128, zeros=True, bias=True)
    """
    if isinstance(config, QATConfig):
        prepare_qat_(model, config, filter_fn)
        return
    if isinstance(model, nn.Linear):
        raise TypeError("quantize_: the model is a Linear itself and cannot be replaced in place")
    calibrated.check("quantize_", config.method, config.bits, config.symmetric, calibration)
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children() leaves repetitions out
            path = f"{parent_name}.{name}" if parent_name else name
            if type(child) is nn.Linear and (filter_fn is None or filter_fn(child, path)):
                _check(child, path, config)
                found.append((parent, name, child))
    left = experts_left(model)
    if left is not None:
        warnings.warn(f"quantize_: {left}", stacklevel=2)
    if config.method != "rtn":
        _quantize_calibrated(model, found, config, calibration, progress)
        return
    replaced: dict[nn.Linear, IntLinear] = {}
    for parent, name, linear in found:
        if linear not in replaced:
            replaced[linear] = quantize_linear(linear, config)
        setattr(parent, name, replaced[linear])


def _quantize_calibrated(
    model: nn.Module,
    found: list[tuple[nn.Module, str, nn.Linear]],
    config: Scheme,
    calibration: Sequence[Any] | None,
    progress: bool,
) -> None:
    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent, name, linear in found:
        places.setdefault(linear, []).append((parent, name))
    paths = {module: path for path, module in model.named_modules()}

    def replace(linear: nn.Linear, q: QuantizedWeight) -> None:
        layer = IntLinear(
            packing.pack(q.codes) if config.bits == 4 else q.codes,
            q.scales,
            q.zeros,
            None if linear.bias is None else linear.bias.detach(),
            in_features=linear.in_features,
            activation=config.activation,
        )
        for parent, name in places[linear]:
            setattr(parent, name, layer)

    calibrated.weights(
        model,
        [(paths[linear], linear) for linear in places],
        config.method,
        config.bits,
        config.group_size,
        config.symmetric,
        calibration,
        replace,
        progress,
    )


def _check(linear: nn.Linear, path: str, config: Scheme) -> None:
    group = config.group_size
    if group is not None and (group < GROUP_STEP or group % GROUP_STEP):
        raise ValueError(f"quantize_: group_size={group} is not a multiple of {GROUP_STEP}")
    if linear.weight.dtype not in FLOATS:
        raise TypeError(
            f"quantize_: {path}: the weight is {linear.weight.dtype}, no fp32, bf16, fp16"
        )
    if linear.in_features == 0:
        raise ValueError(f"quantize_: {path}: K=0, there is nothing to quantise")
    if group is not None and linear.in_features % group:
        raise ValueError(
            f"quantize_: {path}: K={linear.in_features} is not a multiple of group_size={group}; "
            "choose another group_size or leave the layer out with filter_fn"
        )


@torch.no_grad()
def quantize_linear(linear: nn.Linear, config: Scheme) -> IntLinear:
    """The IntLinear of one Linear; its bias is kept."""
    w = linear.weight.detach()
    group = config.group_size or linear.in_features
    if config.bits == 8:
        q, scales, _ = quantize_int8(w, granularity="group", group_size=group)
        zeros = None
    else:
        q, scales, zeros = quantize_int4(
            w, granularity="group", group_size=group, symmetric=config.symmetric
        )
        scales = _round_scales(scales, w.dtype)
        q = quantize_int4(w, scales, zeros, granularity="group", group_size=group)
    return IntLinear(
        q,
        scales,
        None if zeros is None else zeros.to(torch.uint8),
        None if linear.bias is None else linear.bias.detach(),
        in_features=linear.in_features,
        activation=config.activation,
    )


def _round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the weight's dtype, unless that would lose one to zero or infinity."""
    rounded = scales.to(dtype)
    lost = (rounded == 0) | torch.isinf(rounded)
    if scales.is_meta or not bool((lost & torch.isfinite(scales)).any()):
        return rounded
    return scales
