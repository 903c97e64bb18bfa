"""Fp8Linear and Fp8ExpertLinear: what they compute, what they refuse, what weights survive.

Checkpoints of them are in test_formats_fp8.py, what refuses those in test_formats_fp8_refused.py.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from fp8_case import E4M3, Fp8Weight, all_codes, draw_fp8
from strategies import BF16, FLOATS, FP16, FP32
from tolerance import assert_close, assert_identical
from torch import Tensor, nn

import intlass_ops as ia
from intlass_ops import lowering
from intlass_ops.reference import round_once

EXPERTS, N, K = 3, 40, 96
ENDS = [2, 2, 5]
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_block = pytest.mark.parametrize("block", [(1, None), (1, 32), (16, 48)], ids=str)


def weight(block: tuple[int, int | None] = (16, 48), seed: int = 0) -> Fp8Weight:
    return draw_fp8(N, K, seed, block=block)


def layer_of(w: Fp8Weight | None = None, bias: Tensor | None = None) -> ia.Fp8Linear:
    w = w or weight()
    return ia.Fp8Linear(w.codes(), w.rows(), bias)


def experts() -> list[Fp8Weight]:
    """Of powers of two, so that sums are exact."""
    every = [weight(seed=seed) for seed in range(EXPERTS)]
    return [Fp8Weight(w.q, torch.full_like(w.s, 0.5**e), w.block) for e, w in enumerate(every)]


def expert_layer() -> ia.Fp8ExpertLinear:
    codes, scales = [w.codes() for w in experts()], [w.rows() for w in experts()]
    return ia.Fp8ExpertLinear(torch.stack(codes), torch.stack(scales))


def some_bias() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(2))


def tokens(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(device)


def integers(dtype: torch.dtype = FP32, device: str = "cpu") -> Tensor:
    """Six tokens of small integers: float32 has sums with `expert_layer` exactly."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(-4, 5, (6, K), generator=rng).to(dtype).to(device)


def ends_on(device: str = "cpu") -> Tensor:
    return torch.tensor(ENDS, device=device)


# ------------------------------------------------------------------------------- what it computes


def test_layers_name_themselves() -> None:
    assert repr(layer_of(bias=some_bias())) == (
        "Fp8Linear(in_features=96, out_features=40, scheme=fp8a16, group_size=48, bias=True)"
    )
    assert repr(expert_layer()) == (
        "Fp8ExpertLinear(experts=3, in_features=96, out_features=40, scheme=fp8a16, group_size=48)"
    )


@each_dtype
@each_block
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_the_documented_product(
    block: Any, dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    w = weight(block)
    bias = some_bias().to(dtype) if with_bias else None
    x = tokens(dtype)
    y = layer_of(w, bias).to(device)(x.to(device)).cpu()
    assert y.dtype == dtype
    exact, size = x.double() @ w.exact().T, x.double().abs() @ w.exact().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert_close(y, exact, size)


@pytest.mark.parametrize("scale", FLOATS, ids=str)
def test_every_code(scale: torch.dtype, device: str) -> None:
    """Each column has all of them, subnormal ones and both zeros too."""
    q = all_codes()[:, None].expand(-1, 16)
    w = Fp8Weight(q, torch.linspace(0.01, 3, len(q))[:, None].to(scale), (1, 16))
    layer = layer_of(w).to(device)
    assert_identical(layer.dequantize().cpu(), w.dense())
    assert_identical(layer.dequantize(BF16).cpu(), round_once(w.exact(), BF16))
    assert_identical(layer(torch.eye(16, device=device)).cpu(), w.dense().T)


def test_dequantize_is_the_weight_in_blocks_of_rows(device: str) -> None:
    w = draw_fp8(2100, 32, 3, block=(128, 16))
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
    assert (dispatch.op, dispatch.scheme) == ("matmul_fp8_bf16_tn", "fp8a16")


@each_dtype
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_order", [True, False])
def test_experts_have_the_documented_product(
    dtype: torch.dtype, with_bias: bool, in_order: bool, device: str
) -> None:
    x = integers(dtype)
    bias = torch.arange(-60, 60).view(EXPERTS, N).to(dtype) if with_bias else None
    rows = None if in_order else torch.tensor([5, 0, 0, 3, 1, 2])
    y = expert_layer().to(device)(
        x.to(device),
        ends_on(device),
        None if bias is None else bias.to(device),
        None if rows is None else rows.to(device),
    )
    expected, taken = torch.zeros(6, N).double(), x if rows is None else x[rows]
    for e, (start, end) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        expected[start:end] = taken[start:end].double() @ experts()[e].exact().T
        if bias is not None:
            expected[start:end] += bias[e].double()
    assert_identical(y.cpu(), round_once(expected, dtype))


def test_experts_dequantize(device: str) -> None:
    dense = torch.stack([w.dense() for w in experts()])
    assert_identical(expert_layer().to(device).dequantize().cpu(), dense)


@pytest.mark.parametrize("backend", ["eager", lowering.backend, "inductor"])
def test_compiled_experts_compute_the_same(backend: str, device: str) -> None:
    layer, x = expert_layer().to(device), integers(BF16, device)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        assert_identical(compiled(x, ends_on(device)), layer(x, ends_on(device)))


# -------------------------------------------------------------------------------- what it refuses


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=E4M3)


NAN = codes(4, 32).view(torch.uint8).fill_(0xFF).view(E4M3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(4, 32), torch.zeros(4, 1)), TypeError, r"weight is torch\.float32 \(4, 32\)"),
        (
            (codes(4, 32).to(torch.float8_e5m2), torch.zeros(4, 1)),
            TypeError,
            r"weight is torch\.float8_e5m2 \(4, 32\); expected float8_e4m3fn \[N, K\]",
        ),
        ((codes(3, 4, 32), torch.zeros(3, 4, 1)), TypeError, "weight is torch.float8_e4m3fn"),
        ((codes(4, 32), None), TypeError, "scales is a NoneType"),
        ((codes(4, 32), codes(4, 1)), TypeError, r"scales are torch\.float8_e4m3fn; expected fp32"),
        ((codes(4, 32), torch.ones(4, 1).double()), TypeError, r"scales are torch\.float64"),
        (
            (codes(4, 32), torch.ones(3, 1)),
            ValueError,
            r"scales has shape \(3, 1\); expected \[N, K/group_size\] with N=4, K=32",
        ),
        ((codes(4, 32), torch.ones(4)), ValueError, r"scales has shape \(4,\)"),
        ((codes(4, 32), torch.ones(())), ValueError, r"scales has shape \(\)"),
        ((codes(4, 32), torch.ones(4, 0)), ValueError, r"scales has shape \(4, 0\)"),
        ((codes(4, 32), torch.ones(4, 3)), ValueError, "3 scales a row of K=32"),
        ((codes(4, 32), torch.ones(4, 4)), ValueError, "4 scales a row of K=32; .* 16 columns"),
        ((NAN, torch.ones(4, 1)), ValueError, "weight holds a NaN"),
        ((codes(4, 32), torch.ones(4, 1), torch.ones(5)), ValueError, r"\(5,\); expected floating"),
        ((codes(4, 32), torch.ones(4, 1), torch.ones(4).int()), ValueError, "bias is torch.int32"),
    ],
)
def test_tensors_that_do_not_fit(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Fp8Linear: .*{message}"):
        ia.Fp8Linear(*args)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((codes(4, 32), torch.ones(4, 1)), TypeError, r"float8_e4m3fn \[experts, N, K\]"),
        ((codes(3, 4, 32), torch.ones(4, 1)), ValueError, "with experts=3, N=4, K=32"),
        ((codes(3, 4, 32), torch.ones(2, 4, 1)), ValueError, r"scales has shape \(2, 4, 1\)"),
        ((codes(3, 4, 32), torch.ones(3, 4, 4)), ValueError, "4 scales a row of K=32"),
        ((NAN[None], torch.ones(1, 4, 1)), ValueError, "weight holds a NaN"),
    ],
)
def test_experts_that_do_not_fit(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Fp8ExpertLinear: .*{message}"):
        ia.Fp8ExpertLinear(*args)


def test_inputs_that_do_not_fit() -> None:
    for layer, more in ((layer_of(), ()), (expert_layer(), (ends_on(),))):
        with pytest.raises(TypeError, match=r"^Fp8.*Linear: x is torch\.int8; .* leave this layer"):
            layer(torch.zeros(6, K, dtype=torch.int8), *more)
        with pytest.raises(TypeError, match=r"a has dtype float64"):
            layer(torch.zeros(6, K, dtype=torch.float64), *more)
        with pytest.raises(ValueError, match=r"K=48|a has 48 columns"):
            layer(torch.zeros(6, 48), *more)


# -------------------------------------------------------------------------- what weights survive


def test_state_dict_holds_the_layer() -> None:
    layer, other = layer_of(bias=some_bias()), layer_of(weight(seed=9), torch.zeros(N))
    assert set(layer.state_dict()) == {"weight", "scales", "bias"}
    assert not list(layer.parameters())
    other.load_state_dict(layer.state_dict())
    assert_identical(other(tokens(FP32)), layer(tokens(FP32)))
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32, the Fp8Linear holds codes"):
        other.load_state_dict({**layer.state_dict(), "weight": layer.dequantize()})
    assert set(expert_layer().state_dict()) == {"weight", "scales"}


def saved_and_loaded(layer: nn.Module) -> Any:
    """By torch.save: plain pickle does not take PyTorch's FP8 tensors."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, saved_and_loaded])
def test_copies_compute_the_same(how: Any) -> None:
    layer = layer_of(bias=some_bias())
    twin = how(layer)
    assert repr(twin) == repr(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert_identical(twin(tokens(BF16)), layer(tokens(BF16)))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "type"])
@pytest.mark.parametrize("made", [lambda: layer_of(bias=some_bias()), expert_layer])
def test_casting_keeps_all_but_the_bias(cast: str, made: Any) -> None:
    layer = made()
    before = {key: t.clone() for key, t in layer.state_dict().items() if key != "bias"}
    getattr(layer, cast)(*([FP16] if cast == "type" else []))
    for key, tensor in before.items():
        after = layer.state_dict()[key]
        assert after.dtype == tensor.dtype
        assert_identical(after.float(), tensor.float())
    if "bias" in layer.state_dict():
        assert layer.bias.dtype == {"bfloat16": BF16, "double": torch.float64}.get(cast, FP16)


def test_others_leave_the_layers_alone() -> None:
    model = nn.ModuleList([layer_of(), expert_layer(), nn.Linear(N, N)])
    assert ia.prepare_(model) == []
    ia.quantize_(model, ia.Int8WeightOnly())
    assert [type(each) for each in model] == [ia.Fp8Linear, ia.Fp8ExpertLinear, ia.IntLinear]
