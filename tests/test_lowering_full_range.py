"""Quantisers in graphs that are `quantize_int8(full_range=True)` bit for bit, and others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_helpers import SWAPPED, Counting, cuda_trace, fresh, outcomes
from strategies import FLOATS
from torch import Tensor, nn
from torch.nn import functional

from intlass_ops import IntLinear, explain, lowering, prepare_, quantize_int8

EPS = 2.0**-23
N, K = 16, 96
Quantiser = Callable[[Tensor], tuple[Tensor, Tensor]]
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def spelled(
    levels: float = 127.5,
    eps: float | None = EPS,
    low: int = -128,
    high: int = 127,
    largest: Callable[[Tensor], Tensor] = lambda x: x.abs().amax(-1, keepdim=True),
    of_scale: Callable[[Tensor], Tensor] = lambda s: s,
    quotient: Callable[[Tensor, Tensor], Tensor] = lambda x, s: x * (1.0 / s),
    rounded: Callable[[Tensor], Tensor] = torch.round,
) -> Quantiser:
    def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = largest(x) / levels
        scale = of_scale(scale if eps is None else scale.clamp(min=eps))
        codes = rounded(quotient(x, scale.float())).clamp(low, high)
        return codes.to(torch.int8), scale.float()

    return quantise


def torchao(x: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(x[..., :1])
    least = torch.minimum(x.amin(-1, keepdim=True), zero)
    most = torch.maximum(x.amax(-1, keepdim=True), zero)
    scale = (torch.maximum(-least, most) / 127.5).float().clamp(min=EPS).to(x.dtype).float()
    codes = torch.round(x * (1.0 / scale)) + zero.to(torch.int8)
    return codes.clamp(-128, 127).to(torch.int8), scale


class Linear(nn.Module):
    """codes @ q.T, times both scales."""

    def __init__(
        self, quantise: Quantiser, before: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        self.quantise, self.before = quantise, before
        self.in_features, self.out_features = K, N
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("q", torch.randint(-9, 9, (N, K), generator=generator).char())
        self.register_buffer("s", torch.rand(N, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.quantise(self.before(x))
        y = torch._int_mm(codes.reshape(-1, K), self.q.t())
        y = y.float() * scale.reshape(-1, 1) * self.s
        return y.to(x.dtype).reshape(*x.shape[:-1], N)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def is_recognised(linear: nn.Module, x: Tensor, **options: Any) -> bool:
    with fresh(), torch.no_grad():
        torch.compile(linear, backend=Counting(), fullgraph=True, **options)(x)
        assert outcomes() == [SWAPPED]
        (decision,) = lowering.report()
    return "full_range" in decision.reason


def by_index(x: Tensor) -> Tensor:
    return x.abs().max(dim=-1, keepdim=True).values


SAME = {
    "torchao": torchao,
    "plain": spelled(),
    "max": spelled(largest=by_index),
    "reciprocal": spelled(quotient=lambda x, s: x * s.reciprocal()),
    "constant": spelled(of_scale=lambda s: torch.maximum(s, torch.tensor(EPS, dtype=s.dtype))),
    "both ends": spelled(
        largest=lambda x: torch.maximum(-x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    ),
}
OTHER = {
    "127": spelled(levels=127.0),
    "128": spelled(levels=128.0),
    "127.6": spelled(levels=127.6),
    "no eps": spelled(eps=None),
    "larger eps": spelled(eps=2 * EPS),
    "smaller eps": spelled(eps=EPS / 2),
    "-127": spelled(low=-127),
    "126": spelled(high=126),
    "quotient": spelled(quotient=lambda x, s: x / s),
    "up": spelled(rounded=lambda v: torch.floor(v + 0.5).round()),
    "away": spelled(rounded=lambda v: torch.trunc(v).round()),
    "one scale in all": spelled(largest=lambda x: x.abs().amax().expand(*x.shape[:-1], 1)),
    "positive": spelled(largest=lambda x: x.amax(-1, keepdim=True)),
    "without the first": spelled(largest=lambda x: x[..., 1:].abs().amax(-1, keepdim=True)),
    "powers of two": spelled(of_scale=lambda s: torch.exp2(torch.ceil(torch.log2(s)))),
    "bounded": spelled(of_scale=lambda s: s.clamp(max=1e4)),
    "nudged": spelled(of_scale=lambda s: s * 1.01),
    "codes and 1": spelled(rounded=lambda v: torch.round(v) + 1),
    "other codes": spelled(quotient=lambda x, s: (x + 0.01) * (1.0 / s)),
}


@pytest.mark.parametrize("name", SAME)
@each_dtype
def test_same_codes_are_recognised(name: str, dtype: torch.dtype, device: str) -> None:
    linear, x = Linear(SAME[name]).to(device), numbers(20, dtype=dtype).to(device)
    assert is_recognised(linear, x)
    of_any_size = numbers(2, 10, dtype=dtype).to(device)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(of_any_size, dim)
    assert is_recognised(linear, of_any_size)
    found = quantize_int8(x, full_range=True)
    assert all(torch.equal(a, b) for a, b in zip(found, linear.quantise(x), strict=False))


@pytest.mark.parametrize("name", OTHER)
@each_dtype
def test_other_codes_stay_the_graphs(name: str, dtype: torch.dtype, device: str) -> None:
    assert not is_recognised(Linear(OTHER[name]).to(device), numbers(20, dtype=dtype).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings_are_told_apart(dtype: torch.dtype) -> None:
    wide = spelled(largest=lambda x: x.float().abs().amax(-1, keepdim=True))
    narrow = spelled(quotient=lambda x, s: x * (1.0 / s).to(x.dtype))
    for quantise in (wide, narrow):
        assert not is_recognised(Linear(quantise), numbers(20, dtype=dtype))


def test_one_row_of_a_fixed_number() -> None:
    """Each of the rows that tell quantisers apart is tried alone."""
    x = numbers(1, dtype=torch.bfloat16)
    assert is_recognised(Linear(torchao), x, dynamic=False)
    for quantise in OTHER.values():
        one_for_all = quantise is OTHER["one scale in all"]
        assert is_recognised(Linear(quantise), x, dynamic=False) == one_for_all


@each_dtype
def test_results_are_those_of_the_graph(dtype: torch.dtype, device: str) -> None:
    linear, x = Linear(torchao).to(device), numbers(2, 12, dtype=dtype).to(device)
    x[0, 3, 5], x[1, 2, 7] = torch.nan, torch.inf
    with fresh(), torch.no_grad():
        y = torch.compile(linear, backend=lowering.backend, fullgraph=True)(x)
        expected = linear(x)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


def swiglu(x: Tensor) -> Tensor:
    return functional.silu(x) * x.flip(-1)


def norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (K,), torch.ones(K, dtype=x.dtype), 1e-5)


@pytest.mark.parametrize("before", [swiglu, norm])
def test_what_comes_before_is_computed_with_it(before: Callable[[Tensor], Tensor]) -> None:
    linear, x = Linear(torchao, before), numbers(20, dtype=torch.bfloat16)
    with fresh(), torch.no_grad():
        torch.compile(linear, backend=Counting(), fullgraph=True)(x)
        assert lowering.counters()["quantisers"] == 1


def test_siblings_share_one_quantiser() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Linear(torchao), Linear(torchao)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    backend, x = Counting(), numbers(20, dtype=torch.bfloat16)
    with fresh(), torch.no_grad():
        torch.compile(Both(), backend=backend, fullgraph=True)(x)
        assert outcomes() == [SWAPPED] * 2
    (graph,) = backend.graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("intlass.quantize_dynamic.default") == 1
    assert not any("amax" in name for name in names)


def test_of_a_gpu_without_one() -> None:
    """The graph of a CUDA model is told by PyTorch's arithmetic on the CPU."""
    graph = cuda_trace(Linear(spelled()), numbers(20, dtype=torch.bfloat16))
    assert any(str(n.target) == "intlass.quantize_dynamic.default" for n in graph.nodes)


@each_dtype
def test_prepared_linears_are_our_own_with_the_same_codes(dtype: torch.dtype, device: str) -> None:
    x = numbers(20, dtype=dtype).to(device)
    model = nn.Sequential(Linear(torchao)).to(device, dtype)
    model[0].s = model[0].s.float()
    with torch.no_grad():
        expected = model(x)
    with fresh(), torch.no_grad():
        (decision,) = prepare_(model)
        assert "full_range" in decision.reason
        (linear,) = model
        assert isinstance(linear, IntLinear)
        assert linear.activation == "int8_full_range"
        torch.testing.assert_close(model(x), expected)
        for same in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert torch.equal(same(x), linear(x))
        compiled = torch.compile(model, backend=lowering.backend, fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        assert "full_range=True" in repr(linear)
    if dtype == torch.bfloat16:
        assert explain(model, x).dispatches[0].scheme == "w8a8"


def test_libraries_codes_are_kept_or_not_as_asked() -> None:
    for same_codes, activation in ((True, "int8_full_range"), (False, "int8")):
        model = nn.Sequential(Linear(torchao))
        with fresh():
            prepare_(model, same_codes=same_codes)
        assert model[0].activation == activation


def test_what_is_between_input_and_quantiser_stays_a_graph() -> None:
    class Smoothed(Linear):
        def __init__(self) -> None:
            super().__init__(torchao)
            self.register_buffer("smooth", torch.rand(K) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.smooth)

    model, x = nn.Sequential(Smoothed()), numbers(2, 10, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
    with fresh(), torch.no_grad():
        prepare_(model)
        assert "quantize_dynamic" in model[0].text
        torch.testing.assert_close(model(x), expected)
        compiled = torch.compile(model, backend=lowering.backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
