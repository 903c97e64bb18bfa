"""Rarer spellings of quantised linears, siblings with biases, caches that look like weights."""

from __future__ import annotations

import copy
from typing import Any

import graph_zoo
import pytest
import rare_zoo
import spelling_zoo
import torch
from lowering_helpers import DECLINED, DENSE, SWAPPED, Counting, fresh, outcomes, relative_error
from torch import Tensor, nn
from torch.nn import functional

import intlass_ops
from intlass_ops import lowering
from intlass_ops.lowering import runtime
from intlass_ops.lowering.program import device_of

SPELLINGS = {**spelling_zoo.SPELLINGS, **rare_zoo.SPELLINGS}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_swapped(name: str) -> None:
    make, schemes = SPELLINGS[name]
    module, x = make()
    reference, backend = copy.deepcopy(module), Counting()
    with fresh(), torch.no_grad():
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        for _ in range(2):
            assert relative_error(compiled(x), reference(x)) < 2e-2
    assert outcomes() == [SWAPPED] * len(schemes), lowering.report()
    assert [decision.scheme for decision in lowering.report()] == schemes
    assert backend.compiles == 1
    assert "run.dense" not in lowering.counters()


def test_siblings_with_biases_become_one_gemm() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = graph_zoo.Int32Words(seed=1), graph_zoo.Int32Words(seed=2)
            self.c = graph_zoo.Int8Asymmetric(seed=3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x), self.c(x)], -1)

    module, x, backend = Three(), torch.randn(5, graph_zoo.K).bfloat16(), Counting()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=backend, fullgraph=True)(x)
        assert relative_error(y, module(x)) < 2e-2
    assert lowering.counters()["fused"] == 2
    # Inductor writes nodes into comments of its Triton kernels.
    assert not [node for node in backend.graphs[0].graph.nodes if "\n" in node.format_node()]


def test_siblings_share_one_activation_quantisation() -> None:
    class Pair(spelling_zoo.Spelled):
        def forward(self, x: Tensor) -> Tensor:
            q, s = spelling_zoo.per_token(x)
            wide = q.float() * s
            gate, up = (spelling_zoo.int4(p, self.s).float() for p in (self.p, self.r))
            y = functional.silu(functional.linear(wide, gate)) * functional.linear(wide, up)
            return y.to(x.dtype)

    shape = (spelling_zoo.N, spelling_zoo.K)
    module = Pair(
        lambda m, x: x,
        p=spelling_zoo.packed4(*shape),
        r=spelling_zoo.packed4(*shape),
        s=spelling_zoo.scales(spelling_zoo.N, 4),
    )
    x, backend = torch.randn(20, spelling_zoo.K).bfloat16(), Counting()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=backend, fullgraph=True)(x)
        assert relative_error(y, module(x)) < 2e-2
    assert lowering.counters()["fused"] == 1
    (graph,) = backend.graphs
    assert len([n for n in graph.graph.nodes if "round" in str(n.target)]) == 1


def test_a_cache_that_is_written_between_calls_is_not_packed_each_time() -> None:
    """int8 keys of a cache look like a weight; packing them for one use is a waste."""
    torch.manual_seed(0)
    keys = torch.randint(-100, 100, (48, 128)).to(torch.int8)
    shift = torch.tensor(3.0, dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        return x @ (keys.to(x.dtype) - shift).t()

    x = torch.randn(3, 128).bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(product, backend=Counting(), fullgraph=True)
        for _ in range(3 * runtime.PATIENCE):
            keys.add_(1)
            assert relative_error(compiled(x), product(x)) < 2e-2
        packed = lowering.counters()["run.packed"]
        assert packed <= runtime.PATIENCE + 1
        for _ in range(3):
            compiled(x)
        assert lowering.counters()["run.packed"] == packed + 1


def test_a_result_divided_by_the_norm_of_its_weight() -> None:
    """Its sum of squares is one of everything, which is no product of a vector."""
    module, x = spelling_zoo.SPELLINGS["one-dimensional x"][0]()
    normed = spelling_zoo.Spelled(
        lambda m, x: functional.linear(x, w := spelling_zoo.int4(m.p, m.s)) / w.float().norm(),
        **dict(module.named_buffers()),
    )
    with fresh(), torch.no_grad():
        y = torch.compile(normed, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, normed(x)) < 2e-2
    assert outcomes() == [SWAPPED]


def test_a_weight_that_depends_on_what_it_multiplies_is_no_weight() -> None:
    """x has a fixed shape, as a closure's codes have; packing for each x would never pay."""
    module, x = spelling_zoo.SPELLINGS["one-dimensional x"][0]()
    gated = spelling_zoo.Spelled(
        lambda m, x: functional.linear(x, spelling_zoo.int4(m.p, m.s) * x.amax()),
        **dict(module.named_buffers()),
    )
    with fresh(), torch.no_grad():
        y = torch.compile(gated, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, gated(x)) < 2e-2
    assert SWAPPED not in outcomes()


def test_experts_that_are_gathered_for_each_token_are_told() -> None:
    def product(m: Any, x: Tensor) -> Tensor:
        chosen = (x @ m.gate).argmax(-1)
        w = (m.w.to(x.dtype) * m.s.unsqueeze(-1))[chosen]
        return torch.einsum("mk,mnk->mn", x, w)

    sizes = (3, spelling_zoo.N, spelling_zoo.K)
    buffers = {"w": spelling_zoo.codes8(*sizes), "s": spelling_zoo.scales(*sizes[:2])}
    gate = torch.randn(spelling_zoo.K, 3).bfloat16()
    module = spelling_zoo.Spelled(product, gate=gate, **buffers)
    x = torch.randn(5, spelling_zoo.K).bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, module(x)) < 2e-2
    assert outcomes() == [DENSE, DECLINED]
    assert "index picks its weight" in lowering.report()[1].reason


def test_a_weight_that_is_unpacked_one_column_after_the_other_is_told() -> None:
    def product(m: Any, x: Tensor) -> Tensor:
        w = torch.zeros(spelling_zoo.N, spelling_zoo.K)
        for k in range(spelling_zoo.K):
            w[:, k] = (m.p[:, k // 2] >> (4 * (k % 2))) & 15
        return functional.linear(x, w.to(x.dtype) * m.s)

    packed = spelling_zoo.packed4(spelling_zoo.N, spelling_zoo.K)
    module = spelling_zoo.Spelled(product, p=packed, s=spelling_zoo.scales(spelling_zoo.N, 1))
    x = torch.randn(5, spelling_zoo.K).bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, module(x)) < 2e-2
    assert outcomes() == [DECLINED]
    assert "more than 400 operations" in lowering.report()[0].reason


def test_a_cache_that_is_written_in_the_graph_is_no_weight_that_an_index_picks() -> None:
    def attend(m: Any, x: Tensor, at: Tensor, pages: Tensor) -> Tensor:
        m.w[at] = x.to(torch.int8)
        return x @ (m.w[pages].to(x.dtype) * m.s).t()

    sizes = (spelling_zoo.N, spelling_zoo.K)
    module = spelling_zoo.Spelled(
        lambda m, x: attend(m, x, x[:, 0].long() % 7, x[:, 1].long() % 7),
        w=spelling_zoo.codes8(*sizes),
        s=spelling_zoo.scales(1),
    )
    x = torch.randint(0, 100, (5, spelling_zoo.K)).bfloat16()
    with fresh(), torch.no_grad():
        expected = copy.deepcopy(module)(x)
        y = torch.compile(module, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, expected) < 2e-2
    assert outcomes() == []


def test_a_slice_is_computed_where_its_weight_is() -> None:
    """A scalar beside a weight on a GPU may be on the host."""
    scalar, weight = torch.ones(()), torch.empty(2, device="meta")
    assert device_of([scalar, weight]).type == device_of([2.0, weight, scalar]).type == "meta"
    assert device_of([2.0, scalar]).type == device_of([]).type == "cpu"


ASTRAY = {
    "scales of activations on outputs": lambda acc, s, z, w: acc * s.t(),
    "scales of other rows": lambda acc, s, z, w: acc * s.flip(0),
    "zero points on outputs": lambda acc, s, z, w: (
        (acc - z.int().t() * w.int().sum(1)[:, None]) * s
    ),
    "sums of columns": lambda acc, s, z, w: (acc - z.int() * w.int().sum(0)) * s,
    "sums of another weight": lambda acc, s, z, w: (acc - z.int() * w.flip(0).int().sum(1)) * s,
    "cut to 16 bits": lambda acc, s, z, w: acc.to(torch.int16) * s,
}


@pytest.mark.parametrize("name", ASTRAY)
def test_what_only_looks_like_a_scale_or_a_zero_point(name: str) -> None:
    """Of a square everything has the shape that the right one would have."""
    torch.manual_seed(0)
    size = 48
    w, (x, _) = spelling_zoo.codes8(size, size), torch.randn(2, size, size)
    x[0] *= 9

    def product(x: Tensor) -> Tensor:
        q, s, z = spelling_zoo.asymmetric(x)
        return ASTRAY[name](torch._int_mm(q, w.t()), s, z, w)

    with fresh(), torch.no_grad():
        y = torch.compile(product, backend=Counting(), fullgraph=True)(x)
        assert relative_error(y, product(x)) < 1e-5


def test_what_only_values_can_refuse_is_told_and_strict() -> None:
    """Codes stored as int16 may be of any size: these need 12 bits."""
    torch.manual_seed(0)
    wide = torch.randint(-2000, 2000, (spelling_zoo.N, spelling_zoo.K)).to(torch.int16)
    module = spelling_zoo.Spelled(
        lambda m, x: functional.linear(x, m.w.to(x.dtype) * m.s), w=wide, s=spelling_zoo.scales(1)
    )
    x = torch.randn(5, spelling_zoo.K).bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(module, backend=Counting(), fullgraph=True)
        with pytest.warns(UserWarning, match="stays dense: codes span"):
            y = compiled(x)
        assert relative_error(y, module(x)) < 2e-2
        (decision,) = lowering.report()
        assert (decision.outcome, decision.scheme) == ("declined", "quantised")
        assert "more than 8 bits" in decision.reason
        with intlass_ops.strict(), pytest.raises(intlass_ops.FallbackError, match="8 bits"):
            compiled(x)


BOUNDED = (
    "bias before the scale",
    "activation codes that stay floats",
    "divided by scales of columns",
)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_error_bound_of_a_decision_holds(name: str) -> None:
    module, x = SPELLINGS[name][0]()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=Counting(), fullgraph=True)(x)
        (decision,) = lowering.report()
        assert decision.bound is not None
        assert 0 < decision.bound < 0.1
        if name.startswith("bias"):
            terms = x.double().abs() @ (module.w.double().abs() * module.s.double()[:, None]).t()
            terms += (module.b.double() * module.s.double()).abs()
        else:
            codes = spelling_zoo.unpack(module.p).double() + 8
            scale = module.s.double().repeat_interleave(spelling_zoo.G, 1)
            scale = scale / module.c.double() if name.startswith("divided") else scale
            terms = x.double().abs() @ (codes * scale).t()
        assert bool(((y - module(x)).abs() <= decision.bound * terms).all())
