"""torch.library.opcheck for every op, gradients and vmap."""

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
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import intlass_ops
from intlass_ops import matmul_int4_bf16_tn, matmul_int8_bf16_tn

OPS = torch.ops.intlass


def _x(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _codes(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0))


def _matmul(case: Case, **requires_grad: bool) -> tuple[Any, tuple[Any, ...]]:
    """The op of a case and its arguments in the schema's order."""
    call = build(case, "cpu", numbers="random")
    o = call.options
    if requires_grad.get("a"):
        call.a = call.a.detach().requires_grad_()
    if requires_grad.get("bias"):
        o["bias"] = o["bias"].detach().requires_grad_()
    if requires_grad.get("residual"):
        o["residual"] = o["residual"].detach().requires_grad_()
    last = (o.get("a_zero"), o.get("alpha"), o.get("bias"), case.out)
    last += (o.get("activation"), o.get("residual"))
    if case.w == "s8":
        args = (call.a, call.w, o.get("a_scale"), call.scales, *last)
        return OPS.matmul_int8_bf16_tn.default, args
    args = (call.a, call.w, call.scales, o.get("zeros"), case.k, o.get("a_scale"), *last)
    return OPS.matmul_int4_bf16_tn.default, args


_DYNAMIC, _STATIC = OPS.quantize_dynamic.default, OPS.quantize_static.default
SAMPLES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "pack": (OPS.pack_int4.default, (_codes(3, 5),), {}),
    "pack-int8-transposed": (OPS.pack_int4.default, (_codes(6, 4).to(torch.int8).T,), {}),
    "unpack": (OPS.unpack_int4.default, (oracle.pack(_codes(3, 5)), 5), {}),
    "unpack-u4": (OPS.unpack_int4.default, (oracle.pack(_codes(2, 3, 6)), 6), {"signed": False}),
    "quantize-token": (_DYNAMIC, (_x(3, 8), 8, "token", None, True, None), {}),
    "quantize-full-range": (_DYNAMIC, (_x(3, 8), 8, "token", None, True, None, True), {}),
    "quantize-group": (_DYNAMIC, (_x(2, 3, 32, dtype=BF16), 4, "group", 16, False, None), {}),
    "quantize-channel": (_DYNAMIC, (_x(8, 3).T, 4, "channel", None, True, None), {}),
    "quantize-tensor": (_DYNAMIC, (_x(4, 6, dtype=FP16), 8, "tensor", None, False, 7), {}),
    "static-token": (_STATIC, (_x(3, 8), _x(3, 1), None, 8, "token", None, None), {}),
    "static-group": (
        _STATIC,
        (_x(3, 32), _x(3, 2), _codes(3, 2).to(torch.int32), 4, "group", 16, 5),
        {},
    ),
    "dequantize-u4": (
        OPS.dequantize.default,
        (oracle.pack(_codes(4, 32)), _x(4, 2), _x(4), 32, BF16),
        {},
    ),
    "dequantize-s8": (
        OPS.dequantize.default,
        (_codes(9, 4).to(torch.int8).T, _x(), None, 9, FP32),
        {},
    ),
    "w4a16": (
        *_matmul(
            Case("bf16", "u4", (2, 3), 7, 48, groups=3, bias=BF16, alpha="tensor"),
            a=True,
            bias=True,
        ),
        {},
    ),
    "w4a16-fp32": (*_matmul(Case("fp32", "s4", (3,), 5, 33), a=True), {}),
    "w4a8": (
        *_matmul(
            Case("s8", "u4", (3,), 7, 64, groups=2, a_scale="token", a_zero=torch.int32, bias=FP32),
            bias=True,
        ),
        {},
    ),
    "w4a4": (
        *_matmul(Case("u4", "s4", (3,), 7, 33, a_scale="flat", a_zero=torch.uint8, out=FP16)),
        {},
    ),
    "w8a16": (
        *_matmul(Case("fp16", "s8", (4,), 7, 48, groups=3, bias=FP32, out=FP32), a=True, bias=True),
        {},
    ),
    "w4a16-silu-residual": (
        *_matmul(
            Case("bf16", "s4", (2, 3), 7, 48, groups=3, activation="silu", residual=True),
            a=True,
            residual=True,
        ),
        {},
    ),
    "w8a8-gelu": (*_matmul(Case("s8", "s8", (3,), 8, 32, activation="gelu_tanh")), {}),
    "w8a8": (
        *_matmul(Case("s8", "s8", (2, 3), 7, 33, a_scale="token", a_zero=FP32, alpha="tensor")),
        {},
    ),
    "fused-int8": (
        OPS.fused_quantize.default,
        (_x(2, 3, 64), _x(16, 16), "int8", "quest", 64, 1.0, True),
        {},
    ),
    "fused-nv": (OPS.fused_quantize.default, (_x(3, 64), _x(32, 32), "nv", "abs_max", 16, 2.0), {}),
    "gradient": (
        OPS.quantize_gradient.default,
        (_x(3, 5, dtype=BF16), _x(3, 1), _x(5, 1), torch.tensor([7])),
        {},
    ),
    "transpose-s4": (OPS.transpose_codes.default, (oracle.pack(_codes(3, 5)), 5), {}),
    "rotate-back": (
        OPS.rotate_back.default,
        (_x(3, 32, dtype=BF16), _codes(3, 4).to(torch.uint8), _x(16, 16)),
        {},
    ),
    "int4-nn": (
        OPS.matmul_int4_nn.default,
        (_x(2, 3, 5).requires_grad_(), oracle.pack(_codes(5, 32)), _x(5, 2), _x(5, 2), 32, _x(1)),
        {},
    ),
    "nvfp4": (
        OPS.matmul_block_scaled.default,
        (
            oracle.pack(_codes(3, 32)),
            oracle.pack(_codes(5, 32)),
            oracle.pack(_codes(3, 4)),
            oracle.pack(_codes(5, 4)),
            "nvf4",
            False,
            False,
            _x(1),
        ),
        {},
    ),
    "experts": (
        OPS.matmul_experts.default,
        (
            _x(5, 32).requires_grad_(),
            oracle.pack(_codes(3, 4, 32)),
            _x(3, 4, 2),
            _x(3, 4, 2),
            torch.tensor([2, 2, 4]),
            32,
            None,
            _x(3, 4).requires_grad_(),
        ),
        {},
    ),
    "experts-backward": (
        OPS.matmul_experts_backward.default,
        (
            _x(5, 4),
            _codes(2, 4, 7).to(torch.int8),
            _x(2, 4, 1),
            None,
            torch.tensor([2, 5]),
            7,
            BF16,
        ),
        {},
    ),
    "w8a8-transposed": (*_matmul(Case("s8", "s8", (3,), 8, 16, w_layout="transposed")), {}),
}


def _to(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str, device: str) -> None:
    """Schema, fake kernel, autograd registration, AOT dispatch with dynamic shapes."""
    op, args, kwargs = SAMPLES[name]
    opcheck(op, tuple(_to(a, device) for a in args), kwargs)


def test_opcheck_of_a_quantiser_that_must_refuse_gradients(device: str) -> None:
    """Without AOT dispatch, which would go backward; test_quantize_ops.py does, and is refused."""
    x = _x(3, 8).to(device).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(_DYNAMIC, (x, 8, "token", None, True, None), test_utils=checks)


def test_every_op_has_a_sample() -> None:
    sampled = {op._schema.name for op, _, _ in SAMPLES.values()}
    assert sampled == {
        f"intlass::{name}"
        for name in (
            "pack_int4",
            "unpack_int4",
            "quantize_dynamic",
            "quantize_static",
            "matmul_int4_bf16_tn",
            "matmul_int8_bf16_tn",
            "dequantize",
            "fused_quantize",
            "matmul_block_scaled",
            "matmul_int4_nn",
            "quantize_gradient",
            "transpose_codes",
            "rotate_back",
            "matmul_experts",
            "matmul_experts_backward",
        )
    }


# ---------------------------------------------------------------------------------------- gradients


def _differentiable(case: Case, device: str, numbers: str) -> Call:
    call = build(case, device, numbers=numbers)
    call.a.requires_grad_()
    call.options["bias"].requires_grad_()
    return call


def _expected_gradients(call: Call, grad: Tensor) -> tuple[oracle.Expected, oracle.Expected]:
    """float64 dX and dbias with their magnitudes."""
    w = oracle.weight(call.w, call.scales, call.options.get("zeros"), call.case.k)
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
    y = OPS.dequantize(*rest, FP32) if op == "dequantize" else OPS.matmul_int4_nn(_x(3, 4), *rest)
    with pytest.raises(RuntimeError, match=f"^{op}: scales requires a gradient"):
        y.sum().backward()


def test_none_for_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^matmul_int4_bf16_tn: scales is None; expected a tensor"):
        matmul_int4_bf16_tn(_x(3, 32), oracle.pack(_codes(4, 32)), None)
    with pytest.raises(ValueError, match=r"^dequantize: scales is on meta, the input on cpu"):
        intlass_ops.dequantize(oracle.pack(_codes(4, 32)), _x(4).to("meta"))


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


class _Seen(TorchDispatchMode):
    """Notes the ops that reach the dispatch of modes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_modes_see_the_op_with_and_without_gradients(grad: bool) -> None:
    op, args = _matmul(Case("fp32", "s4", (3,), 5, 32), a=grad)
    with _Seen() as seen:
        y = op(*args)
    assert op in seen.ops
    assert y.requires_grad == grad
    with torch.no_grad():
        assert_identical(op(*args), y.detach())


# --------------------------------------------------------------------------------------------- vmap


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


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, None)])
def test_vmap_of_float_activations(in_dims: tuple[int | None, ...], device: str) -> None:
    a = _codes(4, 4, 32).to(BF16).to(device)
    w = oracle.pack(_codes(4, 6, 32)).to(device)
    scales = _powers_of_two(4, 6, 2).to(device)
    args = (
        a,
        w if in_dims[1] is not None else w[0],
        scales if in_dims[2] is not None else scales[0],
    )
    y = torch.vmap(matmul_int4_bf16_tn, in_dims=in_dims)(*args)
    assert_identical(y, _loop(matmul_int4_bf16_tn, in_dims, *args))


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
