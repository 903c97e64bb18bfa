"""Small GGUF files for tests: single tensors, a byte-level vocabulary.

Not here: whole models (tiny_gguf_models.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

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


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type) -> np.ndarray:
    """Add a tensor, quantised; returns its values then, as the gguf package dequantises them.

    Types that the package hardly or not at all quantises to get blocks of random bits instead.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind == Type.F32:
        writer.add_tensor(name, values)
        return values
    if kind == Type.NVFP4:
        return add_nvfp4(writer, name, values.shape)
    raw = random_blocks(kind, values.shape) if kind in BLOCKS else quants.quantize(values, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
    return quants.dequantize(raw, kind)


# Where the blocks of a type have their fp16 parameters, and the size of a group
BLOCKS = {
    Type.Q5_1: ((0, 2), 32),
    Type.Q2_K: ((80, 82), 16),
    Type.Q3_K: ((108,), 16),
    Type.Q4_K: ((0, 2), 32),
    Type.Q5_K: ((0, 2), 32),
    Type.Q6_K: ((208,), 16),
    Type.IQ4_NL: ((0,), 32),
    Type.IQ4_XS: ((0,), 32),
    Type.IQ1_S: ((0,), 32),
    Type.IQ1_M: ((), 16),
    Type.IQ2_XXS: ((0,), 32),
    Type.IQ2_XS: ((0,), 16),
    Type.IQ2_S: ((0,), 16),
    Type.IQ3_XXS: ((0,), 32),
    Type.IQ3_S: ((0,), 32),
    Type.TQ1_0: ((52,), 256),
    Type.TQ2_0: ((64,), 256),
}


def random_blocks(kind: Type, shape: tuple[int, ...], scale: float = 0.004) -> np.ndarray:
    """Blocks of random bits, but for their fp16 parameters, which are at most ``scale``."""
    rng = np.random.default_rng(0)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), dtype=np.uint8)
    for at in BLOCKS[kind][0]:
        values = rng.uniform(-scale, scale, (*raw.shape[:-1], 1)).astype(np.float16)
        raw[..., at : at + 2] = values.view(np.uint8)
    if kind == Type.IQ1_M:  # a nibble at the top of each of its last four words
        value = rng.uniform(-scale, scale, raw.shape[:-1]).astype(np.float16).view(np.uint16)
        for i in range(4):
            top = ((value >> 4 * i) & 15).astype(np.uint8) << 4
            raw[..., 49 + 2 * i] = raw[..., 49 + 2 * i] & 15 | top
    return raw.reshape(*shape[:-1], -1)


def add_nvfp4(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random codes and scales, and a second scale for the tensor or for each expert."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // 64, 36), dtype=np.uint8)
    raw[..., :4] = rng.integers(32, 64, raw[..., :4].shape)  # 2^-3 to 2
    raw = raw.reshape(*shape[:-1], -1)
    second = rng.uniform(0.01, 0.02, shape[0] if len(shape) == 3 else 1).astype(np.float32)
    writer.add_tensor(name, raw, raw_dtype=Type.NVFP4)
    for kind in ("scale", "input_scale"):
        writer.add_tensor(name.removesuffix("weight") + kind, second)
    return quants.dequantize(raw, Type.NVFP4) * second.reshape(-1, *[1] * (len(shape) - 1))


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
    """Rows [N, K] of transformers' q_proj or k_proj in the order llama.cpp stores them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
