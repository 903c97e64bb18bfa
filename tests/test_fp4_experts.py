"""Fp4ExpertLinear: what it computes, what it refuses, and what its weights survive.

Checkpoints of them are in test_formats_fp4_experts.py, the product's kernels in test_grouped.py.
"""

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

EXPERTS, N, K = 3, 40, 96
ENDS = [2, 2, 5]
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
each_kind = pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def weights(kind: str, n: int = N, k: int = K) -> list[Fp4Weight]:
    """Of each expert; NVFP4 with global scales that are powers of two, so that sums are exact."""
    if kind == "mxfp4":
        return [draw_fp4(n, k, seed, group=32) for seed in range(EXPERTS)]
    return [draw_fp4(n, k, seed, group=16, global_scale=0.5**seed) for seed in range(EXPERTS)]


def tensors_of(every: list[Fp4Weight]) -> dict[str, Tensor]:
    tensors = {
        "weight": torch.stack([w.packed() for w in every]),
        "scales": torch.stack([w.s for w in every]),
    }
    if not every[0].is_mx:
        tensors["global_scale"] = torch.tensor([w.global_scale for w in every])
    return tensors


def layer_of(kind: str) -> ia.Fp4ExpertLinear:
    return ia.Fp4ExpertLinear(**tensors_of(weights(kind)))


def tokens(dtype: torch.dtype = FP32, device: str = "cpu") -> Tensor:
    """Six small integers a column: sums of a layer of `weights` have them exactly in float32."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(-4, 5, (6, K), generator=rng).to(dtype).to(device)


def ends_on(device: str = "cpu") -> Tensor:
    return torch.tensor(ENDS, device=device)


# ------------------------------------------------------------------------------- what it computes


def test_layers_name_themselves() -> None:
    assert repr(layer_of("nvfp4")) == (
        "Fp4ExpertLinear(experts=3, in_features=96, out_features=40, scheme=w4a16, format=nvfp4, "
        "group_size=16, global_scale=True)"
    )
    assert "format=mxfp4, group_size=32, global_scale=False)" in repr(layer_of("mxfp4"))


@each_dtype
@each_kind
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_is_the_documented_product(
    kind: str, dtype: torch.dtype, with_bias: bool, device: str
) -> None:
    every, x = weights(kind), tokens(dtype)
    bias = torch.arange(-60, 60).view(EXPERTS, N).to(dtype) if with_bias else None
    y = layer_of(kind).to(device)(
        x.to(device), ends_on(device), None if bias is None else bias.to(device)
    )
    expected = torch.zeros(6, N, dtype=torch.float64)
    for e, (start, end) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        expected[start:end] = x[start:end].double() @ every[e].exact().T
        if bias is not None:
            expected[start:end] += bias[e].double()
    assert_identical(y.cpu(), round_once(expected, dtype))


@each_dtype
@each_kind
def test_tokens_in_any_order(kind: str, dtype: torch.dtype, device: str) -> None:
    layer, x = layer_of(kind).to(device), tokens(dtype, device)
    rows = torch.tensor([3, 0, 0, 5, 2], device=device)
    assert_identical(layer(x, ends_on(device), rows=rows), layer(x[rows], ends_on(device)))


@each_dtype
@pytest.mark.parametrize("with_bias", [False, True])
def test_pieces_with_other_global_scales(dtype: torch.dtype, with_bias: bool, device: str) -> None:
    every, x = weights("nvfp4"), tokens(dtype)
    pieces = torch.tensor([[0.5, 2.0], [1.0, 4.0], [8.0, 0.25]])
    tensors = {**tensors_of(every), "global_scale": pieces}
    bias = torch.arange(-60, 60).view(EXPERTS, N).to(dtype) if with_bias else None
    layer = ia.Fp4ExpertLinear(**tensors).to(device)
    y = layer(x.to(device), ends_on(device), None if bias is None else bias.to(device)).cpu()
    rows = pieces.repeat_interleave(N // 2, 1).double()
    expected = torch.zeros(6, N, dtype=torch.float64)
    for e, (start, end) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        dense = every[e].exact() / every[e].global_scale * rows[e, :, None]
        assert_close(layer.dequantize()[e].cpu(), dense, dense.abs())
        expected[start:end] = x[start:end].double() @ dense.T
        if bias is not None:
            expected[start:end] += bias[e].double()
    assert_identical(y, round_once(expected, dtype))


@each_kind
def test_dequantize_is_the_weight_of_every_expert(kind: str, device: str) -> None:
    every = weights(kind, 700, 32)  # in blocks of rows, some of two experts
    if kind == "nvfp4":
        every = [Fp4Weight(w.q, w.s, torch.tensor(0.3 + e).item()) for e, w in enumerate(every)]
    layer = ia.Fp4ExpertLinear(**tensors_of(every)).to(device)
    assert_identical(layer.dequantize().cpu(), torch.stack([w.dense() for w in every]))
    assert layer.dequantize(BF16).dtype == BF16


@each_kind
def test_scales_in_the_types_of_torch_are_their_bytes(kind: str) -> None:
    tensors = tensors_of(weights(kind))
    typed = tensors["scales"].view(E8M0 if kind == "mxfp4" else E4M3)
    layer = ia.Fp4ExpertLinear(tensors["weight"], typed)
    assert_identical(layer.scales, tensors["scales"])
    assert layer.kind == kind


@each_kind
def test_gradients_reach_tokens_and_biases(kind: str) -> None:
    layer, x = layer_of(kind), tokens().requires_grad_()
    bias = torch.zeros(EXPERTS, N, requires_grad=True)
    grad = torch.randint(-2, 3, (6, N)).float()
    layer(x, ends_on(), bias).backward(grad)
    dense = torch.stack([w.exact() for w in weights(kind)])[[0, 0, 2, 2, 2]]
    exact = torch.einsum("tn,tnk->tk", grad[:5].double(), dense)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:5].double(), exact, rtol=1e-6, atol=1e-5)
    assert not x.grad[5].any()
    assert bias.grad is not None
    assert torch.equal(bias.grad[2], grad[2:5].sum(0))


@pytest.mark.parametrize("backend", ["eager", lowering.backend, "inductor"])
@each_kind
def test_compiled_layers_compute_the_same(kind: str, backend: str, device: str) -> None:
    layer, x = layer_of(kind).to(device), tokens(BF16, device)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        assert_identical(compiled(x, ends_on(device)), layer(x, ends_on(device)))


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_16_bits_are_one_kernel_on_a_gpu(dtype: torch.dtype, kind: str) -> None:
    layer = layer_of(kind).cuda()
    explanation = ia.explain(layer, tokens(dtype, "cuda"), ends_on("cuda"))
    assert len(explanation.dispatches) == 1
    assert not explanation.fallbacks


# -------------------------------------------------------------------------------- what it refuses


def octets(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (octets(4, 16), octets(4, 1)),
            TypeError,
            r"weight is torch\.uint8 \(4, 16\); expected uint8 \[experts, N, K/2\]",
        ),
        ((octets(3, 4, 16).char(), octets(3, 4, 1)), TypeError, r"weight is torch\.int8"),
        ((octets(3, 4, 16), None), TypeError, "scales is a NoneType"),
        (
            (octets(3, 4, 16), octets(2, 4, 1)),
            ValueError,
            r"scales has shape \(2, 4, 1\); expected \[experts, N, K/32\] .* \[experts, N, K/16\] "
            r"\(NVFP4\) with experts=3, N=4, K=32",
        ),
        ((octets(3, 4, 16), octets(4, 1)), ValueError, r"scales has shape \(4, 1\)"),
        ((octets(3, 4, 16), octets(3, 4, 4)), ValueError, "4 scales a row of K=32"),
        (
            (octets(3, 4, 16), octets(3, 4, 2).float()),
            TypeError,
            r"scales are torch\.float32, one for 16 codes; expected torch\.float8_e4m3fn",
        ),
        (
            (octets(3, 4, 16), octets(3, 4, 2), torch.ones(())),
            ValueError,
            r"global_scale is torch\.float32 \(\); expected float32, \[3\]",
        ),
        (
            (octets(3, 4, 16), octets(3, 4, 2), torch.ones(3).half()),
            ValueError,
            r"global_scale is torch\.float16 \(3,\); expected float32, \[3\]",
        ),
    ],
)
def test_tensors_that_do_not_fit(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Fp4ExpertLinear: .*{message}"):
        ia.Fp4ExpertLinear(*args)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((octets(6, K), ends_on()), TypeError, r"Fp4ExpertLinear: x is torch\.uint8; expected"),
        ((tokens().double(), ends_on()), TypeError, "matmul_experts: a has dtype float64"),
        ((tokens()[:, :48], ends_on()), ValueError, "a has 48 columns; K=96 needs 96"),
        ((tokens(), ends_on()[:2]), ValueError, r"ends has shape \(2,\); expected \(3,\)"),
        ((tokens(), ends_on(), torch.zeros(N)), ValueError, r"bias has shape \(40,\); expected"),
    ],
)
def test_inputs_that_do_not_fit(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^.*{message}"):
        layer_of("nvfp4")(*args)


# -------------------------------------------------------------------------- what weights survive


@each_kind
def test_state_dict_holds_the_layer(kind: str) -> None:
    layer, other = layer_of(kind), layer_of(kind)
    assert set(layer.state_dict()) == set(tensors_of(weights(kind)))
    assert not list(layer.parameters())
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(layer.state_dict())
    assert_identical(other(tokens(), ends_on()), layer(tokens(), ends_on()))
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32, the Fp4ExpertLinear holds"):
        other.load_state_dict({**layer.state_dict(), "weight": layer.dequantize()})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(how: Any) -> None:
    layer = layer_of("nvfp4")
    twin = how(layer)
    assert repr(twin) == repr(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert_identical(twin(tokens(BF16), ends_on()), layer(tokens(BF16), ends_on()))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "type"])
def test_casting_keeps_everything(cast: str) -> None:
    layer = layer_of("nvfp4")
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    getattr(layer, cast)(*([FP16] if cast == "type" else []))
    for key, tensor in before.items():
        assert_identical(layer.state_dict()[key], tensor)


def test_others_leave_layers_of_experts_alone() -> None:
    integers = ia.IntExpertLinear(octets(2, 4, 16), torch.ones(2, 4, 1))
    model = nn.ModuleList([layer_of("nvfp4"), integers, nn.Linear(N, N)])
    assert ia.prepare_(model) == []
    ia.quantize_(model, ia.Int8WeightOnly())
    assert [type(each) for each in model] == [ia.Fp4ExpertLinear, ia.IntExpertLinear, ia.IntLinear]
