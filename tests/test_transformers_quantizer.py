"""IntlassConfig: quantise while loading, save, reload; save_pretrained after quantize_."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_checkpoints import linears, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5EncoderModel

from intlass_ops import Int4WeightOnly, IntLinear, QATConfig, QATLinear, quantize_
from intlass_ops.integrations.load_pretrained import load_pretrained
from intlass_ops.integrations.schemes import SCHEMES, scheme_named
from intlass_ops.integrations.transformers_quantizer import IntlassConfig, save_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("scheme", "method"), [*((s, "rtn") for s in SCHEMES), ("w4a16", "mse"), ("w4a16", "hqq")]
)
def test_quantised_while_loading_is_as_quantised_after(
    dense: Path, tmp_path: Path, scheme: str, method: str
) -> None:
    config = IntlassConfig(scheme, group_size=16, method=method)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    expected = tiny_llama()
    chosen = set(linears(expected))
    quantize_(expected, config.to_scheme(), lambda _, path: path in chosen, progress=False)
    logits = model(PROMPT).logits
    assert torch.equal(logits, expected(PROMPT).logits)
    assert sum(isinstance(m, IntLinear) for m in model.modules()) == len(chosen)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(PROMPT).logits, logits)


def test_model_quantised_in_place_is_saved_whole(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    quantize_(model, Int4WeightOnly(16, method="awq"), calibration=[PROMPT])
    assert isinstance(model.lm_head, IntLinear)
    assert model.lm_head.input_scale is not None
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    for name, buffer in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], buffer), name
        assert again.state_dict()[name].dtype == buffer.dtype, name


def test_head_quantised_apart_from_its_embedding_is_saved_and_not_tied_again(
    tmp_path: Path,
) -> None:
    model = tiny_llama(tied=True)
    embedding = model.model.embed_tokens.weight.clone()
    quantize_(model, Int4WeightOnly(16))
    logits = model(PROMPT).logits
    model.tie_weights()
    assert torch.equal(model(PROMPT).logits, logits)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert isinstance(again.lm_head, IntLinear)
    assert torch.equal(again.model.embed_tokens.weight, embedding)
    assert torch.equal(again(PROMPT).logits, logits)


def test_what_a_model_keeps_in_fp32_is_not_quantised_while_loading(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1}
    T5EncoderModel(T5Config(num_heads=4, **sizes)).save_pretrained(tmp_path)
    config = IntlassConfig("w4a16", group_size=32)
    model = T5EncoderModel.from_pretrained(tmp_path, quantization_config=config)
    dense = model.encoder.block[0].layer[1].DenseReluDense
    assert type(dense.wo) is nn.Linear
    assert isinstance(dense.wi, IntLinear)
    assert model(PROMPT % 32).last_hidden_state.isfinite().all()


def test_dequantize_gives_linears_back(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=IntlassConfig(group_size=16)
    )
    before = model(PROMPT).logits
    plain = model.dequantize()
    assert not any(isinstance(m, IntLinear) for m in plain.modules())
    torch.testing.assert_close(plain(PROMPT).logits, before, rtol=1e-4, atol=1e-4)


def test_conv1d_of_gpt2_is_a_linear_that_lies_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).eval()
    plain.save_pretrained(tmp_path / "plain")
    model = copy.deepcopy(plain)
    quantize_(model, Int4WeightOnly(16), lambda _, path: path != "lm_head")
    assert sum(isinstance(m, IntLinear) for m in model.modules()) == 4
    logits = model(PROMPT).logits
    assert (logits - plain(PROMPT).logits).norm() < 0.3 * logits.norm()
    save_pretrained(model, tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(PROMPT).logits, logits)
    loaded = GPT2LMHeadModel.from_pretrained(
        tmp_path / "plain", quantization_config=IntlassConfig(group_size=16)
    )
    assert torch.equal(loaded(PROMPT).logits, logits)
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(PROMPT).logits, logits, rtol=1e-4, atol=1e-4)


def test_conv1d_of_gpt2_is_trained() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=None)).eval()
    dense = model(PROMPT).logits
    quantize_(model, QATConfig("w8a8", rotation=16))
    assert sum(isinstance(m, QATLinear) for m in model.modules()) == 5
    loss = model(PROMPT, labels=PROMPT)
    assert (loss.logits - dense).norm() < 0.1 * dense.norm()
    loss.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mistakes_name_what_to_do(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"K=48 is not a multiple of group_size=32.*modules_to"):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=IntlassConfig(group_size=32)
        )
    with pytest.raises(ValueError, match=r"call intlass_ops\.quantize_"):
        IntlassConfig(method="gptq")
    with pytest.raises(ValueError, match="scheme 'w2a2' is not one of w4a16"):
        scheme_named("w2a2")
    with pytest.raises(ValueError, match="has no quantised layers"):
        save_pretrained(tiny_llama(), tmp_path)
    trained = tiny_llama()
    quantize_(trained, QATConfig("w4a4", rotation=16))
    with pytest.raises(ValueError, match=r"q_proj is a QATLinear, which has no file format"):
        save_pretrained(trained, tmp_path)
