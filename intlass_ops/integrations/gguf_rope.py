"""Rotary embeddings of a GGUF file as the ``rope_parameters`` of a transformers config.

Files of Llama 3.1 and newer hold what each frequency is divided by (`rope_freqs.weight`) but not
the parameters that it was computed from. Where the usual parameters give the same numbers they are
named; otherwise the numbers themselves are kept, as transformers' "longrope" with one list for
every length. Not here: the other metadata (gguf_config.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formats import FormatError
from .gguf_architectures import Architecture

if TYPE_CHECKING:
    from .gguf_config import Keys

FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
# What llama.cpp's converter computes the factors from; only the largest factor differs by model.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROUNDING = 1e-5  # of factors in float32, of differences that cancel some digits


def rope_parameters(keys: Keys, known: Architecture, head_dim: int, length: int) -> dict[str, Any]:
    """Config fields. ``length``: the positions that the model was made for."""
    file = keys.file
    rotary = keys.get("rope.dimension_count", int, head_dim)
    if rotary != head_dim and not (known.partial_rotary and 0 < rotary < head_dim):
        raise FormatError(
            f"{file.path}: rotary embeddings of {rotary} of {head_dim} values a head are not "
            f"supported for architecture {keys.name!r}"
        )
    theta = _positive(keys, "rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    fields: dict[str, Any] = {"rope_parameters": rope}
    original = keys.get("rope.scaling.original_context_length", int, length) or length
    if known.partial_rotary:  # Phi-3 and its kin: their config has both in any case
        rope["partial_rotary_factor"] = rotary / head_dim
        fields["original_max_position_embeddings"] = original
    kind = keys.get("rope.scaling.type", str, "none")
    by_length = any(name in file.tensors for name in (LONG_FACTORS, SHORT_FACTORS))
    if by_length and (FACTORS in file.tensors or not known.partial_rotary):
        raise _unsupported(keys, kind)
    if by_length:
        if kind not in ("none", "longrope"):
            raise _unsupported(keys, kind)
        rope["rope_type"] = "longrope"
        rope["long_factor"] = _factors(keys, LONG_FACTORS, rotary).tolist()
        rope["short_factor"] = _factors(keys, SHORT_FACTORS, rotary).tolist()
        rope["original_max_position_embeddings"] = original
        rope["attention_factor"] = _positive(keys, "rope.scaling.attn_factor", 1.0)
    elif FACTORS in file.tensors:
        if kind != "none" or not known.interleaved:  # llama.cpp has no use for them elsewhere
            raise _unsupported(keys, kind)
        rope |= _of_factors(theta, _factors(keys, FACTORS, rotary), length)
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": _positive(keys, "rope.scaling.factor"),
            "original_max_position_embeddings": original,
            "beta_fast": _positive(keys, "rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": _positive(keys, "rope.scaling.yarn_beta_slow", 1.0),
        }
        if known.exact_yarn:
            rope["truncate"] = False
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": _positive(keys, "rope.scaling.factor")}
    elif kind != "none":
        raise _unsupported(keys, kind)
    return fields


def _of_factors(theta: float, factors: Tensor, length: int) -> dict[str, Any]:
    """The same as parameters of Llama 3, or as a list."""
    factor = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (torch.arange(len(factors)).double() / len(factors))
    low, high, original = _LLAMA3.values()
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    if torch.allclose(
        1 / ((1 - smooth) / factor + smooth), factors.double(), rtol=_ROUNDING, atol=0
    ):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    every = factors.tolist()
    return {
        "rope_type": "longrope",
        "long_factor": every,
        "short_factor": every,
        "original_max_position_embeddings": length,
        "attention_factor": 1.0,
    }


def _factors(keys: Keys, name: str, rotary: int) -> Tensor:
    found = keys.file.dense(name)
    if found.shape != (rotary // 2,) or not bool((found > 0).all() and found.isfinite().all()):
        raise FormatError(
            f"{keys.file.path}: {name} is no list of {rotary // 2} positive factors; it has shape "
            f"{tuple(found.shape)}"
        )
    return found


def _positive(keys: Keys, key: str, *default: float) -> float:
    found: float = keys.get(key, float, *default)
    if found <= 0:
        raise FormatError(
            f"{keys.file.path}: metadata '{keys.name}.{key}' is {found}; expected more than 0"
        )
    return found


def _unsupported(keys: Keys, kind: str) -> FormatError:
    return FormatError(
        f"{keys.file.path}: scaled rotary embeddings of type {kind!r} are not supported for "
        f"architecture {keys.name!r} with these tensors"
    )
