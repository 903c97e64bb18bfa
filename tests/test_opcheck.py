"""torch.library.opcheck for every op, and what modes of torch see of an op.

Gradients and transforms: test_transforms.py.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from gemm_case import Case, build
from strategies import BF16, FP16, FP32
from tolerance import assert_identical
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

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
    if case.w == "e4m3":
        return OPS.matmul_fp8_bf16_tn.default, (call.a, call.w, call.scales, *last[1:])
    if case.table is not None:
        args = (call.a, call.w, call.scales, case.k, *last[1:])
        return getattr(OPS, f"matmul_{case.table}_bf16_tn").default, args
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
    "mxfp4-w4a16": (
        OPS.matmul_block_scaled.default,
        (
            _x(2, 3, 64).requires_grad_(),
            oracle.pack(_codes(5, 64)),
            None,
            oracle.pack(_codes(5, 4)),
            "mxf4",
            False,
            False,
            _x(1),
            torch.float32,
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
    "experts-fp4": (
        OPS.matmul_experts.default,
        (
            _x(5, 32).requires_grad_(),
            oracle.pack(_codes(3, 4, 32)),
            torch.randint(120, 130, (3, 4, 1), dtype=torch.uint8),
            None,
            torch.tensor([2, 2, 4]),
            32,
            None,
            None,
            None,
            _x(3).float(),
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
    "fp8": (
        *_matmul(
            Case("fp16", "e4m3", (2, 3), 7, 48, groups=3, bias=FP32, alpha="tensor", out=FP32),
            a=True,
            bias=True,
        ),
        {},
    ),
    "fp8-gelu-residual": (
        *_matmul(
            Case("bf16", "e4m3", (3,), 7, 33, activation="gelu", residual=True, w_layout="columns"),
            a=True,
            residual=True,
        ),
        {},
    ),
    "dequantize-fp8": (
        OPS.dequantize.default,
        (_codes(4, 32).to(torch.float8_e4m3fn), _x(4, 2), None, 32, FP16),
        {},
    ),
    "nf4": (
        *_matmul(
            Case("fp16", "nf4", (2, 3), 7, 48, groups=3, bias=FP32, alpha="tensor", out=FP32),
            a=True,
            bias=True,
        ),
        {},
    ),
    **{
        table: (*_matmul(Case(x, table, (2, 3), 7, 48, groups=3, bias=FP32), a=True), {})
        for table, x in (("iq4nl", "bf16"), ("fp4", "fp32"), ("bnbfp4", "fp16"))
    },
    "nf4-gelu-residual": (
        *_matmul(
            Case("bf16", "nf4", (3,), 7, 33, activation="gelu", residual=True, w_layout="columns"),
            a=True,
            residual=True,
        ),
        {},
    ),
    "dequantize-nf4": (
        OPS.dequantize.default,
        (oracle.pack(_codes(4, 33)), _x(4, 1), None, 33, FP16, "nf4"),
        {},
    ),
    "experts-fp8": (
        OPS.matmul_experts.default,
        (
            _x(5, 32).requires_grad_(),
            _codes(3, 4, 32).to(torch.float8_e4m3fn),
            _x(3, 4, 2),
            None,
            torch.tensor([2, 2, 4]),
            32,
            None,
            _x(3, 4).requires_grad_(),
            None,
            _x(3),
        ),
        {},
    ),
    "experts-backward-fp8": (
        OPS.matmul_experts_backward.default,
        (
            _x(5, 4),
            _codes(2, 4, 7).to(torch.float8_e4m3fn),
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


@pytest.fixture
def float8_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema's check asks torch.allclose, which has no float8, whether an input was changed."""
    allclose = torch.allclose

    def by_bytes(a: Tensor, b: Tensor, **how: Any) -> bool:
        if a.dtype == b.dtype == torch.float8_e4m3fn:
            return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        return allclose(a, b, **how)

    monkeypatch.setattr(torch, "allclose", by_bytes)


@pytest.mark.usefixtures("float8_is_compared")
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
            "matmul_fp8_bf16_tn",
            *(f"matmul_{table}_bf16_tn" for table in oracle.TABLES),
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
