"""quantize_ with a method: the better ones lose less, and data reaches the layers it should."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import intlass_ops as ia
from intlass_ops import calibrated


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False))


def inputs() -> Tensor:
    """Correlated, some channels large: what GPTQ is good at."""
    rng = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=rng) / 8
    return torch.randn(512, 64, generator=rng) @ (mix + torch.diag(torch.rand(64, generator=rng)))


def loss(method: str, with_data: bool = False, **options: object) -> float:
    layers, x = model(), inputs()
    expected = layers(x)
    data = [x[:256], (x[256:],)] if with_data or method == "gptq" else None
    ia.quantize_(layers, ia.Int4WeightOnly(32, method=method, **options), calibration=data)  # type: ignore[arg-type]
    assert all(isinstance(layers[i], ia.IntLinear) for i in (0, 2))
    return float((layers(x) - expected).square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_better_methods_lose_less(symmetric: bool) -> None:
    rtn, mse, gptq = (loss(m, symmetric=symmetric) for m in ("rtn", "mse", "gptq"))
    assert gptq < 0.8 * mse
    assert mse < rtn
    assert loss("mse", with_data=True, symmetric=symmetric) < 0.98 * mse


def test_awq_rounds_channels_of_large_inputs_more_finely() -> None:
    layers = model()[:1]
    x = inputs()
    x[:, ::16] *= 20
    expected = layers(x)

    def loss_of(method: calibrated.Method) -> float:
        quantised = copy.deepcopy(layers)
        data = [x] if method == "awq" else None
        ia.quantize_(quantised, ia.Int4WeightOnly(32, method=method), calibration=data)
        if method == "awq":
            scale = quantised[0].input_scale
            assert torch.equal(scale.log2(), scale.log2().round())
            assert scale[::16].max() < scale[1::16].min()
        return float((quantised(x) - expected).square().mean())

    assert loss_of("awq") < 0.5 * loss_of("rtn")


def test_hqq_keeps_floating_zeros() -> None:
    layers = model()
    ia.quantize_(layers, ia.Int4WeightOnly(32, method="hqq"))
    zeros = layers[0].zeros
    assert isinstance(zeros, Tensor)
    assert zeros.dtype == torch.float32
    assert loss("hqq") < 1.2 * loss("rtn")


def test_passes_are_bounded_and_see_the_layers_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "HESSIAN_BYTES", 4 * 96 * 96)
    layers, x, seen = model(), inputs(), []
    layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    ia.quantize_(layers, ia.Int4WeightOnly(32, method="gptq"), calibration=[{"input": x}])
    assert len(seen) == 2  # one pass for each layer, the second through a quantised first
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], nn.functional.gelu(layers[0](x)))


def test_autocast_is_for_the_model_alone() -> None:
    """Its products are rounded, those that choose the codes are not."""
    torch.manual_seed(0)
    first, data = nn.Sequential(nn.Linear(256, 16)), [torch.randn(512, 256)]
    second, config = copy.deepcopy(first), ia.Int4WeightOnly(32, method="gptq")
    ia.quantize_(first, config, calibration=data)
    with torch.autocast("cpu", torch.bfloat16):
        ia.quantize_(second, config, calibration=data)
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[0].scales, second[0].scales)


def test_what_fails_on_the_way_leaves_the_model_as_it_was() -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.inf

    layers = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), Overflow(), nn.Linear(64, 64)).train()
    layers[1].eval()
    before = list(layers)
    with pytest.raises(ValueError, match=r"^quantize_: 3: gptq: the Hessian holds an infinity"):
        ia.quantize_(layers, ia.Int4WeightOnly(32, method="gptq"), calibration=[inputs()])
    assert list(layers) == before
    assert [layer.training for layer in layers] == [True, False, True, True]


def test_modes_of_modules_survive_calibration() -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.Dropout()).train()
    layers[1].eval()
    ia.quantize_(layers, ia.Int4WeightOnly(32, method="gptq"), calibration=[inputs()])
    assert [layer.training for layer in layers] == [True, False]


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.Linear(64, 64)
    layers = nn.Sequential(shared, nn.ReLU(), shared)
    ia.quantize_(layers, ia.Int8WeightOnly(method="gptq"), calibration=[inputs()])
    assert layers[0] is layers[2]


def test_refusals() -> None:
    layers = nn.Sequential(nn.Linear(64, 8))
    for method in ("gptq", "awq"):
        with pytest.raises(ValueError, match=f"method='{method}' needs calibration data"):
            ia.quantize_(layers, ia.Int4WeightOnly(32, method=method))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantize_: method='hqq' takes no calibration data"):
        ia.quantize_(layers, ia.Int4WeightOnly(32, method="hqq"), calibration=[])
    with pytest.raises(ValueError, match="quantize_: method='best'; expected one of rtn, mse"):
        ia.quantize_(layers, ia.Int4WeightOnly(32, method="best"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set symmetric=False"):
        ia.quantize_(layers, ia.Int4WeightOnly(32, symmetric=True, method="hqq"))
    with pytest.raises(ValueError, match="0: no calibration batch reaches this layer"):
        ia.quantize_(layers, ia.Int4WeightOnly(32, method="gptq"), calibration=[])
    assert type(layers[0]) is nn.Linear
