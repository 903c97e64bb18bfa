"""gpt-oss in GGUF files: experts in MXFP4 or other types, its tokens, what is refused of it.

Compared with transformers' own model of the weights that the gguf package dequantises.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf import GGMLQuantizationType as Type  # noqa: E402
from test_gguf_tokenizers import TEXTS, byte_level, ids, known_splits, write  # noqa: E402
from tiny_gguf_models import CASES, EXPERTS, write_model  # noqa: E402
from transformers import GptOssForCausalLM  # noqa: E402

from intlass_ops import (  # noqa: E402
    Fp4ExpertLinear,
    IntExpertLinear,
    IntLinear,
    load_pretrained,
)
from intlass_ops.formats import FormatError  # noqa: E402
from intlass_ops.formats.experts import stacked  # noqa: E402
from intlass_ops.formats.fp4 import StoredFp4  # noqa: E402
from intlass_ops.formats.gguf import GGUFFile  # noqa: E402
from intlass_ops.integrations import gguf_models  # noqa: E402
from intlass_ops.integrations.gguf_tokenizers import tokenizer_of  # noqa: E402

IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
CASE = CASES["gpt-oss"]
HARMONY = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>",
    "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def assert_same_experts(model: Any, original: Any, kind: type, *, atol: float = 0) -> None:
    for at, name in ((at, name) for at in range(3) for name in ("gate_up_proj", "down_proj")):
        module = model.get_submodule(f"model.layers.{at}.mlp.experts")
        layer = getattr(module, f"{name}_quantized")
        assert isinstance(layer, kind)
        theirs = original.get_parameter(f"model.layers.{at}.mlp.experts.{name}").transpose(1, 2)
        torch.testing.assert_close(layer.dequantize(), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("rest", [Type.Q8_0, Type.BF16, Type.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@torch.no_grad()
def test_as_it_is_published(tmp_path: Path, rest: Type, tied: bool) -> None:
    path = tmp_path / "q.gguf"
    original = write_model(path, CASE, rest, experts=Type.MXFP4, tie_word_embeddings=tied)
    model = load_pretrained(path)
    assert type(model) is type(original) is GptOssForCausalLM
    assert_same_experts(model, original, Fp4ExpertLinear)
    linears = [module for module in model.modules() if isinstance(module, IntLinear)]
    assert len(linears) == (4 * 3 + 1 if rest == Type.Q8_0 else 0)
    for name, value in original.named_parameters():
        if name.endswith(("sinks", "bias", "norm.weight", "router.weight")):
            path_of, _, last = name.rpartition(".")
            assert torch.equal(getattr(model.get_submodule(path_of), last), value), name
    logits = model(IDS).logits
    assert_same(logits, original(IDS).logits)
    assert_same(gguf_models.load(GGUFFile(path))(IDS).logits, logits)
    assert_same(gguf_models.load_dense(GGUFFile(path))(IDS).logits, logits)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    text = model.generate(IDS[:1], **how)
    assert torch.equal(text, original.generate(IDS[:1], **how))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(IDS).logits, logits)
    assert torch.equal(again.generate(IDS[:1], **how), text)
    own, others = model.state_dict(), again.state_dict()
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)


def test_experts_have_the_codes_and_scales_of_the_file(tmp_path: Path) -> None:
    """Nibble by nibble, from the bytes as the gguf package finds them."""
    write_model(tmp_path / "q.gguf", CASE, Type.Q8_0, experts=Type.MXFP4)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    experts = load_pretrained(tmp_path / "q.gguf").model.layers[1].mlp.experts
    for layer, parts in (
        (experts.gate_up_proj_quantized, ("gate", "up")),
        (experts.down_proj_quantized, ("down",)),
    ):
        # Of each expert the rows of gate and up in turns, of each row blocks of 17 bytes
        shape = EXPERTS, layer.out_features // len(parts), layer.in_features // 32, 17
        blocks = [tensors[f"blk.1.ffn_{part}_exps.weight"].reshape(shape) for part in parts]
        joined = np.stack(blocks, 2).reshape(EXPERTS, layer.out_features, -1, 17)
        codes = np.concatenate((joined[..., 1:] & 15, joined[..., 1:] >> 4), -1)
        codes = codes.reshape(EXPERTS, layer.out_features, -1)
        np.testing.assert_array_equal(layer.scales, joined[..., 0])
        np.testing.assert_array_equal(layer.weight & 15, codes[..., ::2])
        np.testing.assert_array_equal(layer.weight >> 4, codes[..., 1::2])


@pytest.mark.parametrize(
    "kind",
    [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.IQ4_NL, Type.BF16],
    ids=lambda kind: kind.name,
)
@torch.no_grad()
def test_experts_of_other_types(tmp_path: Path, kind: Type) -> None:
    original = write_model(tmp_path / "q.gguf", CASE, Type.Q8_0, experts=kind)
    model = load_pretrained(tmp_path / "q.gguf")
    if kind != Type.BF16:
        assert_same_experts(
            model, original, IntExpertLinear, atol=1e-6 * (kind in (Type.Q4_1, Type.Q5_1))
        )
    assert_same(model(IDS).logits, original(IDS).logits)


@torch.no_grad()
def test_in_bfloat16_the_codes_are_the_same(tmp_path: Path) -> None:
    original = write_model(tmp_path / "q.gguf", CASE, Type.Q8_0, experts=Type.MXFP4)
    model = load_pretrained(tmp_path / "q.gguf", dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.sinks.dtype == torch.bfloat16
    assert bool(model(IDS).logits.isfinite().all())
    assert_same_experts(model, original, Fp4ExpertLinear)


def sound(tmp_path: Path, experts: Type = Type.F32) -> GGUFFile:
    write_model(tmp_path / "f.gguf", CASE, experts=experts)
    return GGUFFile(tmp_path / "f.gguf")


def test_config_is_the_original(tmp_path: Path) -> None:
    """YaRN's ramp is not rounded to whole frequencies, as the original model's config says."""
    original = write_model(tmp_path / "f.gguf", CASE).config
    config = gguf_models.config_of(GGUFFile(tmp_path / "f.gguf"))
    assert config.rope_parameters == original.rope_parameters
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    for name in (
        "attention_bias", "head_dim", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_experts_per_tok", "num_key_value_heads", "num_local_experts", "sliding_window",
        "swiglu_alpha", "swiglu_limit", "tie_word_embeddings", "vocab_size",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(original, name), name
    assert config.rms_norm_eps == np.float32(original.rms_norm_eps)
    assert config.eos_token_id == [2, 0]  # the vocabulary has <|endoftext|>


def test_generation_ends_where_the_model_calls_a_tool(tmp_path: Path) -> None:
    file = sound(tmp_path)
    file.metadata["tokenizer.ggml.tokens"][7] = "<|call|>"
    model = gguf_models.load_device_map(file, None, None)
    assert model.generation_config.eos_token_id == [2, 0, 7]
    del file.metadata["tokenizer.ggml.eos_token_id"], file.metadata["tokenizer.ggml.tokens"]
    assert gguf_models.config_of(file).eos_token_id is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.sliding_window", 0, "'gpt-oss.attention.sliding_window' is 0; expected more"),
        ("attention.sliding_window", None, "'gpt-oss.attention.sliding_window' is missing"),
        ("attention.sliding_window_pattern", 2, "sliding_window_pattern' is 2, which is not supp"),
        ("rope.freq_base_swa", 10000.0, "'gpt-oss.rope.freq_base_swa' is 10000.0, which is not"),
        ("rope.scaling.yarn_attn_factor", 2.0, "yarn_attn_factor' is 2.0, which is not supported"),
        ("rope.scaling.factor", None, "'gpt-oss.rope.scaling.factor' is missing"),
        ("expert_count", 0, "'gpt-oss.expert_count' is 0; expected more"),
        ("expert_count", 8, r"ffn_gate_inp\.weight has shape \(4, 64\); model\..*router\.weight"),
        ("expert_feed_forward_length", None, "expert_feed_forward_length' is missing"),
        ("expert_feed_forward_length", 64, r"ffn_gate_exps\.weight and .*gate_up_proj of the mode"),
        ("expert_shared_count", 1, "'gpt-oss.expert_shared_count' is 1, which is not supported"),
    ],
)
def test_metadata_that_would_not_be_used_is_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    file = sound(tmp_path)
    file.metadata.pop(f"gpt-oss.{key}", None)
    if value is not None:
        file.metadata[f"gpt-oss.{key}"] = value
    with pytest.raises(FormatError, match=message):
        gguf_models.load_dense(file)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("attn_sinks.weight", None, r"no tensor 'blk\.0\.attn_sinks\.weight'"),
        ("attn_q.bias", None, r"GptOssForCausalLM has no use for blk\.0\.attn_k\.bias"),
        ("ffn_up_exps.bias", None, r"no tensor 'blk\.0\.ffn_up_exps\.bias'"),
        ("ffn_norm.weight", "attn_norm.weight", r"has no use for blk\.0\.ffn_norm\.weight"),
        ("ffn_up_exps.weight", "ffn_down_exps.weight", r"ffn_gate_exps\.weight and blk\.0\.ffn_up"),
        ("ffn_up_exps.bias", "ffn_down_exps.bias", r"ffn_gate_exps\.bias and blk\.0\.ffn_up_exps"),
        ("ffn_up_exps.bias", "attn_norm.weight", r"has shape \(4, 96\) and \(64,\); model\."),
        ("ffn_up_exps.weight", "attn_q.weight", r"has shape \(4, 96, 64\) and \(128, 64\); model"),
        ("ffn_down_exps.weight", "attn_q.weight", r"ffn_down_exps\.weight has shape \(128, 64\)"),
    ],
)
def test_tensors_too_many_too_few_or_of_another_shape_are_named(
    tmp_path: Path, name: str, other: str | None, message: str
) -> None:
    file = sound(tmp_path)
    file.tensors.pop(f"blk.0.{name}", None)
    if other is not None:
        file.tensors[f"blk.0.{name}"] = file.info(f"blk.0.{other}")
    with pytest.raises(FormatError, match=message):
        gguf_models.load_dense(file)


def test_experts_that_are_not_stored_alike_are_refused(tmp_path: Path) -> None:
    file = sound(tmp_path, Type.Q8_0)
    up = "blk.0.ffn_up_exps.weight"
    size = file.info(up).nbytes // 2  # blocks of 17 bytes in place of 34
    for kind, message in (
        ("MXFP4", r"ffn_gate_exps.weight\[0\] and blk\.0\..*\[0\] are not stored alike"),
        ("F32", r"ffn_up_exps\.weight are not stored alike"),
        ("I8", r"ffn_up_exps\.weight are not stored alike"),
    ):
        file.tensors[up] = replace(file.info(up), type=kind, nbytes=size)
        with pytest.raises(FormatError, match=message):
            gguf_models.load(file)


def test_nan_scale_is_damage(tmp_path: Path) -> None:
    info = sound(tmp_path, Type.MXFP4).info("blk.2.ffn_down_exps.weight")
    octets = bytearray((tmp_path / "f.gguf").read_bytes())
    octets[info.offset + 17 * 5] = 255
    (tmp_path / "f.gguf").write_bytes(octets)
    message = r"the scales of blk\.2\.ffn_down_exps\.weight\[0\] hold a NaN"
    for load in (load_pretrained, lambda path: gguf_models.load_dense(GGUFFile(path))):
        with pytest.raises(FormatError, match=message):
            load(tmp_path / "f.gguf")


def test_rows_that_alternate_are_alike() -> None:
    def of(n: int, scale: float | None = None) -> StoredFp4:
        shared = None if scale is None else torch.tensor(scale)
        codes, scales = torch.zeros(n, 16, dtype=torch.uint8), torch.zeros(n, 1, dtype=torch.uint8)
        kind = "mxfp4" if scale is None else "nvfp4"
        return StoredFp4("w", kind, (n, 32), shared, lambda: codes, lambda: scales)

    stacked("x", [[of(4)], [of(4)]], None, alternating=True)
    with pytest.raises(FormatError, match="x: gate and up, whose rows alternate, differ in shape"):
        stacked("x", [[of(4)], [of(8)]], None, alternating=True)
    with pytest.raises(FormatError, match="rows alternate, have other global scales"):
        stacked("x", [[of(4, 1.0)], [of(4, 2.0)]], None, alternating=True)


def test_harmony_tokens(tmp_path: Path) -> None:
    """Control tokens stay whole in a conversation, and a template like the original's renders."""
    tokens, merges = byte_level(known_splits()["gpt-4o"])
    tokens = [*tokens, *HARMONY]
    kinds = [3 if token in tokens[:5] or token in HARMONY else 1 for token in tokens]
    file = write(
        tmp_path / "t.gguf", "gpt2", tokens, arch="gpt-oss", pre="gpt-4o", merges=merges,
        kinds=kinds,
    )  # fmt: skip
    file.metadata["tokenizer.ggml.eos_token_id"] = tokens.index("<|return|>")
    file.metadata["tokenizer.chat_template"] = (
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y') }}<|end|>"
        "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    tokenizer = tokenizer_of(file)
    chat = [{"role": "user", "content": "It's"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|end|><|start|>user<|message|>It's<|end|><|start|>assistant")
    found = ids(tokenizer, text)
    whole = [tokens[each] for each in found if tokens[each] in HARMONY]
    assert whole == ["<|start|>", "<|message|>", "<|end|>"] * 2 + ["<|start|>"]
    assert found[0] == tokens.index("<|start|>")  # no BOS
    assert tokenizer.decode(found) == text
    assert tokenizer.eos_token == "<|return|>"
    for each in TEXTS:
        assert tokenizer.decode(ids(tokenizer, each)) == each
