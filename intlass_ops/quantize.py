"""`quantize_(model, config)`: replace the linears of a model by quantised ones, in place.

Here: the schemes and round-to-nearest weight quantisation. The modules are nn.py's, the arithmetic
ops/quantize.py's, the other methods calibrated.py's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import calibrated, packing, side_by_side
from .calibrate import QuantizedWeight
from .calibrated import Method
from .integrations import conv1d, experts, weight_readers
from .nn import Activation, IntExpertLinear, IntLinear
from .ops import quantize_int4, quantize_int8
from .ops._library import FLOATS, require_module
from .ops.problem import GROUP_STEP
from .qat import QATConfig, prepare_qat_


@dataclass(frozen=True)
class Scheme:
    """Weight bits, group size along K (None: one scale a row), symmetry, activation type, and how
    weights become codes.

    ValueError for what no layer can be made of: bits other than 4 and 8, 8 bits that are not
    symmetric, INT4 activations beside 8 bits, groups that are no multiple of 16.

    >>> Scheme(4, 64, True, 'int8') == Int8DynamicActivationInt4Weight(64)
    True
    """

    bits: int
    group_size: int | None
    symmetric: bool
    activation: Activation
    method: Method = "rtn"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Scheme: bits={self.bits}; expected 4 or 8")
        if type(self.symmetric) is not bool:
            raise TypeError(f"Scheme: symmetric={self.symmetric!r}; expected True or False")
        g = self.group_size
        if g is not None and (type(g) is not int or g < GROUP_STEP or g % GROUP_STEP):
            raise ValueError(
                f"Scheme: group_size={g!r} is not a multiple of {GROUP_STEP}, or None (a whole row)"
            )
        if self.bits == 8 and not self.symmetric:
            raise ValueError("Scheme: 8-bit weights are symmetric, symmetric=False has no kernel")
        if self.activation not in ((None, "int8") if self.bits == 8 else (None, "int8", "int4")):
            raise ValueError(
                f"Scheme: activation={self.activation!r} with bits={self.bits}; expected None, "
                "'int8' or, with 4 bits, 'int4'"
            )


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
    """Replace every nn.Linear (and GPT-2's `Conv1D`) of ``model`` by an `IntLinear`, in place.

    ``config``: one of `Int4WeightOnly`, `Int8WeightOnly`, `Int8DynamicActivationInt8Weight`,
    `Int8DynamicActivationInt4Weight`, `Int4DynamicActivationInt4Weight`. Its ``method`` makes the
    codes: "rtn" rounds to nearest; "mse" finds the scales of least squared error; "hqq" fits
    floating zero points (INT4 with zeros); "gptq" feeds errors back through the statistics of the
    layers' inputs; "awq" scales input channels by powers of two before it rounds, so that those
    with large inputs are rounded more finely, and the layer divides its input by them. Both collect
    their statistics from ``calibration``: batches that ``model`` is called with (a tensor, a tuple
    of arguments or a mapping of named ones), read once for every 2 GiB of statistics and once for
    each mixture of experts. With data "mse" weighs errors by the mean square of their inputs, which
    matters where few inputs are large. ``progress`` shows a bar on a terminal if `rich` is
    installed. A `QATConfig` makes trainable `QATLinear`s instead, of which `convert_` makes integer
    layers after training. ``filter_fn(module, name)`` picks the linears (default: all); those that
    a model of transformers keeps in fp32 (T5's `wo`) stay as they are. A module that occurs twice
    stays shared, hooks stay. Fused experts of transformers (3-D parameters) become
    `IntExpertLinear`s; ``filter_fn`` is asked for their module. "gptq" and "mse" take each by the
    data that reaches it, "awq" as "mse" does, and what no data reaches is taken without. A warning
    names the 3-D weights that stay as they are. Scales of INT4 weights take the weight's dtype
    under "rtn", all others are fp32.

    Raises, naming the layer and leaving the model's linears as they were, ValueError for a K that
    is 0 or not a multiple of the group size and for data that no Hessian can be made of, TypeError
    for a weight that is not fp32, bf16 or fp16; TypeError for a model that is itself a Linear;
    ValueError for a method that does not fit.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 64))
    >>> quantize_(model, Int4WeightOnly(group_size=128))
    >>> model[0]
    IntLinear(in_features=256, out_features=64, scheme=w4a16, group_size=128, zeros=True, bias=True)
    """
    require_module("quantize_", model)
    if isinstance(config, QATConfig):
        prepare_qat_(model, config, filter_fn)
        return
    if not isinstance(config, Scheme):
        raise TypeError(
            f"quantize_: config is {config!r}; expected what Int4WeightOnly() and its like return"
        )
    if isinstance(model, nn.Linear):
        raise TypeError("quantize_: the model is a Linear itself and cannot be replaced in place")
    calibrated.check("quantize_", config.method, config.bits, config.symmetric, calibration)
    kept = weight_readers.kept_in_fp32(model)
    found: list[tuple[nn.Module, str, Any]] = []
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children() leaves repetitions out
            path = f"{parent_name}.{name}" if parent_name else name
            transposed = conv1d.is_conv1d(child)
            if path in kept or (not transposed and type(child) is not nn.Linear):
                continue
            if filter_fn is None or filter_fn(child, path):
                _check_weight(path, child.weight.t() if transposed else child.weight, config)
                found.append((parent, name, child))
    mixtures = [
        (path, module)
        for path, module in experts.mixtures_of(model)
        if filter_fn is None or filter_fn(module, path)
    ]
    for path, module in mixtures:
        for name in experts.projections(module):
            weight = experts.weights_of(module, name)
            _check_weight(f"{path}.{name}", weight, config)
    try:
        linears = _as_linears(found)
        if config.method != "rtn":
            _quantize_calibrated(model, linears, config, calibration, progress)
        else:
            _quantize_nearest(linears, config)
    except BaseException:  # Ctrl-C too
        for parent, name, module in found:
            setattr(parent, name, module)
        raise
    if calibration is not None:
        _calibrate_experts(model, mixtures, config, calibration, progress)
    else:
        for _, module in mixtures:
            for name in experts.projections(module):
                layer = quantize_experts(experts.weights_of(module, name), config)
                experts.put(module, name, layer)
    side_by_side.lay_siblings(model)
    weight_readers.announce(model)
    left = experts.experts_left(model)
    if left is not None:
        warnings.warn(f"quantize_: {left}", stacklevel=2)


def _as_linears(
    found: list[tuple[nn.Module, str, Any]],
) -> list[tuple[nn.Module, str, nn.Linear]]:
    """With each `Conv1D` replaced in the model by a linear that computes the same."""
    made: dict[nn.Module, nn.Linear] = {}
    for parent, name, module in found:
        if conv1d.is_conv1d(module):
            made.setdefault(module, weight_readers.succeed(conv1d.linear_of(module), module))
            setattr(parent, name, made[module])
    return [(parent, name, made.get(module, module)) for parent, name, module in found]


def _quantize_nearest(found: list[tuple[nn.Module, str, nn.Linear]], config: Scheme) -> None:
    replaced: dict[nn.Linear, IntLinear] = {}
    for parent, name, linear in found:
        if linear not in replaced:
            replaced[linear] = weight_readers.succeed(quantize_linear(linear, config), linear)
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

    def replace(linear: nn.Linear, q: QuantizedWeight, channels: Tensor | None) -> None:
        bias = None if linear.bias is None else linear.bias.detach()
        by = None if channels is None else channels.reciprocal().to(linear.weight.dtype)
        layer = _layer_of(q, config, bias, by)
        for parent, name in places[linear]:
            setattr(parent, name, weight_readers.succeed(layer, linear))

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


def _calibrate_experts(
    model: nn.Module,
    mixtures: Sequence[tuple[str, nn.Module]],
    config: Scheme,
    calibration: Sequence[Any],
    progress: bool,
) -> None:
    def replace(module: nn.Module, weights: dict[str, list[QuantizedWeight]]) -> None:
        for name, each in weights.items():
            layer = IntExpertLinear.stack([_layer_of(q, config) for q in each])
            experts.put(module, name, layer)

    how = config.method, config.bits, config.group_size, config.symmetric
    calibrated.expert_weights(model, mixtures, *how, calibration, replace, progress)


def _layer_of(
    q: QuantizedWeight,
    config: Scheme,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> IntLinear:
    return IntLinear(
        packing.pack(q.codes) if config.bits == 4 else q.codes,
        q.scales,
        q.zeros,
        bias,
        in_features=q.codes.shape[1],
        activation=config.activation,
        input_scale=input_scale,
    )


def _check_weight(path: str, weight: Tensor, config: Scheme) -> None:
    group, k = config.group_size, weight.shape[-1]
    weight_readers.require_plain(path, weight)
    if weight.dtype not in FLOATS:
        raise TypeError(f"quantize_: {path}: the weight is {weight.dtype}, no fp32, bf16, fp16")
    if k == 0:
        raise ValueError(f"quantize_: {path}: K=0, there is nothing to quantise")
    if group is not None and k % group:
        raise ValueError(
            f"quantize_: {path}: K={k} is not a multiple of group_size={group}; "
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


def quantize_experts(w: Tensor, config: Scheme) -> IntExpertLinear:
    """The IntExpertLinear of weights [experts, N, K]; methods that need data, as "mse" without."""
    method = config.method if config.method in ("rtn", "hqq") else "mse"
    layers: list[Any] = []
    for one in w:
        linear = nn.Linear(one.shape[1], one.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(one, requires_grad=False)
        box = nn.Sequential(linear)
        quantize_(box, replace(config, method=method), progress=False)
        layers.append(box[0])
    return IntExpertLinear.stack(layers)


def _round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the weight's dtype, unless that would lose one to zero or infinity."""
    rounded = scales.to(dtype)
    lost = (rounded == 0) | torch.isinf(rounded)
    if scales.is_meta or not bool((lost & torch.isfinite(scales)).any()):
        return rounded
    return scales
