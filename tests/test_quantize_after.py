"""rms_norm_quantize and silu_mul_quantize: the codes of the two steps in turn, in one kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import intlass_ops as ia
from intlass_ops import config, ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [{"bits": bits, "symmetric": symmetric} for bits in (8, 4) for symmetric in (True, False)]


def quantize(y: Tensor, bits: int, symmetric: bool) -> Any:
    return (ia.quantize_int8 if bits == 8 else ia.quantize_int4)(y, symmetric=symmetric)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, first: bool = False) -> Tensor:
    v = x.float()
    y = v * (1 / (v.square().mean(-1, keepdim=True) + eps).sqrt())
    y = y.to(x.dtype).float() if first else y
    return (y if weight is None else y * weight.float()).to(x.dtype)


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def integers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """So small that sums of their squares are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 7, 64, 1000, 4096, 70000])
def test_norm_is_the_two_steps_in_turn(k: int, dtype: torch.dtype, device: str) -> None:
    x = integers(2, 3, k, dtype=dtype, device=device)
    weight = integers(k, dtype=dtype, device=device, seed=1) / 4
    for options, (w, first) in itertools.product(
        OPTIONS, ((weight, False), (weight, True), (None, False))
    ):
        # on the CPU: on a GPU, PyTorch's mean multiplies by 1 / K, which rounds twice
        normed = rms_norm(x.cpu(), None if w is None else w.cpu(), 0.5, first=first).to(device)
        expected = quantize(normed, **options)
        assert_same(ops.rms_norm_quantize(x, w, 0.5, round_first=first, **options), expected)


def test_norm_is_that_of_pytorch(device: str) -> None:
    x = torch.randn(5, 256, device=device)
    weight = torch.randn(256, device=device)
    q, scale, _ = ops.rms_norm_quantize(x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x, (256,), weight, 1e-5)
    assert ((q * scale - expected).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 9, 64, 4096])
def test_silu_is_the_two_steps_in_turn(k: int, dtype: torch.dtype, device: str) -> None:
    """Also of two halves of a tensor, whose rows do not follow each other."""
    both = torch.randn(2, 3, 2 * k, generator=torch.Generator().manual_seed(0))
    halves = both.to(device, dtype).chunk(2, -1)
    whole = [half.contiguous() for half in halves]
    for options, (gate, up) in itertools.product(OPTIONS, (halves, whole)):
        expected = quantize(torch.nn.functional.silu(gate) * up, **options)
        got = ops.silu_mul_quantize(gate, up, **options)
        if device == "cpu":
            assert_same(got, expected)
            continue
        # PyTorch's exp may round another way: now and then the largest product, or a code, moves.
        torch.testing.assert_close(got[1], expected[1], rtol=2**-7, atol=0)
        assert (got[0] != expected[0]).sum() <= 2 + got[0].numel() // 100


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("m", "k"), [(1200, 1000), (1200, 5120), (700, 14336), (3, 14336)])
def test_codes_do_not_depend_on_how_many_rows_there_are(m: int, k: int, bits: int) -> None:
    """Blocks load ahead if there are many rows, and share a long one if there are few."""
    dtype, options = (
        (torch.bfloat16, torch.float16)[bits // 8],
        {"bits": bits, "symmetric": bits == 8},
    )
    x = integers(m, k, dtype=dtype, device="cuda") / 2
    other = integers(m, k, dtype=dtype, device="cuda", seed=1)
    weight = other[0].clone()
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "none": lambda x, _: quantize(x, **options),
        "norm": lambda x, _: ops.rms_norm_quantize(x, weight, 1.0, **options),
        "rounded": lambda x, _: ops.rms_norm_quantize(x, weight, 1.0, round_first=True, **options),
        "silu": lambda x, y: ops.silu_mul_quantize(x, y, **options),
    }
    for name, call in calls.items():
        whole = call(x, other)
        for first in (0, m - 2):
            rows = torch.arange(100, device="cuda").clamp(max=1) + first  # neither few nor many
            for a, b in zip(call(x[rows], other[rows]), whole, strict=True):
                assert a is None or torch.equal(a, b[rows]), (name, first)


@settings(max_examples=200)
@given(
    arch=st.sampled_from(config.ARCHS),
    x_type=st.sampled_from(["__nv_bfloat16", "float"]),
    vector=st.sampled_from([8, 2]),
    segments=st.sampled_from([1, 50, 600, 100_000]),
    length=st.integers(1, 100_000),
    before=st.sampled_from(list(config.Before)),
)
def test_every_row_has_a_configuration_that_fits(
    arch: str, x_type: str, vector: int, segments: int, length: int, before: config.Before
) -> None:
    device = config.device_of(arch)
    c = config.pick_quantize(
        device, x_type, 8, True, False, vector, segments, length, before=before
    )
    vectors, at_a_time = -(-length // vector), c.threads_per_segment * c.cluster
    if c.chunks:  # all but the last are full: the kernel asks for that one only
        assert (c.chunks - 1) * at_a_time < vectors <= c.chunks * at_a_time
    assert c.threads % c.threads_per_segment == 0
    assert c.threads <= 1024
    assert c.smem_bytes + 1024 <= device.smem_per_block
    assert c.blocks_per_sm * (c.smem_bytes + 1024) <= device.smem_per_sm
    assert c.blocks_per_sm * c.threads <= 1536


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 8])
def test_silu_of_every_bf16_is_that_of_pytorch(k: int) -> None:
    """The kernel has a shorter formula for them, which rounds to the same values."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
    x = x[:, None].repeat(1, k).cuda()
    _, scale, _ = ops.silu_mul_quantize(x, torch.ones_like(x))
    expected = quantize(torch.nn.functional.silu(x), 8, True)[1]
    torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_at_uneven_distances(device: str) -> None:
    x = integers(4, 3, 64, dtype=torch.bfloat16, device=device).transpose(0, 1)
    assert_same(ops.rms_norm_quantize(x, None, 1.0), quantize(rms_norm(x, None, 1.0), 8, True))
    whole = x.contiguous()
    assert_same(ops.silu_mul_quantize(x, x), ops.silu_mul_quantize(whole, whole))


def test_no_tokens(device: str) -> None:
    x = torch.empty(0, 64, device=device)
    q, scale, zero = ops.rms_norm_quantize(x)
    assert (q.shape, scale.shape, zero) == ((0, 64), (0, 1), None)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: ops.rms_norm_quantize(x.int()), TypeError, "x has dtype int32"),
        (lambda x: ops.rms_norm_quantize(x, x[0, :3]), ValueError, r"\(3,\); expected \(8,\)"),
        (lambda x: ops.rms_norm_quantize(x, x[0].double()), TypeError, "weight has dtype"),
        (lambda x: ops.rms_norm_quantize(x, bits=5), ValueError, "bits=5"),
        (lambda x: ops.silu_mul_quantize(x, x[:1]), ValueError, r"up has shape \(1, 8\)"),
        (lambda x: ops.silu_mul_quantize(x[0, 0], x[0, 0]), ValueError, "scalar"),
    ],
)
def test_refusals(call: Any, error: type[Exception], said: str, device: str) -> None:
    with pytest.raises(error, match=said):
        call(torch.zeros(2, 8, device=device))


def test_rounding_has_no_gradient() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    for q in (ops.rms_norm_quantize(x), ops.silu_mul_quantize(x, x)):
        with pytest.raises(RuntimeError, match="no gradient"):
            q[1].sum().backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    opcheck(torch.ops.intlass.rms_norm_quantize.default, (x, weight, 1e-6, bits, bits == 8))
    opcheck(torch.ops.intlass.silu_mul_quantize.default, (x, x + 1, bits, bits == 8))
