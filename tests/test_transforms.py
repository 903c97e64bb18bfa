"""Gradients of the ops, the transforms of torch.func through them, and vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from gemm_case import Call, Case, build
from strategies import BF16, FP16, FP32
from tolerance import assert_close, assert_identical
from torch import Tensor

import intlass_ops
from intlass_ops import matmul_int4_bf16_tn, matmul_int8_bf16_tn, matmul_lut4_bf16_tn
from intlass_ops.ops import matmul_fp8_bf16_tn

OPS = torch.ops.intlass


def _codes(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0))


def _differentiable(case: Case, device: str, numbers: str) -> Call:
    call = build(case, device, numbers=numbers)
    call.a.requires_grad_()
    call.options["bias"].requires_grad_()
    return call


def _expected_gradients(call: Call, grad: Tensor) -> tuple[oracle.Expected, oracle.Expected]:
    """float64 dX and dbias with their magnitudes."""
    w = call.weight()
    alpha = float(call.options.get("alpha", 1.0))
    g = grad.double()
    rows = g.reshape(-1, g.shape[-1])
    return (
        oracle.Expected(alpha * (g @ w), abs(alpha) * (g.abs() @ w.abs())),
        oracle.Expected(rows.sum(0), rows.abs().sum(0)),
    )


_GRADIENT_CASES = [
    Case(x, w, lead, 24, k, groups, alpha=alpha, bias=bias, out=out)
    for x, w, lead, k, groups, alpha, bias, out in (
        ("fp32", "s4", (5,), 48, 3, "none", FP32, None),
        ("fp32", "u4", (2, 3), 33, 1, "float", BF16, None),
        ("bf16", "u4", (5,), 64, 2, "tensor", FP32, None),
        ("bf16", "s8", (7,), 32, 1, "none", BF16, FP32),
        ("fp16", "s8", (), 48, 3, "float", FP16, BF16),
        ("fp16", "s4", (1,), 32, 1, "none", FP32, None),
        ("fp32", "e4m3", (2, 3), 33, 1, "none", FP32, None),
        ("bf16", "e4m3", (7,), 48, 3, "tensor", BF16, FP32),
        ("fp32", "nf4", (2, 3), 33, 1, "none", FP32, None),
        ("bf16", "nf4", (7,), 48, 3, "tensor", BF16, FP32),
    )
]


@pytest.mark.parametrize("case", _GRADIENT_CASES, ids=str)
def test_gradients_of_integers_are_exact(case: Case, device: str) -> None:
    call = _differentiable(case, device, "exact")
    y = call.run()
    grad = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(1))
    grad = grad.to(y.dtype).to(device)
    y.backward(grad)
    expected_a, expected_bias = _expected_gradients(call, grad)
    assert_identical(call.a.grad, oracle.round_to(expected_a.y, call.a.dtype))
    bias = call.options["bias"]
    assert_identical(bias.grad, oracle.round_to(expected_bias.y, bias.dtype))


@pytest.mark.parametrize("case", _GRADIENT_CASES, ids=str)
def test_gradients_stay_within_the_tolerance(case: Case, device: str) -> None:
    call = _differentiable(case, device, "random")
    y = call.run()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype).to(device)
    y.backward(grad)
    expected_a, expected_bias = _expected_gradients(call, grad)
    assert_close(call.a.grad, *expected_a)
    assert_close(call.options["bias"].grad, *expected_bias)


@pytest.mark.parametrize("wanted", ["a", "bias"])
def test_only_the_gradient_that_is_wanted(wanted: str, device: str) -> None:
    call = build(Case("bf16", "u4", bias=FP32), device)
    leaves = {"a": call.a, "bias": call.options["bias"]}
    leaves[wanted].requires_grad_()
    call.run().float().sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}


def test_the_bias_of_integer_activations_has_a_gradient(device: str) -> None:
    call = build(Case("s8", "s8", a_scale="token", bias=FP32), device)
    call.options["bias"].requires_grad_()
    call.run().float().sum().backward()
    assert call.options["bias"].grad.tolist() == [5.0] * 48


@pytest.mark.parametrize("name", ["scales", "zeros", "alpha", "a_scale", "a_zero"])
def test_gradients_that_do_not_exist_are_refused_by_name(name: str, device: str) -> None:
    x = "s8" if name.startswith("a_") else "bf16"
    a_zero = FP32 if name == "a_zero" else None
    case = Case(
        x, "u4", zero=FP32, alpha="tensor", a_scale="token" if x == "s8" else "none", a_zero=a_zero
    )
    call = build(case, device)
    (call.scales if name == "scales" else call.options[name]).requires_grad_()
    y = call.run()  # inference without no_grad() stays possible
    with pytest.raises(RuntimeError, match=f"^matmul_int4_bf16_tn: {name} requires a gradient"):
        y.float().sum().backward()


@pytest.mark.parametrize("op", ["dequantize", "matmul_int4_nn"])
def test_scales_that_require_a_gradient_are_refused_by_other_ops_too(op: str) -> None:
    packed, s = oracle.pack(_codes(4, 32)), torch.ones(4, 2, requires_grad=True)
    rest = (packed, s, None, 32)
    y = (
        OPS.dequantize(*rest, FP32)
        if op == "dequantize"
        else OPS.matmul_int4_nn(torch.ones(3, 4), *rest)
    )
    with pytest.raises(RuntimeError, match=f"^{op}: scales requires a gradient"):
        y.sum().backward()


def test_none_for_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^matmul_int4_bf16_tn: scales is None; expected a tensor"):
        matmul_int4_bf16_tn(torch.ones(3, 32), oracle.pack(_codes(4, 32)), None)
    with pytest.raises(ValueError, match=r"^dequantize: scales is on meta, the input on cpu"):
        intlass_ops.dequantize(oracle.pack(_codes(4, 32)), torch.ones(4).to("meta"))


def test_no_graph_is_kept_without_gradients(device: str) -> None:
    call = build(Case("bf16", "u4", bias=FP32), device)
    assert not call.run().requires_grad
    call.a.requires_grad_()
    with torch.no_grad():
        assert not call.run().requires_grad


def _quadratic(device: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A function through both matmul ops, and the same of dense weights; integers, so exact."""
    q = [_codes(*shape).to(device) for shape in ((6, 32), (4, 6))]
    packed, one = oracle.pack(q[0]), torch.ones((), device=device)

    def quantised(x: Tensor) -> Tensor:
        v = matmul_int4_bf16_tn(x, packed, one, residual=x[..., :6])
        return matmul_int8_bf16_tn(v * v, q[1].to(torch.int8), None, one)

    def dense(x: Tensor) -> Tensor:
        v = x @ q[0].to(x).T + x[..., :6]
        return (v * v) @ q[1].to(x).T

    return quantised, dense


@pytest.mark.parametrize("name", ["vjp", "jacrev", "vmap of grad", "jacrev of jacrev"])
def test_transforms_of_torch_func(name: str, device: str) -> None:
    transform = {
        "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](f(x))[0],
        "jacrev": torch.func.jacrev,
        "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sum())),
        "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    }[name]
    x = torch.randint(-2, 3, (3, 32), generator=torch.Generator().manual_seed(0)).float().to(device)
    quantised, dense = map(transform, _quadratic(device))
    assert_identical(quantised(x), dense(x))


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_derivatives_are_refused(transform: Any, device: str) -> None:
    """PyTorch's own kernels for custom ops leave them out: the derivative would be zero."""
    quantised, _ = _quadratic(device)
    with pytest.raises(RuntimeError, match=r"^matmul_int[48]_bf16_tn: no forward-mode derivative"):
        transform(lambda x: quantised(x).sum())(torch.ones(32, device=device))


def _powers_of_two(*shape: int) -> Tensor:
    return torch.exp2(_codes(*shape) % 3)


def _loop(fn: Callable[..., Tensor], in_dims: tuple[int | None, ...], *args: Tensor) -> Tensor:
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    return torch.stack(
        [
            fn(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
    )


@pytest.mark.parametrize("op", [matmul_int4_bf16_tn, matmul_fp8_bf16_tn, matmul_lut4_bf16_tn])
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, None)])
def test_vmap_of_float_activations(in_dims: tuple[int | None, ...], op: Any, device: str) -> None:
    a, w = _codes(4, 4, 32).to(BF16).to(device), _codes(4, 6, 32)
    w = w.to(torch.float8_e4m3fn) if op is matmul_fp8_bf16_tn else oracle.pack(w)
    w = w.to(device)
    scales = _powers_of_two(4, 6, 2).to(device)
    args = (
        a,
        w if in_dims[1] is not None else w[0],
        scales if in_dims[2] is not None else scales[0],
    )
    y = torch.vmap(op, in_dims=in_dims)(*args)
    assert_identical(y, _loop(op, in_dims, *args))


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (0, None, 0, None), (0, 0, 0, 0)])
@pytest.mark.parametrize("a_scale_shape", [(4, 5, 1), (4, 5), (4, 1)], ids=str)
def test_vmap_of_integer_activations_with_scales_per_token(
    in_dims: tuple[int | None, ...], a_scale_shape: tuple[int, ...], device: str
) -> None:
    args = [
        _codes(4, 5, 32).to(torch.int8),
        _codes(4, 6, 32).to(torch.int8),
        _powers_of_two(*a_scale_shape),
        _powers_of_two(4, 6, 2),
    ]
    args = [
        t.to(device) if d is not None else t[0].to(device)
        for t, d in zip(args, in_dims, strict=True)
    ]
    y = torch.vmap(matmul_int8_bf16_tn, in_dims=in_dims)(*args)
    assert_identical(y, _loop(matmul_int8_bf16_tn, in_dims, *args))


def test_vmap_of_packing(device: str) -> None:
    codes = _codes(5, 3, 6).to(device)
    packed = torch.vmap(intlass_ops.pack_int4, in_dims=1)(codes)
    assert_identical(packed, oracle.pack(codes.movedim(1, 0)))
    back = torch.vmap(lambda p: intlass_ops.unpack_int4(p, 6), in_dims=2, out_dims=1)(
        packed.movedim(0, 2)
    )
    assert_identical(back.long(), codes)
    with pytest.raises(ValueError, match="pack_int4: q is a scalar"):
        torch.vmap(intlass_ops.pack_int4)(torch.arange(4, device=device))
