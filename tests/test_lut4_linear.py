"""Lut4Linear: what it computes, what it refuses, what its weight survives.

Checkpoints of it are in test_formats_bitsandbytes_4bit.py, what refuses those in
test_formats_bitsandbytes_4bit_refused.py, bitsandbytes' own modules in
test_bitsandbytes_modules.py, the op in test_lut4.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import oracle
import pytest
import torch
from nf4_case import Nf4Weight, draw_nf4
from strategies import BF16, FLOATS, FP16, FP32
from tolerance import assert_close, assert_identical
from torch import Tensor, nn

import intlass_ops as ia
from intlass_ops import lowering
from intlass_ops.reference import round_once

N, K = 40, 128
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def weight(group: int = 64, seed: int = 0) -> Nf4Weight:
    return draw_nf4(N, K, seed, group=group)


def layer_of(w: Nf4Weight | None = None, bias: Tensor | None = None) -> ia.Lut4Linear:
    w = w or weight()
    return ia.Lut4Linear(w.packed(), w.s, bias)


def some_bias() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(2))


def tokens(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(device)


def rounded(w: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """float64 of the weight that activations in ``dtype`` meet."""
    group = K // w.s.shape[1]
    return oracle.numbers("nf4", w.q, dtype) * w.s.double().repeat_interleave(group, 1)


# ------------------------------------------------------------------------------- what it computes


def test_the_layer_names_itself() -> None:
    assert repr(layer_of(bias=some_bias())) == (
        "Lut4Linear(in_features=128, out_features=40, scheme=nf4a16, group_size=64, bias=True)"
    )


@each_dtype
@pytest.mark.parametrize("group", [16, 64, K])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_the_documented_product(
    group: int, dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    w = weight(group)
    bias = some_bias().to(dtype) if with_bias else None
    x, dense = tokens(dtype), rounded(w, dtype)
    y = layer_of(w, bias).to(device)(x.to(device)).cpu()
    assert y.dtype == dtype
    exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert_close(y, exact, size)


@pytest.mark.parametrize("scale", FLOATS, ids=str)
def test_every_code(scale: torch.dtype, device: str) -> None:
    q = torch.arange(16)[:, None].expand(-1, 16)
    s = torch.linspace(0.01, 3, 16)[:, None].to(scale)
    w = Nf4Weight(q, s.float())
    layer = ia.Lut4Linear(w.packed(), s).to(device)
    assert_identical(layer.dequantize().cpu(), w.dense())
    assert_identical(layer.dequantize(BF16).cpu(), round_once(w.exact(), BF16))
    assert_identical(layer(torch.eye(16, device=device)).cpu(), w.dense().T)


def test_the_even_column_is_in_the_low_nibble(device: str) -> None:
    layer = ia.Lut4Linear(torch.tensor([[0xF0]], dtype=torch.uint8), torch.ones(1, 1)).to(device)
    assert layer.dequantize().tolist() == [[-1.0, 1.0]]


def test_dequantize_is_the_weight_in_blocks_of_rows(device: str) -> None:
    w = draw_nf4(2100, 32, 3, group=16)
    layer = layer_of(w).to(device)
    assert_identical(layer.dequantize().cpu(), w.dense())
    assert layer.dequantize(FP16).dtype == FP16


@each_dtype
def test_gradient_of_the_input(dtype: torch.dtype, device: str) -> None:
    w = weight()
    layer, x = layer_of(w, some_bias()).to(device), tokens(dtype, device).requires_grad_()
    grad = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer(x).backward(grad.to(device))
    assert x.grad is not None
    exact, size = grad.double() @ w.exact(), grad.double().abs() @ w.exact().abs()
    assert x.grad.dtype == dtype
    error = (x.grad.cpu().double() - exact).abs()
    assert bool((error <= 8 * torch.finfo(dtype).eps * size).all())


def test_autocast_decides_the_dtype(device: str) -> None:
    layer, x = layer_of(bias=some_bias()).to(device), tokens(FP32, device)
    with torch.autocast(device, dtype=BF16):
        y = layer(x)
    assert_identical(y, layer(x.bfloat16()))


@pytest.mark.parametrize("backend", [lowering.backend, "inductor"])
@each_dtype
def test_compiled_layers_compute_the_same(dtype: torch.dtype, backend: str, device: str) -> None:
    model = nn.Sequential(layer_of(bias=some_bias().to(dtype)), nn.ReLU()).to(device)
    x = tokens(dtype, device)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
        assert_close(y.cpu(), model(x).cpu().double(), y.cpu().double().abs())


def test_explain_has_the_products() -> None:
    (dispatch,) = ia.explain(nn.Sequential(layer_of()), tokens(BF16)).dispatches
    assert (dispatch.op, dispatch.scheme) == ("matmul_nf4_bf16_tn", "nf4a16")


# -------------------------------------------------------------------------------- what it refuses


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(4, 32), torch.zeros(4, 1)), TypeError, r"weight is torch\.float32 \(4, 32\)"),
        (
            (codes(4, 32).to(torch.int8), torch.zeros(4, 1)),
            TypeError,
            r"weight is torch\.int8 \(4, 32\); expected uint8 \[N, K/2\]",
        ),
        ((codes(3, 4, 32), torch.zeros(3, 4, 1)), TypeError, r"weight is torch\.uint8 \(3, 4, 32"),
        ((codes(4, 32), None), TypeError, "scales is a NoneType"),
        ((codes(4, 32), codes(4, 1)), TypeError, r"scales are torch\.uint8; expected fp32"),
        ((codes(4, 32), torch.ones(4, 1).double()), TypeError, r"scales are torch\.float64"),
        (
            (codes(4, 32), torch.ones(3, 1)),
            ValueError,
            r"scales has shape \(3, 1\); expected \[N, K/group_size\] with N=4, K=64",
        ),
        ((codes(4, 32), torch.ones(4)), ValueError, r"scales has shape \(4,\)"),
        ((codes(4, 32), torch.ones(())), ValueError, r"scales has shape \(\)"),
        ((codes(4, 32), torch.ones(4, 0)), ValueError, r"scales has shape \(4, 0\)"),
        ((codes(4, 32), torch.ones(4, 3)), ValueError, "3 scales a row of K=64"),
        ((codes(4, 32), torch.ones(4, 8)), ValueError, "8 scales a row of K=64; .* 16 columns"),
        ((codes(4, 32), torch.ones(4, 1), torch.ones(5)), ValueError, r"\(5,\); expected floating"),
        ((codes(4, 32), torch.ones(4, 1), torch.ones(4).int()), ValueError, "bias is torch.int32"),
    ],
)
def test_tensors_that_do_not_fit(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Lut4Linear: .*{message}"):
        ia.Lut4Linear(*args)


def test_inputs_that_do_not_fit() -> None:
    layer = layer_of()
    with pytest.raises(TypeError, match=r"^Lut4Linear: x is torch\.int8; .* leave this layer"):
        layer(torch.zeros(6, K, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"a has dtype float64"):
        layer(torch.zeros(6, K, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a has 48 columns"):
        layer(torch.zeros(6, 48))


# -------------------------------------------------------------------------- what weights survive


def test_state_dict_holds_the_layer() -> None:
    layer, other = layer_of(bias=some_bias()), layer_of(weight(seed=9), torch.zeros(N))
    assert set(layer.state_dict()) == {"weight", "scales", "bias"}
    assert not list(layer.parameters())
    other.load_state_dict(layer.state_dict())
    assert_identical(other(tokens(FP32)), layer(tokens(FP32)))
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32, the Lut4Linear holds codes"):
        other.load_state_dict({**layer.state_dict(), "weight": layer.dequantize()})


def saved_and_loaded(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, saved_and_loaded, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_compute_the_same(how: Any) -> None:
    layer = layer_of(bias=some_bias())
    twin = how(layer)
    assert repr(twin) == repr(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert_identical(twin(tokens(BF16)), layer(tokens(BF16)))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "type"])
def test_casting_keeps_all_but_the_bias(cast: str) -> None:
    layer = layer_of(bias=some_bias())
    before = {key: t.clone() for key, t in layer.state_dict().items() if key != "bias"}
    getattr(layer, cast)(*([FP16] if cast == "type" else []))
    for key, tensor in before.items():
        assert_identical(layer.state_dict()[key], tensor)
    assert layer.bias is not None
    assert layer.bias.dtype == {"bfloat16": BF16, "double": torch.float64}.get(cast, FP16)


def test_others_leave_the_layer_alone() -> None:
    model = nn.ModuleList([layer_of(), nn.Linear(N, N)])
    assert ia.prepare_(model) == []
    ia.quantize_(model, ia.Int8WeightOnly())
    assert [type(each) for each in model] == [ia.Lut4Linear, ia.IntLinear]


def test_peft_trains_around_it() -> None:
    peft = pytest.importorskip("peft")
    from intlass_ops.integrations.peft_lora import LoraIntLinear, lora_config

    torch.manual_seed(0)
    below, above = draw_nf4(64, 64, 0), draw_nf4(64, 64, 1)
    base = nn.Sequential(layer_of(below), nn.Tanh(), layer_of(above), nn.LayerNorm(64))
    model = peft.get_peft_model(base, lora_config(r=4, target_modules=["0", "2"]))
    layers = [each for each in model.modules() if isinstance(each, LoraIntLinear)]
    assert [type(each.base_layer) for each in layers] == [ia.Lut4Linear] * 2
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    x, target = torch.randn(16, 64), torch.randn(16, 64) / 4
    optimizer = torch.optim.Adam(adapters.values(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The first adapter learns through the second base.
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in adapters.values())
    assert losses[-1] < 0.7 * losses[0]
    assert_identical(base[0].base_layer.weight, below.packed())
    with pytest.raises(NotImplementedError, match="the base is quantised"):
        model.merge_adapter()
