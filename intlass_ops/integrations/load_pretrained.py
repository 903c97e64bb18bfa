"""`load_pretrained`: checkpoints of other libraries, and our own, on our layers.

Lives here: how the tensors of a checkpoint become those of a transformers model, one at a time. Not
here: the formats (formats/), GGUF files (gguf_models.py), reading tensors late (deferred.py), how
our own are described and saved (transformers_quantizer.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ..formats import FormatError
from ..formats.checkpoint import CACHE_SCALES, Checkpoint
from ..formats.experts import stacked
from ..formats.gguf import GGUFFile
from ..formats.layers import METHOD, LayerSpec, buffers_of, write_specs
from ..formats.mxfp4 import Mxfp4
from ..formats.reader import Reader, open_reader, quantization_config
from ..ops._library import FLOATS
from . import experts as mixtures
from . import gguf_models
from . import transformers_quantizer as _quantizer  # noqa: F401  (registers quant_method="intlass")
from .deferred import Deferred, State, add_layer, class_of, finish, placed
from .expert_checkpoints import fused, renamed, unused


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    device_map: Any = None,
    dtype: torch.dtype | None = None,
    checkpoint_format: str | None = None,
) -> PreTrainedModel:
    """A transformers model whose quantised linears are `IntLinear`s with the checkpoint's codes.

    ``path``: a directory with config.json and safetensors in GPTQ, AWQ, AutoRound's,
    compressed-tensors, ModelOpt's, HQQ, torchao's, bitsandbytes's, gpt-oss's, FP8's or our own
    layout, or a GGUF file. Linears of NVFP4 and MXFP4 become `Fp4Linear`s, those of FP8
    `Fp8Linear`s, those of NF4, IQ4 and bitsandbytes' FP4 `Lut4Linear`s; their activations stay in
    16 bits, as those of LLM.int8 do. Experts that the model holds fused become
    `IntExpertLinear`s, `Fp4ExpertLinear`s or `Fp8ExpertLinear`s. Codes, scales and zero points are
    those of the file, not rounded again; weights are read one by one, so the peak is about the
    quantised size. A cache of keys and values that the file would have quantised stays in the
    model's dtype.
    ``device_map`` as in transformers; a device such as "cuda" also where accelerate is missing.
    ``dtype`` is that of everything that is not quantised (default: the checkpoint's; float32 for
    GGUF). ``checkpoint_format``: "gptq" or "gptq_v2", for GPTQ files that contradict themselves,
    AutoRound's too. The model's ``save_pretrained`` writes our layout.

    Raises FileNotFoundError, FormatError (a ValueError) for a checkpoint that is damaged or of a
    kind that is not read, ValueError for weights that do not fit the model, and
    BackendUnavailableError for a GPU that is not there.

    >>> model = load_pretrained("llama-3-8b-gptq", device_map="cuda")         # doctest: +SKIP
    """
    path = Path(path)
    if path.is_file():
        return gguf_models.load_device_map(GGUFFile(path), device_map, dtype)
    checkpoint = Checkpoint(path)
    if quantization_config(checkpoint).get("quant_method") == METHOD:
        model_class = class_of(AutoConfig.from_pretrained(path))
        return finish(path, *placed(model_class, path, device_map, dtype=dtype or "auto"))
    reader = open_reader(checkpoint, checkpoint_format=checkpoint_format)
    if not reader.paths:
        raise FormatError(f"{path}: no quantised weight in this checkpoint")
    config = AutoConfig.from_pretrained(path)
    if isinstance(reader, Mxfp4):
        specs, state = _fused_layers(reader)
    else:
        left = unused(class_of(config), config, reader.paths)
        paths = [path for path in reader.paths if path not in left]
        specs, state = _layers(reader, fused(class_of(config), config, paths), left)
    places = renamed(class_of(config), config, [p for p in reader.paths if p in specs])
    config.quantization_config = write_specs({places.get(p, p): s for p, s in specs.items()})
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    options = {"config": config, "state_dict": state, "dtype": dtype}
    model, info = placed(class_of(config), None, device_map, **options)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return finish(path, model, info)


def _layers(
    reader: Reader, experts: Mapping[str, list[list[str]]], left: Collection[str]
) -> tuple[dict[str, LayerSpec], State]:
    """Specs of the quantised layers, and every tensor of the model.

    ``experts``: paths of layers of fused experts, and of the checkpoint's linears they consist of.
    ``left``: paths of linears that the model does without.
    """
    specs: dict[str, LayerSpec] = {}
    state: State = {}
    checkpoint = reader.checkpoint
    read = set(left)
    for target, parts in experts.items():
        paths = [path for row in parts for path in row]
        weights = [[reader.stored(path) for path in row] for row in parts]
        if any(f"{path}.bias" in checkpoint.tensors for path in paths):
            raise FormatError(f"{checkpoint.directory}: {target}: biases of experts are not read")
        activation = reader.activation(paths[0])
        specs[target] = add_layer(state, target, *stacked(target, weights, activation))
        read.update(paths)
    for path in reader.paths:
        if path in read:
            continue
        stored = reader.stored(path)
        spec, buffers = buffers_of(stored, reader.activation(path))
        specs[path] = add_layer(state, path, spec, buffers)
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
        if path in read or (path in specs and part != "bias"):
            return True
        # What bitsandbytes keeps of a weight: path.weight.absmax
        owner, _, below = name.partition(".weight.")
        return bool(below) and (owner in read or owner in specs)

    _add_rest(state, checkpoint, is_read)
    return specs, state


def _fused_layers(reader: Mxfp4) -> tuple[dict[str, LayerSpec], State]:
    """The same of a checkpoint whose experts are stored as the model holds them."""
    specs: dict[str, LayerSpec] = {}
    state: State = {}
    read: set[str] = set()
    for path in reader.paths:
        target = path + mixtures.SUFFIX
        specs[target] = add_layer(state, target, *reader.experts(path))
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


def _reading(checkpoint: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.read(name)
