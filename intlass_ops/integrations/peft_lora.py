"""LoRA of peft on a quantised base: adapters train beside codes that stay as they are.

Lives here: the layer that peft puts around an `IntLinear`, and `lora_config`, which tells peft so.
Not here: fine-tuning without peft (qat.py).

Private API of peft, checked on 0.21: `_get_base_layer_device_and_dtype` of its layers.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from ..fp4_linear import Fp4Linear
from ..fp8_linear import Fp8Linear
from ..lut4_linear import Lut4Linear
from ..nn import IntLinear, PackedLinear


class LoraIntLinear(Linear):  # type: ignore[misc]
    """y = base(x) + scaling · B(A(dropout(x))), with the base in INT4, INT8, NF4, FP4 or FP8.

    Several adapters, switching between them and saving work as on any layer of peft. Gradients
    reach x through weight-only bases (w4a16, nf4a16, w8a16, fp8a16); bases that quantise their
    activations have none, so adapters below them cannot be trained.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            # peft warns of base layers it does not know, before it is told that this one does.
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*args, **options)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        """FP8 is floating-point, but no type for an adapter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, None if isinstance(base_layer, Fp8Linear) else dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: rounding the sum to the base's codes again would lose most of the adapter."""
        raise NotImplementedError(
            "merge: the base is quantised, and its codes cannot hold the adapter; keep it beside "
            "the base, or merge it into the floating-point model and quantise that"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def lora_config(**options: Any) -> LoraConfig:
    """`peft.LoraConfig` that knows our layers; ``options`` are its own.

    >>> from peft import get_peft_model                                       # doctest: +SKIP
    >>> model = intlass_ops.load_pretrained("llama-int4")                     # doctest: +SKIP
    >>> config = lora_config(r=8, target_modules=["q_proj", "v_proj"])        # doctest: +SKIP
    >>> model = get_peft_model(model, config)                                 # doctest: +SKIP
    """
    config = LoraConfig(**options)
    ours = (Fp4Linear, Fp8Linear, IntLinear, Lut4Linear, PackedLinear)
    config._register_custom_module(dict.fromkeys(ours, LoraIntLinear))
    return config
