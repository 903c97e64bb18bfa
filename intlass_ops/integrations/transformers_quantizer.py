"""`quant_method="intlass"` of transformers (5.17 and newer): quantise while loading, save, reload.

Importing this registers it. Lives here: `IntlassConfig`, the quantizer behind it, `save_pretrained`
for models that `quantize_` or `prepare_` changed. Not here: other libraries' checkpoints
(load_pretrained.py), what is in a file (formats/layers.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import calibrated
from ..formats import FormatError
from ..formats.layers import METHOD, VERSION, LayerSpec, read_specs, write_specs
from ..nn import IntLinear, PackedLinear
from ..ops import dequantize
from ..quantize import Scheme, quantize_, quantize_linear
from .experts import experts_left
from .schemes import scheme_named

# Called with (done, total) after each layer that is quantised while a model is loaded.
listening: ContextVar[Callable[[int, int], None] | None] = ContextVar("listening", default=None)


@register_quantization_config(METHOD)
class IntlassConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """For ``from_pretrained(..., quantization_config=IntlassConfig("w4a16"))``.

    ``scheme``: w4a16, w8a16, w8a8, w4a8 or w4a4; ``group_size`` along K (INT4); ``method``: "rtn",
    "mse" or "hqq", which need no data (for "gptq": `quantize_`, then `save_pretrained`).
    ``modules_to_not_convert``: module paths that stay as they are, besides the output head and
    what is tied to the embedding. ``layers`` is what saving fills in and reloading reads.

    Raises ValueError for a scheme or method that does not exist.

    >>> config = IntlassConfig("w4a16", group_size=64, method="mse")         # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained(path, quantization_config=config)  # doctest: +SKIP
    """

    def __init__(
        self,
        scheme: str = "w4a16",
        group_size: int | None = 128,
        symmetric: bool = False,
        method: str = "rtn",
        modules_to_not_convert: list[str] | None = None,
        layers: list[dict[str, Any]] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"IntlassConfig: quant_method={quant_method!r}; expected {METHOD!r}")
        self.quant_method = METHOD
        self.layers = layers
        self.version = version
        if layers is None:
            if method not in ("rtn", "mse", "hqq"):
                raise ValueError(
                    f"IntlassConfig: method={method!r}; while loading there are rtn, mse and hqq "
                    "(for gptq load the model as it is and call intlass_ops.quantize_)"
                )
            wanted = scheme_named(scheme, symmetric=symmetric)
            calibrated.check("IntlassConfig", method, wanted.bits, wanted.symmetric, None)
            self.scheme, self.group_size, self.symmetric = scheme, group_size, symmetric
            self.method, self.modules_to_not_convert = method, modules_to_not_convert

    def to_scheme(self) -> Scheme:
        """The configuration that `quantize_` takes."""
        return scheme_named(
            self.scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            method=self.method,
        )


@register_quantizer(METHOD)
class IntlassQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty layers into a model before its weights are loaded; quantises them if need be."""

    def __init__(self, quantization_config: IntlassConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.planned: set[str] = set()
        self.done = 0

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            specs = read_specs(type(model).__name__, config.to_dict())
            put_layers(model, specs)
            return
        scheme = config.to_scheme()
        kept = {*get_keys_to_not_convert(model), *(config.modules_to_not_convert or ())}
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and not is_kept(path, kept):
                _check_group(path, module, scheme)
                model.set_submodule(path, quantize_linear(module, _with_rtn(scheme)))
                self.planned.add(path)
        left = experts_left(model)
        if left is not None:
            warnings.warn(f"intlass: {left}", stacklevel=2)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **_options: Any
    ) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.planned

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config.to_scheme(), self._advance)

    def _advance(self) -> None:
        self.done += 1
        listener = listening.get()
        if listener is not None:
            listener(self.done, len(self.planned))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        for path, module in model.named_modules():
            if isinstance(module, PackedLinear):
                _check_order(path, module)
        self.quantization_config.layers = write_specs(specs_of(model))["layers"]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        for path, module in list(model.named_modules()):
            if isinstance(module, IntLinear):
                model.set_submodule(path, _dense(module, dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A floating-point weight on its way into a planned layer becomes that layer's buffers."""

    def __init__(self, scheme: Scheme, advance: Callable[[], None]) -> None:
        self.scheme, self.advance = scheme, advance

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, (list, tuple)) else value
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        box = nn.Sequential(linear)
        quantize_(box, self.scheme, progress=False)
        self.advance()
        path = full_layer_name.removesuffix(".weight")
        return {f"{path}.{name}": buffer for name, buffer in box[0].named_buffers()}


def put_layers(model: nn.Module, specs: dict[str, LayerSpec]) -> None:
    """Replace the linears of a model on the meta device; ValueError for a path it lacks."""
    modules = dict(model.named_modules())
    for path, spec in specs.items():
        old = modules.get(path)
        if not isinstance(old, nn.Linear):
            found = "no such module" if old is None else f"a {type(old).__name__}"
            raise ValueError(
                f"{type(model).__name__}: {path} is quantised in the checkpoint, but in the model "
                f"it is {found}"
            )
        new = spec.module()
        sizes: tuple[Any, Any] = (new.out_features, new.in_features)
        if sizes != (old.out_features, old.in_features):
            raise ValueError(
                f"{type(model).__name__}: {path} is {sizes} in the checkpoint and "
                f"{(old.out_features, old.in_features)} in the model"
            )
        model.set_submodule(path, new)


def specs_of(model: nn.Module) -> dict[str, LayerSpec]:
    """Our layers in a model, by path."""
    specs = {path: LayerSpec.of(module) for path, module in model.named_modules()}
    return {path: spec for path, spec in specs.items() if spec is not None}


def save_pretrained(
    model: PreTrainedModel, directory: str | os.PathLike[str], **options: Any
) -> None:
    """Save a transformers model with `IntLinear` layers so that ``from_pretrained`` reloads it.

    For models changed by `quantize_`, `convert_` or `prepare_`; one that came from
    `load_pretrained` or an `IntlassConfig` can call its own ``save_pretrained``. ``options`` go to
    that method. The files are safetensors with the layers' buffers (codes, scales, zeros) and a
    config.json that describes them; reading them back gives the same model bit for bit.

    Raises ValueError for a model without quantised layers.

    >>> save_pretrained(model, "llama-int4")                                  # doctest: +SKIP
    """
    specs = specs_of(model)
    if not specs:
        raise ValueError(f"save_pretrained: {type(model).__name__} has no quantised layers")
    config = IntlassConfig(layers=write_specs(specs)["layers"])
    model.hf_quantizer = IntlassQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.save_pretrained(directory, **options)


def is_kept(path: str, kept: set[str]) -> bool:
    """Whether a module is named, by its path or by the end of it."""
    return any(path == each or path.endswith("." + each) for each in kept)


def _check_order(path: str, layer: PackedLinear) -> None:
    """An index out of range would end the CUDA context at the first call."""
    order = layer.order
    if order is None or order.is_meta:
        return
    every = torch.arange(layer.in_features, device=order.device)
    if not torch.equal(order.long().sort().values, every):
        raise FormatError(f"{path}.order is no permutation of the {layer.in_features} inputs")


def _with_rtn(scheme: Scheme) -> Scheme:
    return Scheme(scheme.bits, scheme.group_size, scheme.symmetric, scheme.activation)


def _check_group(path: str, linear: nn.Linear, scheme: Scheme) -> None:
    if scheme.group_size is not None and linear.in_features % scheme.group_size:
        raise ValueError(
            f"IntlassConfig: {path}: K={linear.in_features} is not a multiple of "
            f"group_size={scheme.group_size}; choose another group_size or keep the layer as it "
            "is (modules_to_not_convert, on the command line --keep)"
        )


def _dense(layer: IntLinear, dtype: torch.dtype) -> nn.Linear:
    w = dequantize(layer.weight, layer.scales, layer.zeros, k=layer.in_features, dtype=dtype)
    linear = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    linear.weight = nn.Parameter(w, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear
