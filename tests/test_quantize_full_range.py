"""quantize_int8(full_range=True): torchao's codes and scales, bit for bit as eager PyTorch's.

`torchao_int8` spells what torchao computes; PyTorch's kernels of the same device are the oracle.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from gemm_case import LAYOUTS, relayout
from hypothesis import given
from hypothesis import strategies as st
from quantize_case import random
from strategies import FLOATS, FP32
from tolerance import assert_identical
from torch import Tensor
from torch.library import opcheck

from intlass_ops import ops, quantize_int4, quantize_int8

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
_EXTREMES = (0.0, -0.0, 127.5, 2.0**-149, -(2.0**-126), 1.5e-5, -3e38, 65504.0)
_NUMBERS = st.one_of(
    st.floats(width=32), st.floats(-2, 2, width=32), st.integers(-9, 9), st.sampled_from(_EXTREMES)
)


def torchao_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """choose_qparams_affine and quantize_affine of torchao 0.18, symmetric int8, a scale a row."""
    least = torch.minimum(x.amin(-1, keepdim=True), x.new_zeros(()))
    most = torch.maximum(x.amax(-1, keepdim=True), x.new_zeros(()))
    scale = torch.maximum(-least, most) / (float(127 - -128) / 2)
    scale = scale.float().clamp(min=torch.finfo(torch.float32).eps).to(x.dtype).float()
    codes = torch.clamp(torch.round(x * (1.0 / scale)) + 0, -128, 127)
    return codes.to(torch.int8), scale


def check(x: Tensor) -> None:
    q, scale, zero = quantize_int8(x, full_range=True)
    expected = torchao_int8(x)
    assert zero is None
    assert q.is_contiguous()
    assert_identical(q, expected[0])
    assert_identical(scale, expected[1])


@each_dtype
def test_is_torchao(dtype: torch.dtype) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = random(64, 100, dtype=dtype) * torch.logspace(-9, 4, 64).to(dtype).unsqueeze(1)
    x[:3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    block = [1, 100]
    scale, zero = primitives.choose_qparams_affine(
        x,
        primitives.MappingType.SYMMETRIC,
        block,
        torch.int8,
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int8,
        keepdim=True,
    )
    codes = primitives.quantize_affine(x, block, scale, zero, torch.int8)
    q, found, _ = quantize_int8(x, full_range=True)
    assert_identical(q, codes)
    assert_identical(found, scale)


# Short and long rows, few (a cluster may share one) and many (a block loads one ahead)
SHAPES = (
    *((1, 1), (5, 7), (3, 64), (2, 3, 33), (1, 4096), (4, 14336), (2, 100_002)),
    *((700, 100), (1200, 520), (40, 4096)),
)
GPU_SHAPES = ((1200, 5120), (700, 14336), (1200, 1000), (3000, 4096), (600, 28672))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
def test_random_numbers(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x = random(*shape, dtype=dtype)
    check(x.to(device))
    check((x * random(*shape[:-1], 1, seed=1).exp2().to(dtype)).to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@each_dtype
def test_random_numbers_of_many_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=dtype).cuda()
    x[5, 3], x[-1, -1] = torch.nan, -torch.inf
    check(x)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_scale_of_16_bits(dtype: torch.dtype, k: int, device: str) -> None:
    """Each number of the type as the largest of a row, with parts of it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
    check((every[:, None] * torch.linspace(1, -1, k).to(dtype)).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_codes_end(dtype: torch.dtype, device: str) -> None:
    """Below each largest number of a row the next ones, of both signs: about the codes' bounds."""
    largest = torch.arange(1, 2**15, dtype=torch.int32)[:, None]
    near = (largest - torch.arange(8)).clamp(min=0).short().view(dtype)
    check(torch.cat([near, -near], dim=1).to(device))
    check(-near.to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dividing_is_multiplying_by_the_reciprocal(dtype: torch.dtype) -> None:
    """Of scales in 16 bits, so that they are the same on a CPU and on a GPU."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
    assert_identical((every.float() * (1 / torch.tensor(127.5))).to(dtype), every / 127.5)


@each_dtype
def test_ties_of_scales_that_are_no_powers_of_two(dtype: torch.dtype, device: str) -> None:
    """x / scale is half an integer; x * (1 / scale) rounds to it, or next to it."""
    scales = torch.arange(1, 256, 2).unsqueeze(1) / 64
    x = (torch.arange(-9, 10) + 0.5) * scales
    x = torch.cat([x, 127.5 * scales], dim=1).to(dtype)
    check(x.to(device))
    q, scale, _ = quantize_int8(x[:1], full_range=True)
    assert scale.item() == 1 / 64
    assert q[0, :9].tolist() == [-8, -8, -6, -6, -4, -4, -2, -2, 0]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    k = draw(st.sampled_from((1, 2, 5, 8, 16, 17, 48)))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), k)
    values = draw(st.lists(_NUMBERS, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=FP32).reshape(shape).to(draw(st.sampled_from(FLOATS)))


@given(tensors(), st.sampled_from(LAYOUTS))
def test_any_numbers_of_any_layout(device: str, x: Tensor, layout: str) -> None:
    check(relayout(x.to(device), layout))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_granularities(granularity: Any, device: str) -> None:
    x = random(6, 4, 32, dtype=torch.bfloat16).to(device)
    options = {"group_size": 8} if granularity == "group" else {}
    q, scale, _ = quantize_int8(x, granularity=granularity, full_range=True, **options)
    length = x.numel() // scale.numel()
    expected = torchao_int8(x.reshape(-1, length))
    assert_identical(q.reshape(-1, length), expected[0])
    assert_identical(scale.flatten(), expected[1].flatten())


def test_nothing(device: str) -> None:
    for shape in ((0, 8), (3, 0)):
        q, scale, _ = quantize_int8(torch.zeros(shape, device=device), full_range=True)
        assert q.shape == shape
        assert scale.tolist() == [[2.0**-23]] * shape[0]


@pytest.mark.parametrize(("m", "k"), [(3, 7), (3, 4096), (1, 14336)])
@each_dtype
def test_after_a_norm_and_swiglu(m: int, k: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randint(-6, 7, (m, k), generator=generator).to(device, dtype) for _ in "ab")
    for weight, first in itertools.product((other[0].contiguous(), None), (False, True)):
        options: dict[str, Any] = {"round_first": first}
        got = ops.rms_norm_quantize(x, weight, 0.5, full_range=True, **options)
        q, scale, _ = ops.rms_norm_quantize(x, weight, 0.5, **options)
        # The normed values, which PyTorch may round differently on a GPU, are on the CPU's.
        v = x.cpu().float()
        y = v * (1 / (v.square().mean(-1, keepdim=True) + 0.5).sqrt())
        y = y.to(dtype).float() if first and weight is not None else y
        y = (y if weight is None else y * weight.cpu().float()).to(dtype).to(device)
        for found, expected in zip(got, (*torchao_int8(y), None), strict=True):
            assert found is None or torch.equal(found, expected)
        assert not torch.equal(got[1], scale)
    x = x / 4
    got = ops.silu_mul_quantize(x, other, full_range=True)
    q, scale = torchao_int8(torch.nn.functional.silu(x) * other)
    if device == "cpu":
        assert torch.equal(got[0], q)
        assert torch.equal(got[1], scale)
    else:  # PyTorch's exp may round another way
        torch.testing.assert_close(got[1], scale, rtol=2**-7, atol=0)
        assert (got[0] != q).sum() <= 2 + q.numel() // 100


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: quantize_int8(x, full_range=True, symmetric=False), "symmetric=False"),
        (
            lambda x: quantize_int8(x, full_range=True, rounding="stochastic", seed=3),
            "quantize_int8: full_range=True with .* seed=3",
        ),
        (lambda x: quantize_int8(x, x[:, :1], full_range=True), "one is given"),
        (lambda x: ops.rms_norm_quantize(x, full_range=True, bits=4), "bits=4"),
        (lambda x: ops.silu_mul_quantize(x, x, full_range=True, symmetric=False), "silu_mul"),
    ],
)
def test_refusals(call: Any, said: str, device: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.zeros(2, 8, device=device))


def test_the_other_quantisers_are_as_they_were(device: str) -> None:
    x = random(3, 64).to(device)
    assert quantize_int8(x)[0].min() >= -127
    assert_identical(quantize_int8(x)[0], quantize_int8(x, full_range=False)[0])
    assert not torch.equal(quantize_int8(x)[1], quantize_int8(x, full_range=True)[1])
    assert quantize_int4(x)[0].shape == (3, 32)


def test_opcheck(device: str) -> None:
    x = random(3, 8).to(device)
    namespace = torch.ops.intlass
    opcheck(namespace.rms_norm_quantize.default, (x, x[0].clone(), 1e-6, 8, True, False, True))
    opcheck(namespace.silu_mul_quantize.default, (x, x + 1, 8, True, True))
    opcheck(namespace.quantize_dynamic.default, (x, 8, "token", None, True, None, True))
