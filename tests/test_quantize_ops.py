"""quantize_int8, quantize_int4: codes, scales and zero points bit for bit against the oracle, and
the properties that the formulas promise. On a GPU the oracle is the same, so CPU and GPU agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from gemm_case import LAYOUTS, relayout
from hypothesis import given
from hypothesis import strategies as st
from quantize_case import BITS, code_range, codes_of, each_symmetry, each_width, random
from strategies import BF16, FLOATS, FP32, QUANTIZED_SHAPES
from tolerance import assert_identical
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from intlass_ops import quantize_int4, quantize_int8

SMALLEST = 2.0**-149
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
GRANULARITIES = ("token", "tensor", "channel", "group")


def check_against_the_oracle(
    x: Tensor, bits: int, symmetric: bool, granularity: str, group_size: int | None = None
) -> None:
    q, scale, zero = BITS[bits](
        x, granularity=granularity, group_size=group_size, symmetric=symmetric
    )
    assert q.is_contiguous()
    assert scale.is_contiguous()
    expected = oracle.quantize(x, bits, granularity, group_size, symmetric)
    assert_identical(scale.cpu(), expected.scale)
    assert_identical(codes_of(q, x.shape[-1], bits, symmetric).cpu(), expected.codes)
    if bits == 4:
        assert_identical(q.cpu(), oracle.pack(expected.codes))
    if symmetric:
        assert zero is None
    else:
        assert zero.dtype == torch.int32
        assert_identical(zero.cpu().long(), expected.zero)


# ----------------------------------------------------------------------------- dynamic quantisation


@pytest.mark.parametrize(("shape", "granularity", "group_size"), QUANTIZED_SHAPES, ids=str)
@each_dtype
@each_symmetry
@each_width
def test_random_numbers(
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    granularity: str,
    group_size: int | None,
    device: str,
) -> None:
    x = random(*shape, dtype=dtype).to(device)
    check_against_the_oracle(x, bits, symmetric, granularity, group_size)


_EXTREMES = (0.0, -0.0, 1.0, -1.0, SMALLEST, -SMALLEST, 2.0**-126, 3e-39, 1e38, -3e38, 65504.0)
_NUMBERS = st.one_of(
    st.floats(width=32), st.floats(-2, 2, width=32), st.integers(-9, 9), st.sampled_from(_EXTREMES)
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any floats at all: subnormal, infinite, NaN, empty, half-way between codes."""
    k = draw(st.sampled_from((0, 1, 2, 5, 8, 16, 17, 48)))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), k)
    values = draw(st.lists(_NUMBERS, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=FP32).reshape(shape).to(draw(st.sampled_from(FLOATS)))


@given(tensors(), st.sampled_from(LAYOUTS), st.sampled_from(GRANULARITIES), st.data())
def test_any_numbers_of_any_layout(
    device: str, x: Tensor, layout: str, granularity: str, data: st.DataObject
) -> None:
    k = x.shape[-1]
    group_size = None
    if granularity == "group":
        group_size = data.draw(st.sampled_from([g for g in (1, 2, 4, 8, 16) if k % g == 0]))
    bits, symmetric = data.draw(st.sampled_from((8, 4))), data.draw(st.booleans())
    x = relayout(x.to(device), layout)
    check_against_the_oracle(x, bits, symmetric, granularity, group_size)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_symmetry
@each_width
def test_every_layout(bits: int, symmetric: bool, layout: str, device: str) -> None:
    x = relayout(random(6, 16).to(device), layout)
    for granularity in GRANULARITIES:
        group_size = 8 if granularity == "group" else None
        check_against_the_oracle(x, bits, symmetric, granularity, group_size)
        options: dict[str, Any] = {"granularity": granularity, "group_size": group_size}
        q, scale, zero = BITS[bits](x, symmetric=symmetric, **options)
        static = BITS[bits](x, scale, zero, **options)
        assert_identical(static, q)
        assert static.is_contiguous()


@each_width
def test_ties_go_to_the_even_code(bits: int, device: str) -> None:
    qmax = 127 if bits == 8 else 7
    halves = torch.arange(-qmax, qmax) + 0.5
    x = torch.cat([halves, torch.tensor([float(qmax)])]).to(device)  # amax = qmax, so scale is 1
    q, scale, _ = BITS[bits](x)
    assert scale.tolist() == [1.0]
    codes = codes_of(q, len(x), bits, True).tolist()
    assert codes[:-1] == [2 * round(h / 2) for h in halves.tolist()]
    assert codes[-1] == qmax


@each_symmetry
@each_width
def test_zeros_have_scale_one(bits: int, symmetric: bool, device: str) -> None:
    q, scale, zero = BITS[bits](torch.zeros(3, 8, device=device), symmetric=symmetric)
    assert scale.tolist() == [[1.0]] * 3
    first = code_range(bits, symmetric)[0] if not symmetric else 0
    assert (codes_of(q, 8, bits, symmetric) == first).all()
    assert zero is None or zero.tolist() == [[first]] * 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_symmetry
@each_width
def test_what_is_not_finite_spoils_its_segment_and_no_other(
    bits: int, symmetric: bool, value: float, device: str
) -> None:
    clean = random(3, 32).to(device)
    x = clean.clone()
    x[1, 5] = value
    q, scale, _ = BITS[bits](x, symmetric=symmetric)
    q_clean, scale_clean, _ = BITS[bits](clean, symmetric=symmetric)
    assert not scale[1].isfinite().any()
    assert scale[1].isnan().all() == math.isnan(value)
    codes = codes_of(q, 32, bits, symmetric)
    assert codes[1, 5] == 0
    assert_identical(q[::2], q_clean[::2])
    assert_identical(scale[::2], scale_clean[::2])
    # whatever is made of it is not finite either
    assert not (codes[1] * scale[1]).isfinite().any()


@each_dtype
@each_width
def test_subnormal_numbers_keep_their_value(bits: int, dtype: torch.dtype, device: str) -> None:
    """amax / qmax underflows to the smallest float, of which the numbers are then multiples."""
    unit = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, SMALLEST)
    x = (torch.tensor([0.0, 1.0, -3.0, 5.0]) * unit).to(dtype).to(device)
    q, scale, _ = BITS[bits](x)
    if dtype == FP32:
        assert scale.tolist() == [SMALLEST]
    x_hat = codes_of(q, 4, bits, True).double() * scale.double()
    assert (x_hat - x.double()).abs().max() <= scale.double() / 2


@each_dtype
@each_symmetry
@pytest.mark.parametrize("granularity", GRANULARITIES)
@each_width
def test_error_is_at_most_half_a_step(
    bits: int, granularity: str, symmetric: bool, dtype: torch.dtype, device: str
) -> None:
    group_size = 32 if granularity == "group" else None
    for spread in (1e-3, 1.0, 1e3):
        x = (spread * (random(6, 96) + 0.7)).to(dtype).to(device)
        q, scale, zero = BITS[bits](
            x, granularity=granularity, group_size=group_size, symmetric=symmetric
        )
        codes = codes_of(q, 96, bits, symmetric).double()
        low, high = code_range(bits, symmetric)
        assert low <= codes.min() <= codes.max() <= high
        wide = (6, 3, 32) if granularity == "group" else (6, 96)
        s = scale.double().reshape(6, 3, 1) if granularity == "group" else scale.double()
        z = 0 if zero is None else zero.double().reshape(s.shape)
        error = ((codes.reshape(wide) - z) * s - x.double().reshape(wide)).abs()
        # 2^-14: x / scale, at most 255, is rounded to float32 before it is rounded to an integer
        assert (error <= s * (0.5 + 2.0**-14)).all()


@each_symmetry
@each_width
def test_zero_is_represented_exactly(bits: int, symmetric: bool, device: str) -> None:
    """Padding and ReLU zeros: also where all numbers have one sign."""
    for sign in (1.0, -1.0):
        x = sign * random(4, 32).abs().add(3)
        x[:, 0] = 0
        q, _, zero = BITS[bits](x.to(device), symmetric=symmetric)
        z = 0 if zero is None else zero.long()
        assert ((codes_of(q, 32, bits, symmetric) - z)[:, 0] == 0).all()


# ------------------------------------------------------------------------------ static quantisation


@each_symmetry
@each_width
def test_a_given_scale_reproduces_the_dynamic_codes(
    bits: int, symmetric: bool, device: str
) -> None:
    for granularity, group_size in (
        ("token", None),
        ("tensor", None),
        ("channel", None),
        ("group", 16),
    ):
        x = random(4, 6, 48, dtype=BF16).to(device)
        options: dict[str, Any] = {"granularity": granularity, "group_size": group_size}
        q, scale, zero = BITS[bits](x, symmetric=symmetric, **options)
        assert_identical(BITS[bits](x, scale, zero, **options), q)


@each_dtype
def test_given_scales_of_every_shape_and_dtype(dtype: torch.dtype, device: str) -> None:
    x = random(2, 3, 8).to(device)
    half = torch.tensor(0.5, dtype=dtype, device=device)
    expected = torch.round(x / 0.5).clamp(-127, 127).to(torch.int8)
    for shape in ((), (1,), (2, 3), (2, 3, 1)):
        assert_identical(quantize_int8(x, half.expand(shape)), expected)
    assert_identical(quantize_int8(x, half, granularity="tensor"), expected)
    assert_identical(quantize_int8(x, half.expand(2, 1, 1), granularity="channel"), expected)
    by_group = half.expand(2, 3, 4)
    assert_identical(quantize_int8(x, by_group, granularity="group", group_size=2), expected)


def test_saturation(device: str) -> None:
    x = torch.tensor([-1e9, -127.6, 127.6, 1e9, torch.inf, -torch.inf], device=device)
    one = torch.ones((), device=device)
    assert quantize_int8(x, one).tolist() == [-127, -127, 127, 127, 127, -127]
    zero = torch.zeros((), dtype=torch.int32, device=device)
    assert quantize_int8(x, one, zero).tolist() == [-128, -128, 127, 127, 127, -128]
    assert oracle.unpack(quantize_int4(x, one), 6, True).tolist() == [-7, -7, 7, 7, 7, -7]
    assert oracle.unpack(quantize_int4(x, one, zero), 6, False).tolist() == [0, 0, 15, 15, 15, 0]


def test_scales_that_are_no_use(device: str) -> None:
    x = torch.tensor([[-2.0, 0.0, torch.nan, 3.0]], device=device)
    for scale, expected in (
        (0.0, [-127, 0, 0, 127]),
        (torch.inf, [0, 0, 0, 0]),
        (torch.nan, [0, 0, 0, 0]),
        (SMALLEST, [-127, 0, 0, 127]),
        (-1.0, [2, 0, 0, -3]),
    ):
        assert quantize_int8(x, torch.tensor(scale, device=device)).tolist() == [expected]


def test_integer_zero_points_join_after_the_rounding_and_floating_ones_before(device: str) -> None:
    x, one = torch.tensor([0.5, 1.5, 2.5], device=device), torch.ones((), device=device)
    integer = torch.tensor(3, dtype=torch.int32, device=device)
    assert quantize_int8(x, one, integer).tolist() == [3, 5, 5]
    assert quantize_int8(x, one, integer.float()).tolist() == [4, 4, 6]
    assert quantize_int8(x, one, torch.tensor(0.25, device=device)).tolist() == [1, 2, 3]


# ----------------------------------------------------------------------------------------- refusals


def _x(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


_ILLEGAL: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((_x(2, 8).double(),), {}, TypeError, "x has dtype float64; expected one of"),
    ((_x(2, 8).long(),), {}, TypeError, "x has dtype int64; expected one of"),
    ((_x(),), {}, ValueError, "x is a scalar"),
    ((_x(2, 8),), {"granularity": "block"}, ValueError, "granularity='block'; expected 'token'"),
    ((_x(2, 8),), {"granularity": "group"}, ValueError, "granularity='group' with group_size=None"),
    ((_x(2, 8),), {"group_size": 4}, ValueError, "granularity='token' with group_size=4"),
    (
        (_x(2, 8),),
        {"granularity": "group", "group_size": 3},
        ValueError,
        "K=8 is not a multiple of group_size=3",
    ),
    ((_x(2, 8),), {"granularity": "group", "group_size": 0}, ValueError, "group_size=0"),
    ((_x(2, 8),), {"granularity": "group", "group_size": -4}, ValueError, "group_size=-4"),
    ((_x(2, 8),), {"rounding": "up"}, ValueError, "rounding='up'; expected 'nearest'"),
    ((_x(2, 8),), {"seed": 3}, ValueError, "seed=3 has no meaning with rounding='nearest'"),
    ((_x(2, 8),), {"rounding": "stochastic", "seed": 2**63}, ValueError, f"seed={2**63} does not"),
    ((_x(2, 8), None, _x()), {}, ValueError, "zero is given without a scale"),
    ((_x(2, 8), _x(3)), {}, ValueError, "scale has shape (3,); expected (2, 1) or a scalar"),
    ((_x(2, 8), _x(2, 8)), {}, ValueError, "scale has shape (2, 8); expected (2, 1)"),
    ((_x(2, 8), _x(2), _x(3)), {}, ValueError, "zero has shape (3,); expected (2, 1)"),
    ((_x(2, 8), _x(2), _x(2).bool()), {}, TypeError, "zero has dtype bool"),
    ((_x(2, 8), _x(2).long()), {}, TypeError, "scale has dtype int64"),
    (
        (_x(2, 8), _x(2)),
        {"granularity": "group", "group_size": 4},
        ValueError,
        "scale has shape (2,); expected (2, 2)",
    ),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), _ILLEGAL)
@each_width
def test_illegal_arguments_are_refused_alike_everywhere(
    bits: int,
    args: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    device: str,
) -> None:
    def said(move: Callable[[Tensor], Tensor]) -> str:
        with pytest.raises(error) as caught:
            BITS[bits](*(a if a is None else move(a) for a in args), **options)
        assert type(caught.value) is error
        return str(caught.value)

    text = said(lambda t: t.to(device))
    assert text.startswith(f"quantize_int{bits}: ")
    assert message in text
    assert said(lambda t: t.to("meta")) == text
    with FakeTensorMode() as mode:
        assert said(mode.from_tensor) == text


def test_a_scale_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="quantize_int8: scale is on meta, the input on cpu"):
        quantize_int8(_x(2, 8), _x(2).to("meta"))


def test_bits_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="bits=5; expected 4 or 8"):
        torch.ops.intlass.quantize_dynamic(_x(2, 8), 5, "token", None, True, None)


@each_width
def test_going_backward_through_the_rounding_is_refused(bits: int, device: str) -> None:
    x = random(2, 8).to(device).requires_grad_()
    _, scale, _ = BITS[bits](x)
    with pytest.raises(RuntimeError, match=r"quantize_int4: rounding has no gradient .* detach x"):
        scale.sum().backward()
