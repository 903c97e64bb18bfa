"""An activation or a residual that follows a swapped linear becomes a part of its GEMM, and nothing
else does: not what somebody else reads, what siblings are joined for, or what a quantiser takes in.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowering_helpers import Counting, fresh, outcomes
from torch import Tensor, nn
from torch.nn import functional

from intlass_ops import (
    Int4WeightOnly,
    Int8DynamicActivationInt8Weight,
    Int8WeightOnly,
    explain,
    lowering,
    quantize_,
)

K, N = 64, 32
BF16 = torch.bfloat16
Activation = Callable[[Tensor], Tensor]


def gelu_by_hand(v: Tensor) -> Tensor:
    """As GPT-2 has it: every step rounds in bf16."""
    return 0.5 * v * (1.0 + torch.tanh(0.7978845608 * (v + 0.044715 * torch.pow(v, 3.0))))


def silu_by_sigmoid(v: Tensor) -> Tensor:
    return torch.sigmoid(v) * v


def gelu_tanh(v: Tensor) -> Tensor:
    return functional.gelu(v, approximate="tanh")


TAKEN: dict[Activation, str] = {
    functional.relu: "relu",
    functional.silu: "silu",
    silu_by_sigmoid: "silu",
    functional.gelu: "gelu",
    gelu_tanh: "gelu_tanh",
    gelu_by_hand: "gelu_tanh",
}


def quick_gelu(v: Tensor) -> Tensor:
    return v * torch.sigmoid(1.702 * v)


def read_twice(v: Tensor) -> Tensor:
    return functional.gelu(v) + v.flip(-1)


def in_float32(v: Tensor) -> Tensor:
    return functional.silu(v.float())


def of_two(v: Tensor) -> Tensor:
    return functional.silu(v) * v


LEFT = (quick_gelu, read_twice, in_float32, of_two, functional.elu, functional.hardswish)


class Grouped(nn.Module):
    """A linear of a library's spelling, packed from its leaves when it runs."""

    def __init__(self, n: int = N) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer(
            "q", torch.randint(-7, 8, (n, 2, K // 2), generator=g, dtype=torch.int8)
        )
        self.register_buffer("s", (0.05 * torch.rand(n, 2, 1, generator=g) + 0.01).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        w = (self.q.to(x.dtype) * self.s.to(x.dtype)).view(-1, K)
        return functional.linear(x.reshape(-1, K), w).view(*x.shape[:-1], len(w))


class Then(nn.Module):
    def __init__(self, linear: nn.Module, after: Activation) -> None:
        super().__init__()
        self.linear, self.after = linear, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x))


def own(dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(K, N)).to(dtype)
    quantize_(layer, Int8WeightOnly())
    return layer[0]


def activations(*lead: int, dtype: torch.dtype = BF16) -> Tensor:
    return 2 * torch.randn(*lead, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def compiled(module: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """The result of the rewritten graph, and the text of the graph."""
    backend = Counting()
    with torch.no_grad():
        y = torch.compile(module, backend=backend, fullgraph=True)(x)
    return y, backend.graphs[-1].code


@pytest.mark.parametrize(
    ("make", "dtype", "after"),
    [
        *((own, BF16, after) for after in TAKEN),
        (Grouped, torch.float32, functional.gelu),
        (Grouped, BF16, gelu_by_hand),
    ],
)
def test_an_activation_is_taken(
    make: Callable[..., nn.Module], dtype: torch.dtype, after: Activation
) -> None:
    linear = make(dtype) if make is own else make()
    module, x = Then(linear, after), activations(2, 3, dtype=dtype)
    with fresh():
        y, code = compiled(module, x)
        assert lowering.counters()["epilogues"] == 1
        assert f"activation = '{TAKEN[after]}'" in code
        assert outcomes() == ["swapped"]
        (decision,) = lowering.report()
    assert decision.reason.endswith(f"{TAKEN[after]} in its epilogue")
    assert decision.shape == (N, K)
    with torch.no_grad():
        w = linear(torch.eye(K, dtype=dtype)) - linear(torch.zeros(1, K, dtype=dtype))
        magnitude = x.abs().double() @ w.abs().double() + 1
        assert decision.bound is not None
        error = (y.double() - module(x).double()).abs()
    assert y.dtype == dtype
    assert bool((error <= decision.bound * magnitude).all())


@pytest.mark.parametrize("after", LEFT)
def test_what_is_no_activation_of_ours_alone_stays(after: Activation) -> None:
    module, x = Then(own(), after), activations(5)
    with fresh():
        y, code = compiled(module, x)
        assert lowering.counters()["epilogues"] == 0
    assert "activation" not in code
    with torch.no_grad():
        assert y.dtype == module(x).dtype
        assert torch.allclose(y.float(), module(x).float(), atol=0.05, rtol=0.05)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)
        self.down = nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("a_bits", [16, 8])
def test_siblings_and_quantisers_come_first(a_bits: int) -> None:
    module = SwiGLU().to(BF16)
    quantize_(module, Int8DynamicActivationInt8Weight() if a_bits == 8 else Int4WeightOnly(32))
    with fresh():
        compiled(module, activations(5))
        counters = lowering.counters()
    assert counters["joined"] == 1
    assert counters["quantisers"] == (a_bits == 8)
    assert counters["epilogues"] == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(K, K), nn.Linear(K, K)
        self.norm = nn.RMSNorm(K, 1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.one(x)
        return x, self.two(self.norm(x))


@pytest.mark.parametrize("quantised", [True, False])
def test_a_residual_is_taken_before_our_norm_alone(quantised: bool) -> None:
    """Elsewhere the addition costs nothing, and would only cost the GEMM."""
    module, x = Block().to(BF16), activations(2, 3)
    quantize_(module, Int8DynamicActivationInt8Weight() if quantised else Int8WeightOnly())
    with fresh():
        y, code = compiled(module, x)
        assert lowering.counters()["epilogues"] == quantised
    assert ("residual = " in code) == quantised
    with torch.no_grad():
        expected = module(x)
    assert (y[0] - expected[0]).abs().max() <= 2**-7 * expected[0].abs().max()
    assert (y[1] - expected[1]).abs().max() <= 0.05 * expected[1].abs().max()


class PackedBlock(Block):
    """Sizes of the views after a packed linear, and the residual, are symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Grouped(K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.silu(self.one(x)) + x
        return x, self.two(self.norm(x))


@pytest.mark.parametrize("dynamic", [True, False])
def test_views_between_a_linear_and_what_follows(dynamic: bool) -> None:
    module, x = PackedBlock().to(BF16), activations(2, 3)
    quantize_(module, Int8DynamicActivationInt8Weight())
    backend = Counting()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(x)
        assert lowering.counters()["epilogues"] == 2
        assert len(lowering.report()) == 1
        assert lowering.report()[0].reason.endswith(
            "silu in its epilogue; a residual in its epilogue"
        )
        expected = module(x)
    for got, want in zip(y, expected, strict=True):
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


def test_training_graphs_keep_their_activations() -> None:
    """The backward pass needs what is before it."""
    module, x = Then(own(), functional.gelu), activations(5).requires_grad_()
    with fresh():
        y = torch.compile(module, backend=Counting(), fullgraph=True)(x)
        y.sum().backward()
        assert lowering.counters().get("epilogues", 0) == 0
    assert x.grad is not None


def test_explain_tells_and_inductor_runs_it(device: str) -> None:
    module, x = Then(own(), functional.gelu).to(device), activations(5).to(device)
    with fresh(), torch.no_grad():
        report = explain(torch.compile(module, backend=lowering.backend), x)
        assert torch.allclose(report.result, module(x), atol=0.02, rtol=0.02)
    assert "gelu in its epilogue" in str(report)
    assert device == "cpu" or " gelu" in report.dispatches[0].kernel
