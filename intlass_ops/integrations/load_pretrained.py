"""`load_pretrained`: checkpoints of other libraries, and our own, on our layers.

Lives here: how the tensors of a checkpoint become those of a transformers model, one at a time. Not
here: the formats (formats/), how our own are described and saved (transformers_quantizer.py).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ..errors import BackendUnavailableError
from ..formats import CanonicalWeight, FormatError
from ..formats.checkpoint import CACHE_SCALES, Checkpoint
from ..formats.experts import stacked
from ..formats.fp4 import StoredFp4
from ..formats.gguf import GGUFFile
from ..formats.layers import METHOD, LayerSpec, buffers_of, write_specs
from ..formats.mxfp4 import Mxfp4
from ..formats.reader import Reader, open_reader, quantization_config
from ..formats.stored import StoredWeight
from ..ops._library import FLOATS
from . import experts as mixtures
from . import gguf_llama
from . import transformers_quantizer as _quantizer  # noqa: F401  (registers quant_method="intlass")
from .expert_checkpoints import fused, renamed


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


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    checkpoint_format: str | None = None,
) -> PreTrainedModel:
    """A transformers model whose quantised linears are `IntLinear`s with the checkpoint's codes.

    ``path``: a directory with config.json and safetensors in GPTQ, AWQ, compressed-tensors,
    ModelOpt's, HQQ, torchao's or our own layout, or a GGUF file of a Llama. Linears of NVFP4 and
    MXFP4 become `Fp4Linear`s, their activations stay in 16 bits. The MXFP4 experts of gpt-oss
    become INT8 in groups of 32, which holds them exactly. Codes, scales and zero points are those
    of the file, not rounded again; weights are read one by one, so the peak is about the quantised
    size. Experts that the model holds fused become `IntExpertLinear`s. A cache of keys and values
    that the file would have quantised stays in the model's dtype.
    ``device_map`` as in transformers; a device such as "cuda" also where accelerate is missing.
    ``dtype`` is that of everything that is not quantised (default: the checkpoint's; float32 for
    GGUF). ``checkpoint_format``: "gptq" or "gptq_v2", for GPTQ files that contradict themselves.
    The model's ``save_pretrained`` writes our layout.

    Raises FileNotFoundError, FormatError (a ValueError) for a checkpoint that is damaged or of a
    kind that is not read, ValueError for weights that do not fit the model, and
    BackendUnavailableError for a GPU that is not there.

    >>> model = load_pretrained("llama-3-8b-gptq", device_map="cuda")         # doctest: +SKIP
    """
    path = Path(path)
    if path.is_file():
        return _load_gguf(path, device_map, dtype)
    checkpoint = Checkpoint(path)
    if quantization_config(checkpoint).get("quant_method") == METHOD:
        model_class = class_of(AutoConfig.from_pretrained(path))
        return _finish(path, *_placed(model_class, path, device_map, dtype=dtype or "auto"))
    reader = open_reader(checkpoint, checkpoint_format=checkpoint_format)
    if not reader.paths:
        raise FormatError(f"{path}: no quantised weight in this checkpoint")
    config = AutoConfig.from_pretrained(path)
    if isinstance(reader, Mxfp4):
        specs, state = _fused_layers(reader)
    else:
        specs, state = _layers(reader, fused(class_of(config), config, reader.paths))
    places = renamed(class_of(config), config, [p for p in reader.paths if p in specs])
    config.quantization_config = write_specs({places.get(p, p): s for p, s in specs.items()})
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    options = {"config": config, "state_dict": state, "dtype": dtype}
    model, info = _placed(class_of(config), None, device_map, **options)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return _finish(path, model, info)


def _placed(
    model_class: Any, path: Path | None, device_map: Any, **options: Any
) -> tuple[Any, Any]:
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


def _finish(path: Path, model: PreTrainedModel, info: Mapping[str, Any]) -> PreTrainedModel:
    """Random weights in place of missing ones would be a silent error: refuse them."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(each) for each in info.get(kind, ()))
        if names:
            raise FormatError(
                f"{path}: {kind.replace('_keys', '')} tensors for {type(model).__name__}: "
                f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )
    return model.eval()


def _layers(
    reader: Reader, experts: Mapping[str, list[list[str]]]
) -> tuple[dict[str, LayerSpec], State]:
    """Specs of the quantised layers, and every tensor of the model.

    ``experts``: paths of layers of fused experts, and of the checkpoint's linears they consist of.
    """
    specs: dict[str, LayerSpec] = {}
    state: State = {}
    checkpoint = reader.checkpoint
    read = set()
    for target, parts in experts.items():
        paths = [path for row in parts for path in row]
        weights = [[_of_expert(reader.stored(path)) for path in row] for row in parts]
        if any(f"{path}.bias" in checkpoint.tensors for path in paths):
            raise FormatError(f"{checkpoint.directory}: {target}: biases of experts are not read")
        activation = reader.activation(paths[0])
        specs[target] = _add(state, target, *stacked(target, weights, activation))
        read.update(paths)
    for path in reader.paths:
        if path in read:
            continue
        stored = reader.stored(path)
        spec, buffers = buffers_of(stored, reader.activation(path))
        specs[path] = _add(state, path, spec, buffers)
        bias = checkpoint.tensors.get(f"{path}.bias")
        if bias is not None:
            n = stored.shape[0]
            if bias.dtype not in FLOATS or bias.shape != (n,):
                raise FormatError(
                    f"{bias.file}: {path}.bias is {bias.stored} {list(bias.shape)}; expected "
                    f"floating point [{n}]"
                )
            entry = ("bias", bias.dtype, bias.shape)
            specs[path] = replace(specs[path], tensors=(*specs[path].tensors, entry))

    def is_read(name: str) -> bool:
        path, _, part = name.rpartition(".")
        return path in read or (path in specs and part != "bias")

    _add_rest(state, checkpoint, is_read)
    return specs, state


def _of_expert(stored: StoredWeight | StoredFp4) -> StoredWeight:
    if isinstance(stored, StoredFp4):
        raise FormatError(f"{stored.name}: experts in {stored.kind.upper()} are not read")
    return stored


def _fused_layers(reader: Mxfp4) -> tuple[dict[str, LayerSpec], State]:
    """The same of a checkpoint whose experts are stored as the model holds them."""
    specs: dict[str, LayerSpec] = {}
    state: State = {}
    read: set[str] = set()
    for path in reader.paths:
        target = path + mixtures.SUFFIX
        specs[target] = _add(state, target, *reader.experts(path))
        read.update(reader.names(path))
    _add_rest(state, reader.checkpoint, lambda name: name in read)
    return specs, state


def _add_rest(state: State, checkpoint: Checkpoint, is_read: Callable[[str], bool]) -> None:
    """The tensors of a checkpoint that no quantised layer is made of."""
    for name, header in checkpoint.tensors.items():
        if is_read(name) or name.rpartition(".")[2] in CACHE_SCALES:
            continue
        if header.plain_dtype is None:
            raise FormatError(f"{header.file}: {name} is {header.stored}, which is not read")
        state[name] = Deferred(header.plain_dtype, header.shape, _reading(checkpoint, name))


def _add(
    state: State, path: str, spec: LayerSpec, buffers: Mapping[str, Callable[[], Tensor]]
) -> LayerSpec:
    for name, dtype, shape in spec.tensors:
        state[f"{path}.{name}"] = Deferred(dtype, shape, buffers[name])
    return spec


def _reading(checkpoint: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.read(name)


def _load_gguf(path: Path, device_map: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    file = GGUFFile(path)
    config = gguf_llama.config_of(file)
    dtype = dtype or torch.float32
    specs: dict[str, LayerSpec] = {}
    state: State = {}
    for name, module in list(gguf_llama.targets(config)):
        info = file.info(name)
        tied = module == "model.embed_tokens" and config.tie_word_embeddings
        if file.is_quantized(name) and (tied or module != "model.embed_tokens"):
            head = "lm_head" if tied else module
            stored = _gguf_weight(file, name, config)
            specs[head] = _add(state, head, *buffers_of(stored, None))
            # Looked up in floating point, multiplied in integers: two tensors from here on.
            config.tie_word_embeddings = config.tie_word_embeddings and not tied
        if module == "model.embed_tokens" or not file.is_quantized(name):
            read = _gguf_dense(file, name, config, dtype)
            state[f"{module}.weight"] = Deferred(dtype, info.shape, read)
    config.quantization_config = write_specs(specs)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    options = {"config": config, "state_dict": state, "dtype": dtype}
    return _finish(path, *_placed(transformers.LlamaForCausalLM, None, device_map, **options))


def _gguf_weight(file: GGUFFile, name: str, config: Any) -> StoredWeight:
    def read() -> CanonicalWeight:
        weight = gguf_llama.read_tensor(file, name, config)
        assert isinstance(weight, CanonicalWeight)
        return weight

    return gguf_llama.stored(read(), read)


def _gguf_dense(file: GGUFFile, name: str, config: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        weight = gguf_llama.read_tensor(file, name, config)
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    return read
