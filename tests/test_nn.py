"""IntLinear and quantize_: what a quantised model computes and refuses, and what is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from gemm_case import Case, build
from small_models import K, N, each_scheme, linears, quantized, tokens
from strategies import BF16, FLOATS, FP16, FP32, SCHEMES
from tolerance import assert_close, assert_identical
from torch import Tensor, nn

import intlass_ops as ia


def test_all_schemes_name_themselves() -> None:
    layer = quantized("w4a16")[0]
    assert repr(layer) == (
        "IntLinear(in_features=64, out_features=96, scheme=w4a16, group_size=32, zeros=True, "
        "bias=True)"
    )
    names = {scheme: repr(quantized(scheme)[0]).split("scheme=")[1][:5] for scheme in SCHEMES}
    assert all(scheme.startswith(name.rstrip(",")) for scheme, name in names.items())


# ------------------------------------------------------------------------------- what it computes


def expected_linear(layer: ia.IntLinear, x: Tensor) -> oracle.Expected:
    """The layer's documented arithmetic, from its buffers alone."""
    zeros, options = layer.zeros, {"bias": layer.bias, "k": layer.in_features}
    if layer.activation is None:
        return oracle.matmul(x, layer.weight, layer.scales, zeros, **options)
    a = oracle.quantize(x, 8 if layer.activation == "int8" else 4)
    codes = a.codes.to(torch.int8).to(x.device)
    options["a_scale"] = a.scale.to(x.device)
    return oracle.matmul(codes, layer.weight, layer.scales, zeros, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_scheme
def test_forward_is_the_documented_product(scheme: str, dtype: torch.dtype, device: str) -> None:
    layer = quantized(scheme, dtype, device)[0]
    x = tokens(dtype, device)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, *expected_linear(layer, x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_scheme
def test_weights_are_rounded_to_nearest(scheme: str, dtype: torch.dtype, device: str) -> None:
    """Every weight within half a step; the codes are those of the scales that are stored."""
    original = linears(dtype)[0].to(device)
    layer = quantized(scheme, dtype, device)[0]
    w = oracle.weight(layer.weight, layer.scales, layer.zeros, K)
    step = oracle.per_weight(layer.scales, N, K)
    error = (w - original.weight.double()).abs()
    # the last code of a group may be out of reach by what rounding the scale to `dtype` lost
    reach = 15 if layer.bits == 4 else 127
    assert (error <= step * (0.5 + reach * torch.finfo(layer.scales.dtype).eps)).all()
    assert_identical(layer.bias, original.bias.detach())


@each_scheme
def test_quantised_models_stay_near_the_original(scheme: str, device: str) -> None:
    """Signal to noise of the whole model, in dB: what 8 or 4 bits must reach for normal weights."""
    x = tokens(device=device)
    exact = linears().to(device)(x)
    noise = quantized(scheme, device=device)(x) - exact
    ratio = 20 * torch.log10(exact.norm() / noise.norm())
    bits = 4 if "4" in scheme else 8
    assert ratio > {4: 13, 8: 35}[bits]


def test_scale_dtypes() -> None:
    """INT4 scales take the weight's dtype, INT8 ones are fp32."""
    for dtype in FLOATS:
        assert quantized("w4a16", dtype)[0].scales.dtype == dtype
        assert quantized("w8a8", dtype)[0].scales.dtype == FP32


def test_scales_that_the_weight_dtype_cannot_hold_stay_fp32() -> None:
    layers = nn.Sequential(nn.Linear(32, 4)).to(FP16)
    layers[0].weight.data.fill_(2.0**-24)  # / 7 is below the smallest fp16
    ia.quantize_(layers, ia.Int4WeightOnly(32, symmetric=True))
    assert layers[0].scales.dtype == FP32
    w = oracle.weight(layers[0].weight, layers[0].scales, None, 32)
    assert ((w / 2.0**-24 - 1).abs() < 1e-6).all()


def test_non_finite_weights_do_not_pass_for_numbers() -> None:
    for scheme in SCHEMES:
        layers = linears()
        layers[0].weight.data[5, 7] = torch.nan
        ia.quantize_(layers, SCHEMES[scheme], lambda _, name: name == "0")
        y = layers[0](tokens())
        assert y[..., 5].isnan().all()
        assert y[..., :5].isfinite().all()


# ------------------------------------------------------------------------------ what it replaces


def test_filter_fn_picks_by_module_and_name() -> None:
    seen: list[str] = []

    def pick(module: nn.Module, name: str) -> bool:
        assert type(module) is nn.Linear
        seen.append(name)
        return name == "inner.2"

    model = nn.ModuleDict({"inner": linears(), "head": nn.Linear(N, 8)})
    ia.quantize_(model, ia.Int8WeightOnly(), pick)
    assert sorted(seen) == ["head", "inner.0", "inner.2", "inner.3"]
    replaced = [name for name, m in model.named_modules() if isinstance(m, ia.IntLinear)]
    assert replaced == ["inner.2"]


class Tied(nn.Module):
    """One Linear under two names of one parent and in another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(K, K)
        self.inner = nn.Sequential(self.first, nn.Linear(K, K))


@each_scheme
def test_shared_linears_stay_shared(scheme: str) -> None:
    model = Tied()
    ia.quantize_(model, SCHEMES[scheme])
    assert isinstance(model.first, ia.IntLinear)
    assert model.second is model.first
    assert model.inner[0] is model.first
    assert isinstance(model.inner[1], ia.IntLinear)
    assert model.inner[1] is not model.first


def test_subclasses_of_linear_are_left_alone() -> None:
    """MultiheadAttention reads its projection's weight itself."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(K, 4), "out": nn.Linear(K, K)})
    ia.quantize_(model, ia.Int8WeightOnly())
    assert isinstance(model["attention"].out_proj, nn.Linear)
    assert isinstance(model["out"], ia.IntLinear)


@pytest.mark.parametrize("config", [ia.Int4WeightOnly(32, method="gptq"), ia.QATConfig()])
def test_layers_are_called_with_the_keyword_of_linear(config: Any) -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(input=x)
            return y

    model, x = Keyword(), torch.randn(8, 64)
    data = None if isinstance(config, ia.QATConfig) else [x]
    ia.quantize_(model, config, calibration=data)
    assert_identical(model(x), model.layer(x))
    ia.convert_(model)
    assert_identical(model(x), model.layer(x))


@pytest.mark.parametrize(
    "config", [ia.Int8WeightOnly(), ia.Int8WeightOnly(method="mse"), ia.QATConfig()]
)
@pytest.mark.parametrize("training", [False, True])
def test_new_layers_have_the_mode_of_those_they_replace(config: Any, training: bool) -> None:
    layers = nn.Sequential(nn.Linear(64, 32)).train(training)
    ia.quantize_(layers, config)
    assert layers[0].training is training
    ia.convert_(layers.train(not training))
    assert layers[0].training is not training


def test_a_quantised_model_is_left_as_it_is() -> None:
    layers = quantized("w8a16")
    before = list(layers)
    ia.quantize_(layers, ia.Int8WeightOnly())
    assert all(a is b for a, b in zip(before, layers, strict=True))


@each_scheme
def test_models_on_the_meta_device(scheme: str) -> None:
    """Quantise the skeleton, then load the state of a real one into it."""
    layers = quantized(scheme)
    with torch.device("meta"):
        skeleton = linears()
    ia.quantize_(skeleton, SCHEMES[scheme])
    assert all(p.is_meta for p in skeleton.state_dict().values())
    skeleton.to_empty(device="cpu")
    skeleton.load_state_dict(layers.state_dict())
    assert_identical(skeleton(tokens()), layers(tokens()))


# ---------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("in_features", "dtype", "config", "error", "message"),
    [
        (72, FP32, ia.Int4WeightOnly(32), ValueError, "K=72 .* group_size=32"),
        (64, torch.float64, ia.Int8WeightOnly(), TypeError, "float64"),
        (0, FP32, ia.Int8WeightOnly(), ValueError, "K=0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_that_does_not_fit_is_named_and_nothing_changes(
    in_features: int, dtype: torch.dtype, config: Any, error: type[Exception], message: str
) -> None:
    last = nn.Linear(in_features, 8, dtype=dtype)
    model = nn.ModuleDict({"good": nn.Linear(K, K), "block": nn.Sequential(nn.Linear(K, K), last)})
    with pytest.raises(error, match=rf"^quantize_: block\.1: .*{message}"):
        ia.quantize_(model, config)
    assert not any(isinstance(m, ia.IntLinear) for m in model.modules())
    ia.quantize_(model, config, lambda _, name: name != "block.1")
    assert isinstance(model["good"], ia.IntLinear)


@pytest.mark.parametrize("group_size", [8, 24, 0, -16])
def test_group_sizes_no_kernel_has_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"^Scheme: group_size={group_size} "):
        ia.Int4WeightOnly(group_size)


def test_a_bare_linear_cannot_be_replaced_in_place() -> None:
    with pytest.raises(TypeError, match=r"^quantize_: the model is a Linear itself"):
        ia.quantize_(nn.Linear(K, N), ia.Int8WeightOnly())


def _int8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((torch.zeros(4, 8), torch.ones(4)), {}, TypeError, "weight is torch.float32"),
        ((_int8(4), torch.ones(4)), {}, TypeError, r"weight is torch.int8 \(4,\)"),
        (
            (_int8(4, 16), torch.ones(4)),
            {"in_features": 15},
            ValueError,
            "weight has 16 columns; in_features=15 needs 15",
        ),
        (
            (_int8(4, 16).view(torch.uint8), torch.ones(4)),
            {"in_features": 30},
            ValueError,
            "weight has 16 columns; in_features=30 needs 15",
        ),
        ((_int8(4, 16), torch.ones(4)), {"activation": "fp8"}, ValueError, "activation='fp8'"),
        ((_int8(4, 16), torch.ones(4)), {"activation": "int4"}, ValueError, "needs an INT4 weight"),
        ((_int8(4, 16), torch.ones(4), torch.ones(4)), {}, ValueError, "zeros belong to INT4"),
    ],
)
def test_what_makes_no_layer_is_refused(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^IntLinear: .*{message}"):
        ia.IntLinear(*args, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3, 16, True, None), "bits=3; expected 4 or 8"),
        ((8, 16, False, None), "8-bit weights are symmetric"),
        ((8, None, True, "int4"), "activation='int4' with bits=8"),
    ],
)
def test_schemes_that_no_layer_has_are_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Scheme: {message}"):
        ia.Scheme(*args)


def test_a_configuration_that_was_not_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^quantize_: config is <function Int4WeightOnly"):
        ia.quantize_(torch.nn.Sequential(), ia.Int4WeightOnly)


@pytest.mark.parametrize("call", [ia.prepare_, lambda m: ia.quantize_(m, ia.Int4WeightOnly())])
@pytest.mark.parametrize("model", [None, torch.ones(3), {}])
def test_what_is_no_module_is_refused(call: Callable[[Any], Any], model: Any) -> None:
    name = "prepare_" if call is ia.prepare_ else "quantize_"
    with pytest.raises(TypeError, match=f"^{name}: model is a {type(model).__name__}; expected"):
        call(model)


def test_a_layer_without_its_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^IntLinear: scales is a NoneType; expected a tensor"):
        ia.IntLinear(torch.ones(4, 16, dtype=torch.int8), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Scheme: symmetric='yes'; expected True or False"):
        ia.Int4WeightOnly(symmetric="yes")  # type: ignore[arg-type]


def test_packed_activations_with_a_feature_too_few_are_refused() -> None:
    layer = quantized("w4a4")[0]
    with pytest.raises(ValueError, match=rf"^IntLinear: x is \(2, {K - 1}\), the layer has K={K}"):
        layer(torch.ones(2, K - 1))


def test_autocast_casts_the_input(device: str) -> None:
    layer = quantized("w4a16", device=device)[0]
    x = tokens(device=device)
    with torch.autocast(device, BF16):
        y = layer(x)
    assert_identical(y, layer(x.to(BF16)))


def test_odd_in_features(device: str) -> None:
    call = build(Case("fp32", "u4", k=33, bias=FP32), device)
    o = call.options
    layer = ia.IntLinear(call.w, call.scales, o["zeros"], o["bias"], in_features=33)
    assert_identical(layer(call.a), oracle.round_to(call.expected().y, FP32))


def test_no_gradient_through_dynamic_activations_goes_unnoticed(device: str) -> None:
    layers = quantized("w8a8", device=device)
    x = tokens(device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="matmul_int8_bf16_tn: a_scale requires a gradient"):
        layers(x).sum().backward()


def test_weight_only_layers_pass_gradients_on(device: str) -> None:
    layers = quantized("w4a16", device=device)
    x = tokens(device=device).requires_grad_()
    y = layers[0](x)
    y.sum().backward()
    w = oracle.weight(layers[0].weight, layers[0].scales, layers[0].zeros, K)
    ones = torch.ones(3, 5, N, dtype=torch.float64, device=device)
    assert_close(x.grad, ones @ w, ones @ w.abs())
