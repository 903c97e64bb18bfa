"""Folding rotations into a Llama leaves its function alone and takes its outliers away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from intlass_ops.integrations.rotate_llama import rotate_llama_  # noqa: E402


def llama(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 3)
            if name.endswith("bias"):
                parameter.normal_()
        model.model.embed_tokens.weight[:, 7] *= 40  # an outlier feature of the residual stream
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rotate_heads", [True, False])
def test_the_function_stays(tied: bool, rotate_heads: bool) -> None:
    model = llama(tied)
    ids = torch.randint(0, 64, (2, 11))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rotate_llama_(model, seed=3, rotate_heads=rotate_heads)
        after = model(input_ids=ids).logits
    # transformers' RMSNorm computes in float32
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    assert model.model.embed_tokens.weight is not model.lm_head.weight


def test_outliers_are_gone() -> None:
    model = llama(False)

    def peak() -> float:
        w = model.model.embed_tokens.weight.detach()
        return float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean())

    before = peak()
    rotate_llama_(model)
    assert before > 5
    assert peak() < 3.5


class OnePlusGain(nn.RMSNorm):
    """Gemma's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


@pytest.mark.parametrize(
    ("place", "module", "message"),
    [
        ("layers.1.mlp.up_proj", nn.Identity(), r"expected nn\.Linear, found Identity"),
        ("norm", OnePlusGain(48).double(), r"OnePlusGain is not x·gain / rms\(x\)"),
        ("layers.0.input_layernorm", nn.LayerNorm(48).double(), "LayerNorm is not"),
        ("layers.1.mlp", nn.Identity(), "has not the layers of a Llama: .* 'gate_proj'"),
    ],
)
def test_refuses_others_before_it_changes_any(place: str, module: nn.Module, message: str) -> None:
    model = llama(True)
    model.model.set_submodule(place, module)
    weight = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(TypeError, match=message):
        rotate_llama_(model)
    assert torch.equal(model.model.embed_tokens.weight, weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
