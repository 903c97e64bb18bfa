"""Small GGUF files for tests: single tensors, or a random Llama with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tensors(path: Path, tensors: Mapping[str, tuple[np.ndarray, Type]]) -> Path:
    """A file of ``tensors``: float arrays, quantised here to the type given."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        add(writer, name, values, kind)
    return finish(writer, path)


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type) -> None:
    if kind == Type.F32:
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    else:
        writer.add_tensor(name, quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: the specials, every byte, a few pairs, one word."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["h e", "l l", "Ġ w", "1 2", "he ll", "hell o"]
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)], merges


def rotary_to_gguf(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of transformers' q_proj or k_proj in the order llama.cpp stores them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_llama(path: Path, kind: Type, *, table: Type, tied: bool = True) -> LlamaForCausalLM:
    """Write a random Llama with linears of type ``kind``; returns it as transformers has it, float.

    The weights returned are those before quantisation: compare exactly only with F32 files.
    """
    tokens, merges = vocabulary()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
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
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    add(writer, "token_embd.weight", state["model.embed_tokens.weight"], table)
    if not tied:
        add(writer, "output.weight", state["lm_head.weight"], table)
    add(writer, "output_norm.weight", state["model.norm.weight"], Type.F32)
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(LAYERS):
        for name, part in parts.items():
            weight = state[f"model.layers.{layer}.{part}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = rotary_to_gguf(weight, HEADS if name == "attn_q" else KV_HEADS)
            is_norm = name.endswith("norm")
            add(writer, f"blk.{layer}.{name}.weight", weight, Type.F32 if is_norm else kind)
    finish(writer, path)
    return model
