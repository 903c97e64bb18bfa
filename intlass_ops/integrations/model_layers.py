"""Our layers in a model: putting them in place of others, finding them, turning them back.

Not here: what goes to a file (formats/layers.py), how transformers calls all this
(transformers_quantizer.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..formats import FormatError
from ..formats.layers import LayerSpec
from ..fp4_linear import Fp4Linear
from ..fp8_linear import Fp8Layer, Fp8Linear, has_nan
from ..lut4_linear import Lut4Linear
from ..nn import IntLinear, PackedLinear
from ..ops import dequantize
from . import conv1d, experts, weight_readers


def put_layers(model: nn.Module, specs: dict[str, LayerSpec]) -> None:
    """Replace the linears of a model on the meta device; ValueError for a path it lacks."""
    modules = dict(model.named_modules())
    for path, spec in specs.items():
        old = modules.get(path)
        new = spec.module()
        if isinstance(new, experts.ExpertLinear):
            _put_experts(type(model).__name__, modules, path, new)
            continue
        if old is not None and conv1d.is_conv1d(old):
            old = conv1d.linear_of(old)
        if not isinstance(old, nn.Linear):
            found = "no such module" if old is None else f"a {type(old).__name__}"
            raise ValueError(
                f"{type(model).__name__}: {path} is quantised in the checkpoint, but in the model "
                f"it is {found}"
            )
        sizes: tuple[Any, Any] = (new.out_features, new.in_features)
        if sizes != (old.out_features, old.in_features):
            raise ValueError(
                f"{type(model).__name__}: {path} is {sizes} in the checkpoint and "
                f"{(old.out_features, old.in_features)} in the model"
            )
        model.set_submodule(path, new)
    weight_readers.announce(model)
    for path, module in modules.items():
        if experts.is_quantized(module):
            for name in experts.projections(module):
                if not hasattr(module, name + experts.SUFFIX):
                    raise ValueError(
                        f"{type(model).__name__}: {path} is quantised in the checkpoint, but not "
                        f"its {name}"
                    )


def _put_experts(
    owner: str, modules: dict[str, nn.Module], path: str, new: experts.ExpertLinear
) -> None:
    parent, _, name = path.removesuffix(experts.SUFFIX).rpartition(".")
    sizes = new.weight.shape[0], new.out_features, new.in_features
    module, found = modules.get(parent), None
    if module is not None and name in experts.parameters_of(module):
        found = tuple(experts.weights_of(module, name).shape)
    if module is None or found != sizes:
        raise ValueError(
            f"{owner}: {path} is {sizes} in the checkpoint and {found or 'no fused experts'} in "
            "the model"
        )
    experts.put(module, name, new)


def specs_of(model: nn.Module) -> dict[str, LayerSpec]:
    """Our layers in a model, by path."""
    specs = {path: LayerSpec.of(module) for path, module in model.named_modules()}
    return {path: spec for path, spec in specs.items() if spec is not None}


def linear_of(
    layer: IntLinear | Fp4Linear | Fp8Linear | Lut4Linear, dtype: torch.dtype
) -> nn.Linear:
    """A floating-point linear of the same weight, rounded to ``dtype``."""
    if isinstance(layer, (Fp4Linear, Fp8Linear, Lut4Linear)):
        w = layer.dequantize(dtype)
    else:
        w = dequantize(layer.weight, layer.scales, layer.zeros, k=layer.in_features, dtype=dtype)
        if layer.input_scale is not None:
            w = w * layer.input_scale.to(dtype)
    linear = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(w, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear


def check_values(model: nn.Module) -> None:
    """FormatError for what our layers were loaded with and cannot compute with."""
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            _check_order(path, module)
        if isinstance(module, Fp8Layer) and not module.weight.is_meta and has_nan(module.weight):
            raise FormatError(f"{path}.weight holds a NaN; the file is damaged")


def _check_order(path: str, layer: PackedLinear) -> None:
    """An index out of range would end the CUDA context at the first call."""
    order = layer.order
    if order is None or order.is_meta:
        return
    every = torch.arange(layer.in_features, device=order.device)
    if not torch.equal(order.long().sort().values, every):
        raise FormatError(f"{path}.order is no permutation of the {layer.in_features} inputs")
