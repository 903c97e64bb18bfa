"""Small random models of each architecture as GGUF files, laid out as llama.cpp's converter does.

Names come from the gguf package's own maps, metadata and what is done to tensors from the converter
(its folder conversion/), nothing from the package under test. Not here: single tensors, the
tokenizer's vocabulary (tiny_gguf.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tiny_gguf import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    SPECIAL,
    TEMPLATE,
    add,
    finish,
    rotary_to_gguf,
    vocabulary,
)
from torch import Tensor
from transformers import PreTrainedModel

Write = Callable[[gguf.GGUFWriter, Any], None]
LENGTH, EXPERTS = 128, 4
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Case:
    """``arch``: what llama.cpp calls it; ``more``: what its converter writes besides the usual."""

    arch: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    more: Write = lambda writer, config: None


def _llama(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        dim = config.head_dim
        frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], 8192
        factors = []
        for frequency in frequencies:
            length = 2 * math.pi / frequency
            smooth = (old / length - low) / (high - low)
            if length < old / high:
                factors.append(1)
            elif length > old / low:
                factors.append(rope["factor"])
            else:
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def _mixture(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    if "sliding_attention" in config.layer_types:
        writer.add_sliding_window(config.sliding_window)


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    original = config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


_WIDE_HEADS = {"head_dim": 32}
_EXPERTS = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_GEMMA3_ROPE = {
    "sliding_attention": PLAIN,
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
_EXACT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 16,
}

CASES = {
    "llama": Case("llama", "LlamaForCausalLM", {}, _llama),
    "llama tied": Case("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}, _llama),
    "llama biases": Case(
        "llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, _llama
    ),
    "llama 3.1": Case(
        "llama",
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3, "head_dim": 64, "max_position_embeddings": 131072},
        _llama,
    ),
    "mixtral": Case(
        "llama",
        "MixtralForCausalLM",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16},
        _llama,
    ),
    "smollm3": Case(
        "smollm3", "SmolLM3ForCausalLM", {"num_hidden_layers": 5, "head_dim": 16}, _llama
    ),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM"),
    "qwen2 yarn": Case(
        "qwen2",
        "Qwen2ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2 linear": Case(
        "qwen2",
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2moe": Case(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
        _mixture,
    ),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", {**_WIDE_HEADS, "tie_word_embeddings": True}),
    "qwen3moe": Case(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, **_WIDE_HEADS, "norm_topk_prob": True},
        _mixture,
    ),
    "gemma": Case("gemma", "GemmaForCausalLM", _WIDE_HEADS),
    "gemma2": Case(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_WIDE_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 3},
        _gemma2,
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **_WIDE_HEADS,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "rope_parameters": _GEMMA3_ROPE,
        },
        _gemma3,
    ),
    "gemma3 without a window": Case(
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **_WIDE_HEADS,
            "query_pre_attn_scalar": 32,
            "layer_types": ["full_attention"] * LAYERS,
            "rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN},
        },
        _gemma3,
    ),
    "phi3": Case(
        "phi3",
        "Phi3ForCausalLM",
        {
            "sliding_window": 8,
            "original_max_position_embeddings": LENGTH,
            "rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0},
        },
        _phi3,
    ),
    "phi3 longrope": Case(
        "phi3",
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": 16, "rope_parameters": _LONGROPE},
        _phi3,
    ),
    "starcoder2": Case("starcoder2", "Starcoder2ForCausalLM", {"tie_word_embeddings": True}),
    "gpt-oss": Case(
        "gpt-oss",
        "GptOssForCausalLM",
        {
            **_WIDE_HEADS,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "num_hidden_layers": 3,
            "rope_parameters": _EXACT_YARN,
        },
        _gpt_oss,
    ),
}


def random_model(case: Case, **changes: Any) -> PreTrainedModel:
    """Float, with biases and norms that are not the identity."""
    model_class = getattr(transformers, case.model)
    fields = {
        "vocab_size": len(vocabulary()[0]),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": LENGTH,
        "rope_parameters": dict(PLAIN),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**fields, **case.config, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.1 * torch.randn(parameter.shape)
        else:
            parameter.data = torch.randn(parameter.shape) * 0.2
    return model


# The converter keeps these as they are.
_FLOATS = ("mlp.gate.", "mlp.router.", "shared_expert_gate")


def write_model(
    path: Path,
    case: Case,
    kind: Type = Type.F32,
    *,
    table: Type | None = None,
    experts: Type | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Write a random model; returns it with the values that the file has, dequantised by gguf.

    ``kind``: of its linears; ``table``: of embedding and head, ``experts``: of experts (default: as
    well).
    """
    model = random_model(case, **changes)
    writer = gguf.GGUFWriter(path, case.arch)
    add_metadata(writer, model.config)
    case.more(writer, model.config)
    add_vocabulary(writer)
    layout = _Layout(case.arch, model.config)
    state = {}
    for name, parameter in model.named_parameters():
        of_table = name.startswith(("model.embed_tokens", "lm_head"))
        wanted = (table or kind) if of_table else kind
        if experts is not None and ".experts." in name:
            wanted = experts
        if parameter.dim() == 1 or name.endswith("_bias") or any(map(name.__contains__, _FLOATS)):
            wanted = Type.F32
        state[name] = layout.write(writer, name, parameter.data, wanted)
    finish(writer, path)
    model.load_state_dict(state, strict=False)
    return model


def add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the converter writes of every model."""
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if hasattr(config, "norm_epsilon"):
        writer.add_layer_norm_eps(config.norm_epsilon)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)


class _Layout:
    """What the converter makes of a parameter, and what comes back of it."""

    def __init__(self, arch: str, config: Any) -> None:
        number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
        self.names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self.arch, self.config = arch, config

    def write(self, writer: gguf.GGUFWriter, name: str, value: Tensor, kind: Type) -> Tensor:
        """Written; returns the value that the file has then."""
        if self.arch == "gpt-oss" and (".experts." in name or name.endswith("sinks")):
            return self._gpt_oss(writer, name, value, kind)
        if name.endswith("experts.gate_up_proj"):
            halves = zip(("gate_proj", "up_proj"), value.chunk(2, 1), strict=True)
            stem = name.removesuffix("gate_up_proj")
            return torch.cat([self._one(writer, stem + n, v, kind) for n, v in halves], 1)
        return self._one(writer, name, value, kind)

    def _gpt_oss(self, writer: gguf.GGUFWriter, name: str, value: Tensor, kind: Type) -> Tensor:
        """Weights are [experts, K, N] in the model; rows of gate and up alternate."""
        transposed = value.dim() == 3
        rows = value.transpose(1, 2) if transposed else value
        stem = name.removesuffix("_bias")
        last = ".bias" if name.endswith("_bias") else ".weight"
        if stem.endswith("gate_up_proj"):
            stem = stem.removesuffix("gate_up_proj")
            back = torch.empty_like(rows)
            for first, part in enumerate(("gate_proj", "up_proj")):
                back[:, first::2] = self._one(writer, stem + part + last, rows[:, first::2], kind)
        else:
            back = self._one(writer, stem + last, rows, kind)
        return back.transpose(1, 2) if transposed else back

    def _one(self, writer: gguf.GGUFWriter, name: str, value: Tensor, kind: Type) -> Tensor:
        if name.startswith("model.layers") and self.config.model_type == "mixtral":
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        named = ".experts." not in name or name.endswith((".weight", ".bias"))
        stem = name if named else f"{name}.weight"
        of_file = self.names.get_name(stem, try_suffixes=(".weight", ".bias"))
        assert of_file is not None, name
        heads = None
        if self.arch in ("llama", "smollm3"):
            # The converter's permute, for weights and biases of q and k
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(of_file.split(".")[-2])
        shift = 1.0 if self.arch.startswith("gemma") and name.endswith("norm.weight") else 0.0
        stored = value.numpy() + np.float32(shift)
        if heads is not None:
            stored = rotary_to_gguf(stored.reshape(len(stored), -1), heads).reshape(stored.shape)
        if of_file.endswith("ffn_gate_inp_shexp.weight"):
            stored = stored[0]
        back = torch.from_numpy(add(writer, of_file, stored, kind)) - shift
        if heads is not None:
            back = _rotary_from_gguf(back, heads)
        return back.reshape(value.shape)


def _rotary_from_gguf(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_llama(path: Path, kind: Type, *, table: Type, tied: bool = True) -> PreTrainedModel:
    """A random Llama with linears of type ``kind`` and the values that the file has."""
    return write_model(path, CASES["llama"], kind, table=table, tie_word_embeddings=tied)
