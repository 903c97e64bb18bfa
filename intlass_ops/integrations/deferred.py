"""A transformers model from tensors that are read one at a time, while it is loaded.

Lives here: the tensors, and transformers' ``from_pretrained`` over them. Not here: which tensors a
checkpoint has (load_pretrained.py, gguf_models.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import BackendUnavailableError
from ..formats import FormatError
from ..formats.layers import LayerSpec


class Deferred:
    """What safetensors calls a slice: a tensor that is read when it is indexed with ``...``."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]):
        self.dtype, self.shape, self._read = dtype, shape, read

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


State = dict[str, Deferred]


def add_layer(
    state: State, path: str, spec: LayerSpec, buffers: Mapping[str, Callable[[], Tensor]]
) -> LayerSpec:
    """The tensors of one of our layers into ``state``; its spec again."""
    for name, dtype, shape in spec.tensors:
        state[f"{path}.{name}"] = Deferred(dtype, shape, buffers[name])
    return spec


def placed(model_class: Any, path: Path | None, device_map: Any, **options: Any) -> tuple[Any, Any]:
    """transformers' ``from_pretrained``, the model where ``device_map`` says, and what it found."""
    device_map, device = placement(device_map)
    model, info = model_class.from_pretrained(
        path, device_map=device_map, output_loading_info=True, **options
    )
    return model.to(device), info


def placement(device_map: Any) -> tuple[Any, torch.device | None]:
    """(what to load with, where to move the model then): transformers asks for accelerate with
    every device_map, even where all goes to one device."""
    named = ("auto", "balanced", "balanced_low_0", "sequential")
    if device_map is None or isinstance(device_map, dict) or device_map in named:
        return device_map, None
    device = torch.device(device_map)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device {device}: torch sees no GPU here; load onto the CPU by naming none (intlass "
            "info shows what is missing)"
        )
    if device.type == "cpu" or importlib.util.find_spec("accelerate") is None:
        return None, device
    return device_map, None


def class_of(config: Any) -> Any:
    """The model class that a config names."""
    names = config.architectures or [None]
    found = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise FormatError(f"architecture {names[0]!r} is not one of transformers")
    return found


def finish(path: Any, model: PreTrainedModel, info: Mapping[str, Any]) -> PreTrainedModel:
    """Random weights in place of missing ones would be a silent error: refuse them."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(each) for each in info.get(kind, ()))
        if names:
            raise FormatError(
                f"{path}: {kind.replace('_keys', '')} tensors for {type(model).__name__}: "
                f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )
    return model.eval()
