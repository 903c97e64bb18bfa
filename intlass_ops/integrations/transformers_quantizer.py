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

from .. import calibrated, side_by_side
from ..formats.layers import METHOD, VERSION, read_specs, write_specs
from ..fp4_linear import Fp4Linear
from ..fp8_linear import Fp8Linear
from ..lut4_linear import Lut4Linear
from ..nn import IntLinear
from ..qat import QATLinear, RotatedIntLinear
from ..quantize import Scheme, quantize_, quantize_experts, quantize_linear
from . import conv1d, experts, weight_readers
from .model_layers import check_values, linear_of, put_layers, specs_of
from .schemes import scheme_named

# Called with (done, total) after each layer that is quantised while a model is loaded.
listening: ContextVar[Callable[[int, int], None] | None] = ContextVar("listening", default=None)


@register_quantization_config(METHOD)
class IntlassConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """For ``from_pretrained(..., quantization_config=IntlassConfig("w4a16"))``.

    ``scheme``: w4a16, w8a16, w8a8, w4a8 or w4a4; ``group_size`` along K (INT4); ``method``: "rtn",
    "mse" or "hqq", which need no data (for "gptq" and "awq": `quantize_`, then `save_pretrained`).
    ``modules_to_not_convert``: module paths that stay as they are, besides the output head, what is
    tied to the embedding, and what the model keeps in fp32. ``layers`` is what saving fills in and
    reloading reads.
    Importing this name is what makes ``from_pretrained`` know our checkpoints; without it,
    transformers warns of an unknown quantization type and takes the codes for weights.

    Raises ValueError for a scheme, method or group size that does not exist.

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
                    "(for gptq and awq load the model as it is and call intlass_ops.quantize_)"
                )
            wanted = scheme_named(scheme, group_size=group_size, symmetric=symmetric)
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
        self.transposed: set[str] = set()
        self.dtypes: dict[str, torch.dtype] = {}
        self.done = 0

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            specs = read_specs(type(model).__name__, config.to_dict())
            put_layers(model, specs)
            self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
            return
        scheme = config.to_scheme()
        kept = {*get_keys_to_not_convert(model), *(config.modules_to_not_convert or ())}
        kept |= weight_readers.kept_in_fp32(model)
        for path, module in list(model.named_modules()):
            transposed = conv1d.is_conv1d(module)
            if (transposed or type(module) is nn.Linear) and not is_kept(path, kept):
                linear = conv1d.linear_of(module) if transposed else module
                _check_group(path, linear.in_features, scheme)
                model.set_submodule(path, quantize_linear(linear, _with_rtn(scheme)))
                self.planned.add(f"{path}.weight")
                if transposed:
                    self.transposed.add(f"{path}.weight")
        for path, module in experts.mixtures_of(model):
            if not is_kept(path, kept):
                for name in experts.projections(module):
                    weight = experts.weights_of(module, name)
                    _check_group(f"{path}.{name}", weight.shape[-1], scheme)
                    self.planned.add(f"{path}.{name}")
        left = experts.experts_left(model, self.planned)
        if left is not None:
            warnings.warn(f"intlass: {left}", stacklevel=2)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **_options: Any
    ) -> bool:
        return param_name in self.planned

    def get_quantize_ops(self) -> ConversionOps:
        scheme = self.quantization_config.to_scheme()
        return _Quantize(scheme, self.transposed, self._advance)

    def _advance(self) -> None:
        self.done += 1
        listener = listening.get()
        if listener is not None:
            listener(self.done, len(self.planned))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        check_values(model)
        # transformers 5.17 leaves parameters that it renames in the dtype of the file.
        wide = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, parameter in model.named_parameters():
            dtype = self.dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype and not any(each in name for each in wide):
                parameter.data = parameter.data.to(dtype)
        self.quantization_config.layers = write_specs(specs_of(model))["layers"]
        side_by_side.lay_siblings(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        if not isinstance(dtype, torch.dtype):  # a config may keep its name
            dtype = torch.float32 if dtype is None else getattr(torch, dtype)
        with torch.device("meta"):
            plain = type(model)(model.config)
        for path, module in list(model.named_modules()):
            if isinstance(module, (Fp4Linear, Fp8Linear, IntLinear, Lut4Linear)):
                linear = linear_of(module, dtype)
                transposed = conv1d.is_conv1d(plain.get_submodule(path))
                model.set_submodule(path, conv1d.conv1d_of(linear) if transposed else linear)
            elif experts.is_quantized(module):
                experts.take_back(module, dtype)
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

    def __init__(self, scheme: Scheme, transposed: set[str], advance: Callable[[], None]) -> None:
        self.scheme, self.transposed, self.advance = scheme, transposed, advance

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, (list, tuple)) else value
        path, parameter = full_layer_name.rsplit(".", 1)
        if weight.dim() == 3:
            mixture = model.get_submodule(path)
            setattr(mixture, parameter, nn.Parameter(weight, requires_grad=False))
            dense = experts.weights_of(mixture, parameter)
            experts.put(mixture, parameter, quantize_experts(dense, self.scheme))
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            buffers: dict[str, Tensor] = {}
        else:
            weight = weight.t() if full_layer_name in self.transposed else weight
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            box = nn.Sequential(linear)
            quantize_(box, self.scheme, progress=False)
            buffers = {f"{path}.{part}": tensor for part, tensor in box[0].named_buffers()}
        self.advance()
        return buffers


def save_pretrained(
    model: PreTrainedModel, directory: str | os.PathLike[str], **options: Any
) -> None:
    """Save a transformers model with our layers so that ``from_pretrained`` reloads it.

    For models changed by `quantize_`, `convert_` or `prepare_`; one that came from
    `load_pretrained` or an `IntlassConfig` can call its own ``save_pretrained``. ``options`` go to
    that method. The files are safetensors with the layers' buffers (codes, scales, zeros) and a
    config.json that describes them; reading them back gives the same model bit for bit.

    Raises ValueError for a model without quantised layers, or with layers that have no file format:
    `RotatedIntLinear`s and `QATLinear`s; TypeError for one that is not transformers'.

    >>> save_pretrained(model, "llama-int4")                                  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_pretrained: {type(model).__name__} is no model of transformers; torch.save its "
            "state_dict()"
        )
    for path, module in model.named_modules():
        if isinstance(module, (QATLinear, RotatedIntLinear)):
            raise ValueError(
                f"save_pretrained: {path} is a {type(module).__name__}, which has no file format: "
                "keep its state_dict, or train without rotation and call convert_ first"
            )
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


def _with_rtn(scheme: Scheme) -> Scheme:
    return Scheme(scheme.bits, scheme.group_size, scheme.symmetric, scheme.activation)


def _check_group(path: str, k: int, scheme: Scheme) -> None:
    if scheme.group_size is not None and k % scheme.group_size:
        raise ValueError(
            f"IntlassConfig: {path}: K={k} is not a multiple of "
            f"group_size={scheme.group_size}; choose another group_size or keep the layer as it "
            "is (modules_to_not_convert, on the command line --keep)"
        )
