"""The transformers config of a GGUF file, from its metadata.

Every key of the architecture is either used or known to say nothing; any other is refused, since it
may change what the model computes. Not here: the tables (gguf_architectures.py), rotary embeddings
(gguf_rope.py).
"""

from __future__ import annotations

import math
from typing import Any

import transformers

from ..formats import FormatError
from ..formats.gguf import GGUFFile
from .gguf_architectures import ARCHITECTURES, LLAMA_OF_EXPERTS, Architecture
from .gguf_rope import rope_parameters

_LARGEST = 2**31
_MISSING: Any = object()
# Keys that do not change the result, or not with these values.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "rope.scaling.finetuned": None,
    "rope.scale_linear": (0.0, 1.0),
    "pooling_type": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
}


class Keys:
    """Metadata of a file's architecture, by what stands after its name; knows which were asked for.

    >>> Keys(file).get("block_count", int)                                    # doctest: +SKIP
    32
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.name = metadata(file, "general.architecture", str)
        self._used: set[str] = set()

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """A value of type ``kind``; one for each layer must be the same for all of them."""
        full = f"{self.name}.{key}"
        self._used.add(full)
        values = self.file.metadata.get(full)
        if isinstance(values, list) and values:
            if any(value != values[0] for value in values):
                raise FormatError(
                    f"{self.file.path}: metadata {full!r} differs by layer, which is not supported"
                )
            return checked(self.file, full, values[0], kind)
        return metadata(self.file, full, kind, default)

    def check_all_used(self) -> None:
        for full, value in self.file.metadata.items():
            key = full.removeprefix(f"{self.name}.")
            if key == full or full in self._used:
                continue
            allowed = _WITHOUT_EFFECT.get(key, ())
            if allowed is not None and value not in allowed:
                raise FormatError(
                    f"{self.file.path}: metadata {full!r} is {_shown(value)}, which is not "
                    f"supported for architecture {self.name!r}"
                )


def metadata(file: GGUFFile, key: str, kind: type, default: Any = _MISSING) -> Any:
    """A value of the file; FormatError if it is missing, of another type or out of all bounds."""
    value = file.metadata.get(key)
    if value is not None:
        return checked(file, key, value, kind)
    if default is _MISSING:
        raise FormatError(f"{file.path}: metadata {key!r} is missing")
    return default


def checked(file: GGUFFile, key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) in (int, float):
        value = float(value)
        sound = math.isfinite(value)
    elif kind is int:
        sound = type(value) is int and 0 <= value < _LARGEST
    else:
        sound = type(value) is kind
    if not sound:
        raise FormatError(
            f"{file.path}: metadata {key!r} is {_shown(value)}; expected {kind.__name__}"
        )
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}…"


def architecture_of(file: GGUFFile) -> Architecture:
    """What is known of the file's architecture; FormatError if nothing is."""
    name = metadata(file, "general.architecture", str)
    if name not in ARCHITECTURES:
        raise FormatError(
            f"{file.path}: architecture {name!r} is not read; read are {', '.join(ARCHITECTURES)}"
        )
    if name == "llama" and file.metadata.get("llama.expert_count"):
        return LLAMA_OF_EXPERTS
    return ARCHITECTURES[name]


def config_of(file: GGUFFile) -> Any:
    """The config of the transformers model that a GGUF file holds."""
    known, keys = architecture_of(file), Keys(file)
    model_class = getattr(transformers, known.model)
    heads = _size(keys, "attention.head_count")
    hidden = _size(keys, "embedding_length")
    layers = _size(keys, "block_count")
    head_dim = _head_dim(keys, hidden, heads)
    fields = {
        **known.fixed,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads) or heads,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": _size(keys, "context_length"),
        "head_dim": head_dim,
        "vocab_size": file.info("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "architectures": [known.model],
    }
    for key, (name, kind) in known.required.items():
        fields[name] = _size(keys, key) if kind is int else keys.get(key, kind)
    for key, (name, kind) in known.optional.items():
        value = keys.get(key, kind, None)
        # A window of no tokens stands for none (Phi-4), and so does a missing one (Gemma 3).
        if name == "sliding_window":
            fields[name] = value or None
        elif value is not None:
            fields[name] = value
    for name, part in known.biases.items():
        fields[name] = f"blk.0.{part}.bias" in file.tensors
    if known.scaled_by_width is not None:
        by_width = layers == known.scaled_by_width
        fields["query_pre_attn_scalar"] = hidden // heads if by_width else head_dim
    fields |= rope_parameters(keys, known, head_dim, fields["max_position_embeddings"])
    if known.model == "Gemma3ForCausalLM":
        fields |= _local_and_global(keys, fields)
    for name, of_file in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{name}_token_id"] = token_id(file, of_file, fields["vocab_size"])
    fields["eos_token_id"] = _ends(file, fields["eos_token_id"], known)
    keys.check_all_used()
    _check_layers(file, layers)
    try:
        return model_class.config_class(**fields)
    except Exception as problem:  # whatever the validation of a config class raises
        raise FormatError(
            f"{file.path}: {model_class.config_class.__name__} does not take the file's metadata: "
            f"{problem}"
        ) from None


def token_id(file: GGUFFile, name: str, vocabulary: int) -> int | None:
    """The index of a special token, None if the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    found: int | None = metadata(file, key, int, None)
    if found is not None and found >= vocabulary:
        raise FormatError(
            f"{file.path}: metadata {key!r} is {found}; the vocabulary has {vocabulary} rows"
        )
    return found


def _ends(file: GGUFFile, eos: int | None, known: Architecture) -> int | list[int] | None:
    """EOS, and the other tokens that end a text of such a model where the file has them."""
    tokens = metadata(file, "tokenizer.ggml.tokens", list, []) if known.stops else []
    others = [tokens.index(each) for each in known.stops if each in tokens]
    if eos is None or not others:
        return eos
    return [eos, *(each for each in others if each != eos)]


def _size(keys: Keys, key: str) -> int:
    found: int = keys.get(key, int)
    if found == 0:
        raise FormatError(f"{keys.file.path}: metadata '{keys.name}.{key}' is 0; expected more")
    return found


def _head_dim(keys: Keys, hidden: int, heads: int) -> int:
    head_dim: int = keys.get("attention.key_length", int, hidden // heads)
    of_values = keys.get("attention.value_length", int, head_dim)
    if not 0 < head_dim == of_values:
        raise FormatError(
            f"{keys.file.path}: heads of {head_dim} keys and {of_values} values are not supported"
        )
    return head_dim


def _local_and_global(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3: of six layers five see a window, with rotary embeddings of their own."""
    base = keys.get("rope.freq_base_swa", float, 10000.0)
    local = {"rope_type": "default", "rope_theta": base}
    both = {"sliding_attention": local, "full_attention": fields["rope_parameters"]}
    if fields["sliding_window"] is not None:
        return {"rope_parameters": both}
    every = ["full_attention"] * fields["num_hidden_layers"]
    # transformers wants a window all the same.
    window = fields["max_position_embeddings"]
    return {"rope_parameters": both, "layer_types": every, "sliding_window": window}


def _check_layers(file: GGUFFile, layers: int) -> None:
    """A damaged number of layers would otherwise be a model of any size."""
    held = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if held != layers:
        raise FormatError(
            f"{file.path}: the metadata says {layers} layers, there are tensors of {held}"
        )
