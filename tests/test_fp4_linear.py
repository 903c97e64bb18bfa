"""Fp4Linear: what it computes, what it refuses, and what its weights survive."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from fp4_case import Fp4Weight, draw_fp4
from strategies import BF16, FLOATS, FP16, FP32
from tolerance import assert_close, assert_identical
from torch import Tensor, nn

import intlass_ops as ia
from intlass_ops import lowering
from intlass_ops.reference import round_once

N, K = 40, 96
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
each_kind = pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def weight(kind: str) -> Fp4Weight:
    if kind == "mxfp4":
        return draw_fp4(N, K, 0, group=32)
    return draw_fp4(N, K, 0, group=16, global_scale=0.3)


def layer_of(w: Fp4Weight, bias: Tensor | None = None) -> ia.Fp4Linear:
    one = None if w.is_mx else torch.tensor(w.global_scale)
    return ia.Fp4Linear(w.packed(), w.s, one, bias)


def some_bias() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(2))


def tokens(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(device)


# ------------------------------------------------------------------------------- what it computes


def test_layers_name_themselves() -> None:
    assert repr(layer_of(weight("nvfp4"), some_bias())) == (
        "Fp4Linear(in_features=96, out_features=40, scheme=w4a16, format=nvfp4, group_size=16, "
        "global_scale=True, bias=True)"
    )
    assert "format=mxfp4, group_size=32, global_scale=False" in repr(layer_of(weight("mxfp4")))


@each_dtype
@each_kind
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_the_documented_product(
    kind: str, dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    w = weight(kind)
    bias = some_bias().to(dtype) if with_bias else None
    layer = layer_of(w, bias).to(device)
    x = tokens(dtype)
    y = layer(x.to(device)).cpu()
    assert y.dtype == dtype
    exact, size = x.double() @ w.exact().T, x.double().abs() @ w.exact().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert_close(y, exact, size)


@each_kind
def test_every_code_under_every_scale(kind: str, device: str) -> None:
    """One row a scale, subnormal ones and both signs of e4m3 too; what a NaN does is the op's."""
    bits = torch.arange(255 if kind == "mxfp4" else 256)
    bits = bits if kind == "mxfp4" else bits[bits % 128 != 127]
    group = 32 if kind == "mxfp4" else 16
    q = torch.arange(16).repeat(len(bits), group // 16)
    w = Fp4Weight(q, bits[:, None].to(torch.uint8))
    layer = layer_of(w).to(device)
    assert_identical(layer.dequantize().cpu(), w.dense())
    assert_identical(layer.dequantize(BF16).cpu(), round_once(w.exact(), BF16))
    one_of_each = torch.eye(group, dtype=FP32, device=device)
    if device == "cpu" or kind == "nvfp4":  # a GPU's float32 product flushes what is subnormal
        assert_identical(layer(one_of_each).cpu(), w.dense().T)


@each_kind
def test_dequantize_is_the_weight_in_blocks_of_rows(kind: str, device: str) -> None:
    w = draw_fp4(2100, 32, 3, group=32 if kind == "mxfp4" else 16, global_scale=0.7)
    layer = ia.Fp4Linear(w.packed(), w.s, torch.tensor(w.global_scale)).to(device)
    assert_identical(layer.dequantize().cpu(), w.dense())
    assert layer.dequantize(FP16).dtype == FP16


@each_kind
def test_scales_in_the_types_of_torch_are_their_bytes(kind: str) -> None:
    w = weight(kind)
    typed = ia.Fp4Linear(w.packed(), w.s.view(E8M0 if kind == "mxfp4" else E4M3))
    assert_identical(typed.scales, w.s)
    assert typed.kind == kind


@each_dtype
@each_kind
def test_gradient_of_the_input(kind: str, dtype: torch.dtype, device: str) -> None:
    w = weight(kind)
    layer = layer_of(w, some_bias()).to(device)
    x = tokens(dtype, device).requires_grad_()
    grad = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer(x).backward(grad.to(device))
    assert x.grad is not None
    exact = grad.double() @ w.exact()
    size = grad.double().abs() @ w.exact().abs()
    assert x.grad.dtype == dtype
    error = (x.grad.cpu().double() - exact).abs()
    assert bool((error <= 8 * torch.finfo(dtype).eps * size).all())


def test_autocast_decides_the_dtype(device: str) -> None:
    layer = layer_of(weight("nvfp4"), some_bias()).to(device)
    x = tokens(FP32, device)
    with torch.autocast(device, dtype=BF16):
        y = layer(x)
    assert_identical(y, layer(x.bfloat16()))


@pytest.mark.parametrize("backend", [lowering.backend, "inductor"])
@each_dtype
@each_kind
def test_compiled_layers_compute_the_same(
    kind: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    model = nn.Sequential(layer_of(weight(kind), some_bias().to(dtype)), nn.ReLU()).to(device)
    x = tokens(dtype, device)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
        assert_close(y.cpu(), model(x).cpu().double(), y.cpu().double().abs())


def test_compiled_layers_pass_gradients_on() -> None:
    layer = layer_of(weight("nvfp4"), some_bias())
    x, z = tokens(FP32).requires_grad_(), tokens(FP32).requires_grad_()
    torch.compiler.reset()
    torch.compile(layer, backend=lowering.backend, fullgraph=True)(x).square().sum().backward()
    layer(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_explain_has_the_products() -> None:
    explanation = ia.explain(nn.Sequential(layer_of(weight("nvfp4"))), tokens(BF16))
    (dispatch,) = explanation.dispatches
    assert "nvf4" in dispatch.op
    assert dispatch.scheme == "w4a16"


@pytest.mark.gpu
@each_kind
def test_half_precision_has_kernels_on_a_gpu_and_float32_has_none(kind: str) -> None:
    layer = layer_of(weight(kind), some_bias()).cuda()
    for dtype in (BF16, FP16):
        assert not ia.explain(layer, tokens(dtype, "cuda")).fallbacks
    (fallback,) = ia.explain(layer, tokens(FP32, "cuda")).fallbacks
    assert "float32 activations" in str(fallback)


# -------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(4, 16), torch.zeros(4, 1)), TypeError, r"weight is torch\.float32 \(4, 16\)"),
        (
            (torch.zeros(16, dtype=torch.uint8), torch.zeros(1)),
            TypeError,
            r"weight is torch\.uint8 \(16,\); expected uint8 \[N, K/2\]",
        ),
        ((torch.zeros(4, 16, dtype=torch.uint8), None), TypeError, "scales is a NoneType"),
        (
            (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)),
            ValueError,
            r"scales has shape \(3, 1\); expected \[N, K/32\] .* N=4, K=32",
        ),
        (
            (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)),
            ValueError,
            "4 scales a row of K=32",
        ),
        (
            (torch.zeros(4, 0, dtype=torch.uint8), torch.zeros(4, 0, dtype=torch.uint8)),
            ValueError,
            "0 scales a row of K=0",
        ),
        (
            (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2)),
            TypeError,
            r"scales are torch\.float32, one for 16 codes; expected torch\.float8_e4m3fn",
        ),
        (
            (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1).to(E4M3)),
            TypeError,
            r"scales are torch\.float8_e4m3fn, one for 32 codes; expected torch\.float8_e8m0fnu",
        ),
    ],
)
def test_tensors_that_do_not_fit(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Fp4Linear: .*{message}"):
        ia.Fp4Linear(*args)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("global_scale", torch.ones(2), r"global_scale is torch\.float32 \(2,\); expected float32"),
        ("global_scale", torch.ones(()).half(), r"global_scale is torch\.float16"),
        ("bias", torch.ones(N + 1), rf"bias is torch\.float32 \({N + 1},\); expected"),
        ("bias", torch.ones(N).int(), r"bias is torch\.int32"),
    ],
)
def test_parameters_that_do_not_fit(name: str, value: Tensor, message: str) -> None:
    w = weight("nvfp4")
    with pytest.raises(ValueError, match=f"^Fp4Linear: {message}"):
        ia.Fp4Linear(w.packed(), w.s, **{name: value})


def test_inputs_that_do_not_fit() -> None:
    layer = layer_of(weight("nvfp4"))
    with pytest.raises(TypeError, match=r"^Fp4Linear: x is torch\.uint8; .* leave this layer out"):
        layer(torch.zeros(2, K, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"nvf4_bf16_tn: a has dtype float64"):
        layer(torch.zeros(2, K, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"^Fp4Linear: x is \(2, 48\), the layer has K={K}"):
        layer(torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"^Fp4Linear: x is \(\), the layer"):
        layer(torch.zeros(()))


# -------------------------------------------------------------------------- what weights survive


@each_kind
def test_state_dict_holds_the_layer(kind: str) -> None:
    layer, other = layer_of(weight(kind), some_bias()), layer_of(weight(kind), some_bias())
    names = {"weight", "scales", "bias"} | ({"global_scale"} if kind == "nvfp4" else set())
    assert set(layer.state_dict()) == names
    assert not list(layer.parameters())
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    assert_identical(other(tokens(FP32)), layer(tokens(FP32)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", torch.ones(N, K)), ("scales", weight("nvfp4").s.view(E4M3))],
    ids=["weight", "scales"],
)
def test_what_is_not_codes_is_not_loaded(name: str, value: Tensor) -> None:
    layer = layer_of(weight("nvfp4"))
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"{name} is {value.dtype}, .* holds codes of"):
        layer.load_state_dict({**before, name: value})
    for key, tensor in before.items():
        assert_identical(layer.state_dict()[key], tensor)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@each_kind
def test_copies_compute_the_same(kind: str, how: Any) -> None:
    layer = layer_of(weight(kind), some_bias())
    twin = how(layer)
    assert repr(twin) == repr(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert_identical(twin(tokens(BF16)), layer(tokens(BF16)))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "type"])
def test_casting_keeps_all_but_the_bias(cast: str) -> None:
    layer = layer_of(weight("nvfp4"), some_bias())
    before = {key: t.clone() for key, t in layer.state_dict().items() if key != "bias"}
    getattr(layer, cast)(*([FP16] if cast == "type" else []))
    for key, tensor in before.items():
        assert_identical(layer.state_dict()[key], tensor)
    assert layer.bias is not None
    assert layer.bias.dtype == {"bfloat16": BF16, "double": torch.float64}.get(cast, FP16)


def test_others_leave_the_layer_alone() -> None:
    model = nn.Sequential(layer_of(weight("nvfp4")), nn.Linear(N, N))
    assert ia.prepare_(model) == []
    ia.quantize_(model, ia.Int8WeightOnly())
    assert [type(each) for each in model] == [ia.Fp4Linear, ia.IntLinear]
