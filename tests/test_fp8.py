"""matmul_fp8_bf16_tn and matmul_experts with FP8 weights: what no test of all ops has.

Not here: those tests, which have FP8 among the weights of a `Case` (test_matmul.py,
test_cpu.py, test_opcheck.py and others); layers and checkpoints (test_fp8_linear.py,
test_formats_fp8.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from gemm_case import Case, build, relayout, stored
from gemm_checks import check_bounded, check_exact
from strategies import BF16, FLOATS, FP16, FP32
from tolerance import assert_close, assert_identical
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from intlass_ops import batch_invariant, cpu, explain, matmul_experts
from intlass_ops.ops import matmul_fp8_bf16_tn

E4M3 = torch.float8_e4m3fn


# -------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("k", [16, 48, 4100])
@pytest.mark.parametrize("n", [1, 48])
@pytest.mark.parametrize("m", [0, 1, 5, 300])
def test_sizes(m: int, n: int, k: int, device: str) -> None:
    check_exact(Case("bf16", "e4m3", (m,), n, k, out=FP32, bias=FP32), device)
    check_bounded(Case("fp16", "e4m3", (m,), n, k, scale_shape="scalar", alpha="float"), device)


@pytest.mark.parametrize("group_size", [16, 32, 48, 112, 128])
@pytest.mark.parametrize("scale", FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(1,), (2, 1, 20)], ids=str)
def test_groups(lead: tuple[int, ...], scale: torch.dtype, group_size: int, device: str) -> None:
    """Of whole vectors of any width, and of others."""
    case = Case("fp32", "e4m3", lead, 40, 3 * group_size, groups=3, scale=scale)
    check_bounded(case, device)
    check_exact(replace(case, scale_layout="transposed", w_layout="columns"), device)


@pytest.mark.skipif(cpu.compiler() is None, reason="needs a C++ compiler")
def test_a_cpu_has_kernels_for_every_call_with_tokens() -> None:
    for x in ("bf16", "fp16", "fp32"):
        for m in (1, 5, 40):
            for layout in ("contiguous", "transposed"):
                case = Case(x, "e4m3", (m,), k=33, a_layout=layout, w_layout=layout)
                call = build(case, "cpu")
                ran = explain(call.run)
                assert [d.kernel for d in ran.dispatches] == ["cpu"]
                with batch_invariant():
                    assert [d.kernel for d in explain(call.run).dispatches] == ["cpu"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 20])
def test_every_number_is_exact_in_every_type(m: int, dtype: torch.dtype, device: str) -> None:
    """One token a number, where bf16 and fp16 have it too."""
    w = stored("e4m3", torch.arange(254))[:, None].expand(254, 64).contiguous().to(device)
    a = torch.eye(64, device=device)[:m].to(dtype)
    y = matmul_fp8_bf16_tn(a, w, torch.ones((), device=device))
    assert_identical(y.float(), oracle.e4m3(w)[:, :m].T.float())


def test_without_kernels_the_reference_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "make", lambda *_: None)
    for invariant in (False, True):
        case = Case("bf16", "e4m3", (7,), 30, 96, groups=3, bias=FP16, seed=3 + invariant)
        if invariant:
            with batch_invariant():
                check_exact(case, "cpu")
        else:
            check_exact(case, "cpu")


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_gradients_of_all_that_has_one(activation: str, device: str) -> None:
    """What is before the activation is computed again, alpha and bias included."""
    case = Case("fp32", "e4m3", (2, 3), 24, 48, groups=3, bias=FP32, alpha="tensor", residual=True)
    call = build(replace(case, activation=activation), device, numbers="random")
    leaves = [call.a, call.options["bias"], call.options["residual"]]
    a, bias, residual = (t.double().requires_grad_() for t in leaves)
    for t in leaves:
        t.requires_grad_()
    y = call.run()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(grad)
    w = oracle.weight(call.w, call.scales, None, 48) * call.options["alpha"].double()
    expected = oracle.ACTIVATIONS[activation](a @ w.T + bias) + residual
    expected.backward(grad.double())
    magnitude = 20 * grad.double().abs() @ w.abs()
    assert_close(leaves[0].grad, a.grad, magnitude)
    sums = 20 * grad.double().abs().flatten(0, 1).sum(0)
    assert_close(leaves[1].grad, bias.grad, sums)
    assert_identical(leaves[2].grad, grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.ones(3, 32, dtype=torch.int8)}, TypeError, "a has dtype int8; expected one"),
        ({"a": torch.ones(3, 16, dtype=torch.uint8)}, TypeError, "a has dtype uint8"),
        ({"b": torch.ones(4, 32, dtype=torch.int8)}, TypeError, "b has dtype int8; expected one"),
        ({"b": torch.ones(4, 32).to(torch.float8_e5m2)}, TypeError, "b has dtype float8_e5m2"),
        ({"b_scale": torch.ones(4, 3)}, ValueError, "3 groups a row, which do not divide K=32"),
        ({"b_scale": torch.ones(4, 4)}, ValueError, r"b_scale \(4, 4\)\) is not a multiple of 16"),
        ({"b_scale": torch.ones(5)}, ValueError, r"b_scale has shape \(5,\)"),
        ({"b_scale": torch.ones(4).to(E4M3)}, TypeError, "b_scale has dtype float8_e4m3fn"),
        ({"zeros": torch.ones(4)}, TypeError, "unexpected keyword argument 'zeros'"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"a": torch.ones(3, 32), "b": torch.ones(4, 32).to(E4M3), "b_scale": torch.ones(4)}
    with pytest.raises(error, match=f"matmul_fp8_bf16_tn.*{message}"):
        matmul_fp8_bf16_tn(**{**given, **change})


# ----------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_any_number_of_tokens(device: str) -> None:
    case = Case("bf16", "e4m3", (1,), 48, 96, groups=3, bias=FP32, activation="gelu")
    call = build(case, device, numbers="random")

    def layer(a: Tensor) -> Tensor:
        return matmul_fp8_bf16_tn(a, call.w, call.scales, **call.options)

    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for m in (7, 2, 300):
        a = torch.randn(m, 96, device=device).to(BF16)
        assert_identical(fn(a), layer(a))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_gradients_through_a_compiled_graph(device: str) -> None:
    case = Case("fp32", "e4m3", (5,), 48, 96, groups=3, bias=FP32, activation="silu")
    call = build(case, device, numbers="random")

    def layer(a: Tensor) -> Tensor:
        return matmul_fp8_bf16_tn(a, call.w, call.scales, **call.options)

    grads = []
    for fn in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)):
        a = call.a.clone().requires_grad_()
        fn(a).square().sum().backward()
        grads.append(a.grad)
    torch.testing.assert_close(grads[1], grads[0])


# ------------------------------------------------------------------------------------------ experts


def stack(device: str, experts: int = 3, n: int = 5, k: int = 64) -> dict[str, Tensor]:
    """All numbers of FP8, scales that are powers of two."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 254, (experts, n, k), generator=rng)
    scales = 2.0 ** torch.randint(-3, 4, (experts, n, k // 32), generator=rng)
    return {"w": stored("e4m3", codes).to(device), "scales": scales.to(device)}


def dense_of(weights: dict[str, Tensor]) -> Tensor:
    """float64 [experts, N, K]."""
    pairs = zip(weights["w"], weights["scales"], strict=True)
    return torch.stack([oracle.weight(w, s, None, w.shape[1]) for w, s in pairs])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ends", [[2, 2, 6], [0, 4, 6], [6, 6, 6], [1, 2, 3], [0, 0, 0]])
def test_each_run_of_tokens_meets_its_expert(
    ends: list[int], dtype: torch.dtype, device: str
) -> None:
    weights, rng = stack(device), torch.Generator().manual_seed(1)
    x = torch.randn(6, 64, generator=rng).to(dtype).to(device)
    bias, alpha = (torch.randn(*s, generator=rng).to(device) for s in ((3, 5), (3,)))
    options = {"bias": bias, "alpha": alpha, "out_dtype": FP32}
    y = matmul_experts(x, **weights, ends=torch.tensor(ends, device=device), **options)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        each = {"alpha": alpha[e], "bias": bias[e]}
        scales = weights["scales"][e]
        assert_close(y[start:end], *oracle.matmul(x[start:end], weights["w"][e], scales, **each))
    assert not y[ends[-1] :].any()


def test_gradients_of_experts(device: str) -> None:
    weights, ends = stack(device), torch.tensor([2, 2, 5], device=device)
    rng = torch.Generator().manual_seed(1)
    x, grad = (torch.randint(-2, 3, (6, k), generator=rng).float().to(device) for k in (64, 5))
    bias = torch.zeros(3, 5, device=device, requires_grad=True)
    alpha = torch.tensor([0.5, 2.0, 4.0], device=device)
    x.requires_grad_()
    matmul_experts(x, **weights, ends=ends, bias=bias, alpha=alpha).backward(grad)
    of = torch.tensor([0, 0, 2, 2, 2], device=device)
    dense = dense_of(weights)[of] * alpha[of, None, None].double()
    expected = torch.einsum("tn,tnk->tk", grad[:5].double(), dense)
    assert_identical(x.grad, torch.cat((expected, expected.new_zeros(1, 64))).float())
    sums = [grad[:2].sum(0), torch.zeros_like(grad[0]), grad[2:5].sum(0)]
    assert_identical(bias.grad, torch.stack(sums))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"zeros": torch.ones(3, 5, 2)}, ValueError, "zeros belong to INT4 .* w is float8_e4m3fn"),
        ({"a": torch.ones(6, 64, dtype=torch.int8)}, TypeError, "a has dtype int8"),
        ({"w": torch.ones(3, 5, 64).to(torch.float8_e5m2)}, TypeError, "w has dtype float8_e5m2"),
        ({"scales": torch.ones(3, 5, 2, dtype=torch.uint8)}, TypeError, "w has dtype float8_e4m3"),
        ({"scales": torch.ones(3, 5, 3)}, ValueError, "3 groups a row"),
        ({"a_scale": torch.ones(6, 1)}, ValueError, "a_scale .* belong to integer activations"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"a": torch.ones(6, 64), **stack("cpu"), "ends": torch.tensor([2, 4, 6])}
    with pytest.raises(error, match=f"^matmul_experts: .*{message}"):
        matmul_experts(**{**given, **change})


def test_strided_experts(device: str) -> None:
    weights, ends = stack(device), torch.tensor([2, 4, 6], device=device)
    x = torch.randn(6, 64, device=device)
    dense = dense_of(weights).repeat_interleave(2, 0)  # of each token
    exact, magnitude = (
        torch.einsum("tk,tnk->tn", a, w)
        for a, w in ((x.double(), dense), (x.double().abs(), dense.abs()))
    )
    for layout in ("contiguous", "transposed", "columns", "rows"):
        strided = {name: relayout(t, layout) for name, t in weights.items()}
        assert_close(matmul_experts(relayout(x, layout), **strided, ends=ends), exact, magnitude)
