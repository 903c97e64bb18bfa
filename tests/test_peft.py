"""LoRA on quantised layers: peft's, where it is installed, and a hand-written adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from intlass_ops import Int4WeightOnly, IntLinear, quantize_


class Adapter(nn.Module):
    """The least a LoRA layer does."""

    def __init__(self, base: IntLinear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + (x @ self.a.t()) @ self.b.t()
        return y


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.LayerNorm(32))
    quantize_(model, Int4WeightOnly(16))
    return model


def train(model: nn.Module, steps: int = 30) -> list[float]:
    torch.manual_seed(1)
    x, target = torch.randn(16, 32), torch.randn(16, 32) / 4
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_hand_written_adapters_train_over_int4() -> None:
    model = small_model()
    codes = model[0].weight.clone()
    model[0], model[2] = Adapter(model[0]), Adapter(model[2])
    losses = train(model)
    # The first adapter learns through the second base.
    assert model[0].b.grad.abs().max() > 0
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model[0].base.weight, codes)


def test_peft_trains_switches_saves_and_does_not_merge(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from intlass_ops.integrations.peft_lora import lora_config

    model = peft.get_peft_model(small_model(), lora_config(r=4, target_modules=["0", "2"]))
    x = torch.randn(3, 32)
    before = model(x)
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    trained = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.add_adapter("other", lora_config(r=4, target_modules=["0", "2"]))
    model.set_adapter("other")
    assert torch.equal(model(x), before)
    model.set_adapter("default")
    assert torch.equal(model(x), trained)
    with pytest.raises(NotImplementedError, match="the base is quantised"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        small_model(), tmp_path, config=lora_config(r=4, target_modules=["0", "2"])
    )
    torch.testing.assert_close(again(x), trained)


def test_adapters_are_swapped_without_compiling_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.hotswap import hotswap_adapter

    from intlass_ops.integrations.peft_lora import lora_config

    config = {"r": 4, "target_modules": ["0", "2"]}
    x, expected = torch.randn(3, 32), []
    for seed in (1, 2):
        adapted = peft.get_peft_model(small_model(), lora_config(**config)).eval()
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / str(seed))
        expected.append(adapted(x))
    model = peft.PeftModel.from_pretrained(
        small_model(), tmp_path / "1", config=lora_config(**config)
    ).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="intlass")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected[0])
        hotswap_adapter(model, tmp_path / "2", adapter_name="default")
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x), expected[1])
