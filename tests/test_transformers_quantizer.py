"""IntlassConfig: quantise while loading, save, reload; save_pretrained after quantize_."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tiny_checkpoints import linears, tiny_llama
from transformers import AutoModelForCausalLM

from intlass_ops import Int4WeightOnly, IntLinear, quantize_
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
    quantize_(model, Int4WeightOnly(16))
    assert isinstance(model.lm_head, IntLinear)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    for name, buffer in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], buffer), name
        assert again.state_dict()[name].dtype == buffer.dtype, name


def test_dequantize_gives_linears_back(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=IntlassConfig(group_size=16)
    )
    before = model(PROMPT).logits
    plain = model.dequantize()
    assert not any(isinstance(m, IntLinear) for m in plain.modules())
    torch.testing.assert_close(plain(PROMPT).logits, before, rtol=1e-4, atol=1e-4)


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


def test_fused_experts_are_reported(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 fused expert weights stay .*experts"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=IntlassConfig(group_size=16)
        )
    assert isinstance(model.model.layers[0].self_attn.q_proj, IntLinear)
    assert isinstance(model.lm_head, nn.Linear)
    with pytest.warns(UserWarning, match=r"quantize_: 2 fused expert weights stay"):
        quantize_(MixtralForCausalLM(config), Int4WeightOnly(16))
