"""A Llama in a GGUF file as a transformers model whose linears keep the file's codes.

Lives here: config, tokenizer and model from the file's metadata and tensors, nothing fetched. Not
here: the file format (formats/gguf.py), generation (static_decoding.py).

`load` gives the INT4/INT8 model, `load_dense` the same weights dequantised, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import side_by_side
from ..formats import CanonicalWeight, FormatError
from ..formats.gguf import GGUFFile
from ..formats.layers import buffers_of, layer_of
from ..formats.stored import StoredWeight
from ..nn import IntLinear, PackedLinear
from ..ops import dequantize

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# ggml's names of pre-tokenizers -> whether every digit is a token of its own
_DIGITS_APART = {"smollm": True, "gpt-2": False, "default": False}
_LAYER_TENSORS = {
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

Progress = Callable[[int, int], None]  # tensors done, tensors in all


class IntEmbedding(nn.Module):
    """Rows of a quantised table, dequantised as they are looked up.

    ``table``: the IntLinear whose weight [vocabulary, K] it reads, as a tied head has it: one copy.
    """

    def __init__(self, table: IntLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        if self.table.bits == 4:
            return self._int4(ids)
        rows = self.table.weight[ids].to(torch.float32)  # [..., K]
        scales = self.table.scales[ids].to(torch.float32)  # [..., K/group_size]
        grouped = rows.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
        embedded: Tensor = grouped.flatten(-2).to(self.dtype)
        return embedded

    def _int4(self, ids: Tensor) -> Tensor:
        table, rows = self.table, ids.reshape(-1)
        zeros = None if table.zeros is None else table.zeros[rows]
        k = table.in_features
        dense = dequantize(table.weight[rows], table.scales[rows], zeros, k=k, dtype=self.dtype)
        return dense.view(*ids.shape, k)


def config_of(file: GGUFFile) -> LlamaConfig:
    """The transformers config of a GGUF Llama without rope scaling."""
    architecture = _metadata(file, "general.architecture")
    if architecture != "llama":
        raise FormatError(f"{file.path}: architecture {architecture!r}; only 'llama' is supported")
    if "rope_freqs.weight" in file.tensors or "llama.rope.scaling.type" in file.metadata:
        raise FormatError(f"{file.path}: scaled rotary embeddings are not supported")
    heads = _metadata(file, "llama.attention.head_count")
    hidden = _metadata(file, "llama.embedding_length")
    return LlamaConfig(
        vocab_size=len(_metadata(file, "tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=_metadata(file, "llama.feed_forward_length"),
        num_hidden_layers=_metadata(file, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.metadata.get("llama.attention.head_count_kv", heads),
        head_dim=file.metadata.get("llama.rope.dimension_count", hidden // heads),
        max_position_embeddings=_metadata(file, "llama.context_length"),
        rms_norm_eps=_metadata(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": file.metadata.get("llama.rope.freq_base", 10000.0),
        },
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
    )


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The file's byte-level BPE tokenizer with its special tokens and chat template."""
    model, pre = _metadata(file, "tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _DIGITS_APART:
        raise FormatError(
            f"{file.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; supported are 'gpt2' "
            f"with {', '.join(map(repr, _DIGITS_APART))}"
        )
    tokens = _metadata(file, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in _metadata(file, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    split: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _DIGITS_APART[pre]:
        split.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == _CONTROL)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])

    def special(name: str) -> str | None:
        index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding"),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def load(
    file: GGUFFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """The model with every quantised weight in an IntLinear; ``dtype`` is that of activations.

    A tied table is stored once and serves as embedding and head.
    """

    def linear(weight: CanonicalWeight | Tensor) -> nn.Module:
        if isinstance(weight, Tensor):
            return _dense_linear(weight.to(device, dtype))
        return _int_linear(weight, device)

    model = _build(file, linear, device, dtype, progress)
    side_by_side.lay_siblings(model)
    return model


def load_dense(
    file: GGUFFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """The same model with every weight dequantised to ``dtype`` in an nn.Linear."""

    def linear(weight: CanonicalWeight | Tensor) -> nn.Module:
        dense = weight if isinstance(weight, Tensor) else weight.dequantize()
        return _dense_linear(dense.to(device, dtype))

    return _build(file, linear, device, dtype, progress)


def rotary_row_order(rows: int, heads: int) -> Tensor:
    """Row of the file that belongs at each row of transformers' q_proj or k_proj.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head, transformers (i, i + head_dim / 2).
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _build(
    file: GGUFFile,
    linear: Callable[[CanonicalWeight | Tensor], nn.Module],
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None,
) -> LlamaForCausalLM:
    config = config_of(file)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wanted = list(targets(config))
    for done, (name, path) in enumerate(wanted, 1):
        weight = read_tensor(file, name, config)
        if path.endswith("norm"):
            assert isinstance(weight, Tensor)
            values = nn.Parameter(weight.to(device, dtype), requires_grad=False)
            model.get_submodule(path).weight = values
        else:
            model.set_submodule(path, linear(weight))
        if progress is not None:
            progress(done, len(wanted))
    embedding = model.get_submodule("model.embed_tokens")
    if config.tie_word_embeddings:
        model.set_submodule("lm_head", embedding)
    if isinstance(embedding, PackedLinear):  # for products: rows are looked up in a dense copy
        embedding = _dense_linear(file.dense("token_embd.weight").to(device, dtype))
    model.set_submodule("model.embed_tokens", _embedding(embedding, dtype))
    # Its frequencies are computed, not loaded: made on the meta device they hold nothing.
    rotary = type(model.model.rotary_emb)(config=config).to(device)
    model.set_submodule("model.rotary_emb", rotary)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise FormatError(f"{file.path}: no tensor for {', '.join(left)}")
    return model.eval()


def targets(config: LlamaConfig) -> Iterator[tuple[str, str]]:
    """Name in the file and module path of each tensor."""
    yield "token_embd.weight", "model.embed_tokens"
    yield "output_norm.weight", "model.norm"
    if not config.tie_word_embeddings:
        yield "output.weight", "lm_head"
    for i in range(config.num_hidden_layers):
        for name, path in _LAYER_TENSORS.items():
            yield f"blk.{i}.{name}.weight", f"model.layers.{i}.{path}"


def read_tensor(file: GGUFFile, name: str, config: LlamaConfig) -> CanonicalWeight | Tensor:
    """A tensor of the file, its rows in transformers' order."""
    weight = file.weight(name) if file.is_quantized(name) else file.dense(name)
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return weight
    order = rotary_row_order(weight.shape[0], heads)
    return weight[order] if isinstance(weight, Tensor) else weight.take_rows(order)


def stored(weight: CanonicalWeight, read: Callable[[], CanonicalWeight]) -> StoredWeight:
    """A weight of the file, whose codes ``read`` brings (again)."""
    zeros = weight.zeros

    def codes() -> Tensor:
        # Of 8 bits with zeros (Q5_1, Q5_K) they are not signed: `StoredWeight` has 128 less.
        wide = weight.bits == 8 and zeros is not None
        return read().codes ^ -128 if wide else read().codes

    return StoredWeight(weight.name, weight.bits, weight.shape, weight.scales, zeros, None, codes)


def _int_linear(weight: CanonicalWeight, device: torch.device | str) -> nn.Module:
    spec, buffers = buffers_of(stored(weight, lambda: weight), None)
    tensors = {name: get().to(device) for name, get in buffers.items()}
    return layer_of(spec.kind, spec.in_features, None, tensors)


def _embedding(table: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(table, IntLinear):
        return IntEmbedding(table, dtype)
    assert isinstance(table, nn.Linear)
    embedding: nn.Module = nn.Embedding.from_pretrained(table.weight, freeze=True)
    return embedding


def _dense_linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _metadata(file: GGUFFile, key: str) -> Any:
    try:
        return file.metadata[key]
    except KeyError:
        raise FormatError(f"{file.path}: metadata {key!r} is missing") from None
