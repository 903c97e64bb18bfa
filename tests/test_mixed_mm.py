"""mixed_mm: both directions on one packed buffer, their gradients, and its refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from intlass_ops import config, mixed_mm, pack_int4, unpack_int4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def weight(
    n: int, k: int, g: int, signed: bool, dtype: torch.dtype, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(packed [N, K/2], scales [K/g, N], zeros, dense float64 [K, N])."""
    rng = torch.Generator().manual_seed(n + k)
    low = -8 if signed else 0
    q = torch.randint(low, low + 16, (n, k), generator=rng)
    s = torch.exp2(torch.randint(-2, 2, (k // g, n), generator=rng).float()).to(dtype)
    z = None if signed else torch.randint(0, 16, (k // g, n), generator=rng).to(dtype)
    if not exact:
        s = (torch.rand(k // g, n, generator=rng) + 0.5).to(dtype)
        z = None if z is None else z + 0.5
    wide = q.T.double()
    if z is not None:
        wide = wide - z.double().repeat_interleave(g, 0)
    return pack_int4(q), s, z, wide * s.double().repeat_interleave(g, 0)


SHAPES = [
    (1, 24, 64, 16),
    (16, 200, 256, 64),
    (33, 96, 128, 128),
    (130, 72, 192, 32),
    (60, 1160, 512, 256),
    (300, 392, 288, 32),
]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("signed", [True, False])
def test_both_directions_are_exact_on_integers(
    dtype: torch.dtype, signed: bool, device: str
) -> None:
    for m, n, k, g in SHAPES:
        packed, s, z, w = weight(n, k, g, signed, dtype, exact=True)
        rest = s.to(device), None if z is None else z.to(device), g
        for transposed in (False, True):
            width = n if transposed else k
            a = torch.randint(-1, 2, (m, width), generator=torch.Generator().manual_seed(m))
            expected = a.double() @ (w.T if transposed else w)
            for b in (packed.T, packed.T.contiguous()):
                y = mixed_mm(a.to(device, dtype), b.to(device), *rest, transposed=transposed)
                assert y.dtype == dtype
                assert torch.equal(y.cpu(), expected.to(FP32).to(dtype)), (m, n, k, g, transposed)


@pytest.mark.parametrize("m", [3, 60, 100])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_transposed_takes_any_layout(m: int, dtype: torch.dtype, device: str) -> None:
    """Parameters in rows, columns or one for all; zeros of other types; rows of x unaligned."""
    n, k, g = 264, 320, 32
    packed, s, z, _ = weight(n, k, g, False, dtype, exact=True)
    assert z is not None
    scales: tuple[Tensor, ...] = (s.T, s.T.contiguous(), s[0], s[0, 0], s.T.float())
    zeros = (z.T, z.T.contiguous().to(torch.uint8), z[0].to(torch.int32), z[0, 0], None)
    wide = torch.randint(-1, 2, (m, n + 9), generator=torch.Generator().manual_seed(m))
    wide = wide.to(device, dtype)
    repeated = wide[:1, 8 : n + 8].expand(m, n)
    inputs = wide[:, 9:], wide[:, 8 : n + 8], wide.T.contiguous()[:n].T, repeated
    q = unpack_int4(packed, k, signed=False).double()
    pairs = [(scales[i], zeros[(i + j) % 5]) for i in range(5) for j in (0, 2)]
    pairs += [(s.T, z[0]), (s[0], z.T)]  # of groups, and of rows
    for (scale, zero), x in itertools.product(pairs, inputs):
        codes = q - 16 * (q > 7) if zero is None else q - _spread(zero, n, k)
        expected = 2 * x.cpu().double() @ (codes * _spread(scale, n, k))
        op = torch.ops.intlass.matmul_int4_nn
        rest = (packed, scale, zero, k, torch.tensor(2.0))
        y = op(x, *(t.to(device) if isinstance(t, Tensor) else t for t in rest))
        assert torch.equal(y.cpu(), expected.to(FP32).to(dtype)), (scale.shape, zero, x.stride())


def _spread(t: Tensor, n: int, k: int) -> Tensor:
    """Parameters of groups as one for each weight."""
    t = t.double()
    return (
        (t if t.dim() == 2 else t.reshape(-1, 1))
        .repeat_interleave(k // (t.shape[1] if t.dim() == 2 else 1), 1)
        .expand(n, k)
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_goes_the_other_way_on_the_same_buffer(transposed: bool, device: str) -> None:
    m, n, k, g = 20, 96, 128, 32
    packed, s, z, w = weight(n, k, g, False, FP32)
    w = w.T if transposed else w
    a = torch.randn(m, w.shape[0], device=device, requires_grad=True)
    y = mixed_mm(a, packed.T.to(device), s.to(device), z.to(device), g, transposed)  # type: ignore[union-attr]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    y.backward(grad.to(device))
    assert a.grad is not None
    rows = a.detach().cpu().double()
    assert_close(y.detach().cpu(), rows @ w, rows.abs() @ w.abs())
    assert_close(a.grad.cpu(), grad.double() @ w.T, grad.double().abs() @ w.abs().T)


def test_adapters_train_on_a_quantised_base(device: str) -> None:
    """QLoRA: before and beside a frozen product, layers learn as if the product were dense."""
    packed, s, z, w = weight(24, 32, 16, False, FP32)
    rest = packed.T.to(device), s.to(device), None if z is None else z.to(device), 16
    dense = w.float().to(device)
    x, wanted = torch.randn(16, 8, device=device), torch.randn(16, 24, device=device)

    def losses(base: Callable[[Tensor], Tensor]) -> list[float]:
        torch.manual_seed(0)
        shapes = (8, 32), (32, 4), (4, 24)
        before, a, b = parameters = [torch.nn.Parameter(torch.randn(n).to(device)) for n in shapes]
        optimiser = torch.optim.Adam(parameters, 0.1)
        found = []
        for _ in range(10):
            h = x @ before
            loss = (base(h) + h @ a @ b - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found

    ours, dense_ones = losses(lambda h: mixed_mm(h, *rest)), losses(lambda h: h @ dense)
    assert ours == pytest.approx(dense_ones, rel=1e-3)
    assert ours[-1] < 0.7 * ours[0]


def test_vmap_is_one_more_dimension(device: str) -> None:
    packed, s, _, _ = weight(24, 32, 16, True, FP32)
    rest = packed.to(device), s.T.to(device), None, 32
    x = torch.randn(3, 5, 24, device=device)
    op = torch.ops.intlass.matmul_int4_nn
    batched = torch.func.vmap(lambda x: op(x, *rest), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(batched, op(x, *rest))


def test_numerical_gradient() -> None:
    packed, s, z, _ = weight(16, 32, 16, False, FP32)
    a = torch.randn(3, 32, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a: mixed_mm(a, packed.T, s, z, 16), a, eps=1e-1, atol=2e-2, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(4, 4)}, "mixed_mm: b is torch.float32"),
        ({"group_size": 24}, "mixed_mm: K=32 is not a multiple of group_size=24"),
        ({"scales": torch.ones(3, 8)}, r"mixed_mm: scales is \(3, 8\); expected \(2, 8\)"),
        ({"a": torch.zeros(2, 8)}, r"mixed_mm: a is \(2, 8\); expected \[..., K=32\]"),
        ({"transposed": True}, r"mixed_mm: a is \(2, 32\); expected \[..., N=8\]"),
        ({"a": torch.zeros(2, 32, dtype=torch.int8)}, "mixed_mm: a has dtype int8"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = {
        "a": torch.zeros(2, 32),
        "b": torch.zeros(16, 8, dtype=torch.uint8),
        "scales": torch.ones(2, 8),
        "zeros": None,
        "group_size": 16,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        mixed_mm(**(args | change))


def test_few_tokens_have_a_kernel_that_fits() -> None:
    for arch, m in itertools.product(config.ARCHS, (1, 16, 33, config.TRANSPOSED_MAX_M)):
        gpu = config.device_of(arch)
        c = config.pick_transposed(gpu, "bf16", True, True, m, 4104, 4096)
        x, y, stripes = c.grid(m, 4104, 4096, gpu.sm_count)
        assert c.cluster in (1, stripes)
        assert c.smem_bytes <= gpu.smem_per_block
        assert x * 64 >= 4096
        assert y * c.tokens >= m
        assert x * y * stripes <= max(gpu.sm_count, x * y)
    many = config.TRANSPOSED_MAX_M + 1
    assert config.why_not_transposed(1, 4096, 4096, True, True) is None
    assert "dequantising once" in str(config.why_not_transposed(many, 4096, 4096, True, True))
    for n, k, aligned in ((4100, 4096, True), (4096, 4100, True), (4096, 4096, False)):
        assert "multiple of 8" in str(config.why_not_transposed(1, n, k, True, aligned))


def test_many_tokens_have_a_kernel_that_fits() -> None:
    gpu = config.device_of("sm_90a")
    groups = (96, 96), (96, 32), (4096, 32), (4096, 64), (14336, 128), (4096, 1024)
    for m, (k, g) in itertools.product((9, 17, 64, 65, 1024), groups):
        assert config.why_not_transposed_wgmma(gpu, m, 4104, k, g, True) is None
        c = config.pick_transposed_wgmma(gpu, "bf16", True, m, 4104, k, g)
        x, y, _ = c.grid(m, k)
        assert c.smem_bytes * c.blocks_per_sm <= gpu.smem_per_sm - 1024 * c.blocks_per_sm
        assert x // c.split_n * 128 >= k
        assert y * c.block_m >= m
        assert c.groups * g >= 128 or c.groups == 1
    why_not = config.why_not_transposed_wgmma
    assert "no wgmma" in str(why_not(config.device_of("sm_80"), 64, 4096, 4096, 128, True))
    assert "M=8" in str(why_not(gpu, 8, 4096, 4096, 128, True))
    assert "nothing" in str(why_not(gpu, 64, 4096, 0, 0, True))
    assert "group_size=96" in str(why_not(gpu, 64, 4096, 9600, 96, True))
    for n, k, aligned in ((4100, 4096, True), (4096, 4112, True), (4096, 4096, False)):
        assert "multiple of 32" in str(why_not(gpu, 64, n, k, 128, aligned))
