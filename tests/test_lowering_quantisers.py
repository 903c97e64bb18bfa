"""A norm or a gated activation before our quantiser is fused with it: the codes stay equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowering_helpers import Counting, fresh
from torch import Tensor, nn
from torch.nn import functional

from intlass_ops import lowering, quantize_int4, quantize_int8

K = 64


def silu_mul(x: Tensor, w: Tensor) -> Tensor:
    return functional.silu(x) * x.flip(-1)


def mul_silu(x: Tensor, w: Tensor) -> Tensor:
    return x.flip(-1) * functional.silu(x)


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(x, (K,), w, 1e-5)


def rms_norm_by_hand(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    return (wide * w.float()).to(x.dtype)


def norm_rounded_twice(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return w * wide.to(x.dtype)


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return functional.layer_norm(x, (K,), w)


def norm_over_tokens(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + 1e-5)).to(x.dtype)


def silu_in_float(x: Tensor, w: Tensor) -> Tensor:
    return (functional.silu(x.float()) * x.flip(-1).float()).to(x.dtype)


def norm_rounded_first(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide.to(x.dtype) * w.float()).to(x.dtype)


def norm_before_wide_weight(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide.to(x.dtype) * (w.float() + 0.1)).to(x.dtype)


def whole_rms(g: torch.Generator) -> Tensor:
    """Rows [5, K] whose mean square is 2^22, eps or not: some CPUs' torch.rsqrt rounds the last bit
    of other roots another way than 1 / sqrt, which the op takes."""
    squares_of_32 = torch.tensor([5.0, 2, 1, 1, 1, 0, 0, 0]).repeat(5, K // 8)
    places = torch.rand(5, K, generator=g).argsort(-1)
    signs = 2.0 * torch.randint(0, 2, (5, K), generator=g) - 1
    return 1024 * signs * squares_of_32.gather(-1, places)


FUSED = [silu_mul, mul_silu, rms_norm, rms_norm_by_hand, norm_rounded_twice, norm_rounded_first]
LEFT = [norm_before_wide_weight, layer_norm, norm_over_tokens, silu_in_float]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("before", [*FUSED, *LEFT])
def test_codes_are_those_of_the_two_steps(
    before: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    x = (whole_rms(g) if "norm" in before.__name__ else torch.randn(5, K, generator=g)).to(dtype)
    w = (torch.rand(K, generator=g) + 0.5).to(dtype)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return quantize_int8(before(x, w))[:2] + quantize_int4(before(2 * x, w), symmetric=False)

    backend = Counting()
    with fresh(), torch.no_grad():
        found = torch.compile(step, backend=backend, fullgraph=True)(x)
    for got, want in zip(found, step(x), strict=True):
        assert torch.equal(got, want)
    # In fp32 nothing is rounded on the way: every order of the same steps is the same.
    fused = before in FUSED or (dtype == torch.float32 and before in (LEFT[0], LEFT[3]))
    assert lowering.counters()["quantisers"] == (2 if fused else 0)


def test_what_others_need_too_is_not_computed_twice() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = silu_mul(x, x)
            return quantize_int8(y)[0], y + 1

    x = torch.randn(5, K).bfloat16()
    with fresh(), torch.no_grad():
        codes, y = torch.compile(Both(), backend=Counting(), fullgraph=True)(x)
        assert torch.equal(codes, Both()(x)[0])
        assert torch.equal(y, Both()(x)[1])
    assert lowering.counters()["quantisers"] == 0
