"""Values at run time: updates, swaps, instances, caches, threads, training, dynamic shapes."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import graph_zoo
import pytest
import torch
from lowering_helpers import SWAPPED, TOLERANCE, Counting, fresh, outcomes, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo_counters

from intlass_ops import lowering
from intlass_ops.lowering import graph_pass, probing, runtime

X = torch.randn(3, graph_zoo.K, generator=torch.Generator().manual_seed(3)).bfloat16()


def close(y: Tensor, expected: Tensor) -> bool:
    return relative_error(y, expected) < TOLERANCE[torch.bfloat16]


def test_twelve_instances_one_compile() -> None:
    backend = Counting()
    with fresh(), torch.no_grad():
        modules = [graph_zoo.SubMul(seed=i) for i in range(12)]
        for module in modules:
            y = torch.compile(module, backend=backend, fullgraph=True)(X)
            assert close(y, module(X))
        assert backend.compiles == 1
        assert lowering.counters()["run.packed"] == 12
        for module in modules:
            assert close(torch.compile(module, backend=backend, fullgraph=True)(X), module(X))
        assert lowering.counters()["run.packed"] == 12


def _update_in_place(m: graph_zoo.SubMul) -> None:
    m.p.bitwise_xor_(0x5A)


def _scale_in_place(m: graph_zoo.SubMul) -> None:
    m.s.mul_(-2)


def _swap(m: graph_zoo.SubMul) -> None:
    m.p = m.p.flip(0).contiguous()


def _assign_data(m: graph_zoo.SubMul) -> None:
    m.p.data = m.p.flip(1).contiguous()


def _load(m: graph_zoo.SubMul) -> None:
    m.load_state_dict(graph_zoo.SubMul(seed=77).state_dict())


def _load_assign(m: graph_zoo.SubMul) -> None:
    m.load_state_dict(graph_zoo.SubMul(seed=78).state_dict(), assign=True)


def _data_in_place(m: graph_zoo.SubMul) -> None:
    m.p.data.bitwise_xor_(0x3C)
    lowering.invalidate()


@pytest.mark.parametrize(
    "change",
    [_update_in_place, _scale_in_place, _swap, _assign_data, _load, _load_assign, _data_in_place],
)
def test_changed_weights_are_seen(change: object) -> None:
    backend = Counting()
    with fresh(), torch.no_grad():
        module = graph_zoo.SubMul()
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        before = compiled(X)
        change(module)  # type: ignore[operator]
        assert not close(before, module(X))
        assert close(compiled(X), module(X))
        assert backend.compiles == 1


def test_int8_leaves_are_read_in_place_even_behind_the_version_counter() -> None:
    with fresh(), torch.no_grad():
        module = graph_zoo.Int8PerChannel()
        compiled = torch.compile(module, backend=Counting(), fullgraph=True)
        compiled(X)
        module.w.data.neg_()
        assert close(compiled(X), module(X))
        assert "run.packed" not in lowering.counters()


def test_memo_dies_with_the_weight() -> None:
    with fresh(), torch.no_grad():
        gc.collect()
        held = runtime.packed_bytes()
        module = graph_zoo.SubMul()
        torch.compile(module, backend=Counting(), fullgraph=True)(X)
        assert runtime.packed_bytes() > held
        del module
    gc.collect()
    assert runtime.packed_bytes() == held


def test_one_graph_for_all_row_counts() -> None:
    backend = Counting()
    with fresh(), torch.no_grad():
        module = graph_zoo.SubMul()
        compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
        for rows in (5, 2, 64, 300, 4096):
            x = torch.randn(rows, graph_zoo.K).bfloat16()
            torch._dynamo.mark_dynamic(x, 0)
            assert close(compiled(x), module(x))
        assert backend.compiles == 1
        assert outcomes() == [SWAPPED]
        # Dynamo gives one row a graph of its own, once.
        for rows in (1, 7, 1, 4096):
            x = torch.randn(rows, graph_zoo.K).bfloat16()
            assert close(compiled(x), module(x))
        assert backend.compiles == 2


def test_layers_of_equal_shape_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probing is most of what the pass costs a compile: it must not grow with the depth."""
    probed: list[str] = []
    probe = probing._probe

    def counted(*args: Any, **kwargs: Any) -> Any:
        probed.append(args[1].text())
        return probe(*args, **kwargs)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(graph_zoo.SubMul(seed=i) for i in range(6))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x + i) for i, layer in enumerate(self.layers)]

    monkeypatch.setattr(probing, "_probe", counted)
    monkeypatch.setattr(probing, "_PROBED", {})
    with fresh(), torch.no_grad():
        module = Layers()
        outputs = torch.compile(module, backend=Counting(), fullgraph=True)(X)
        assert all(map(close, outputs, module(X)))
        assert outcomes() == [SWAPPED] * 6
    assert len(probed) == 1


def test_dynamic_rows_with_int8_activations() -> None:
    from test_lowering_idioms import DynamicActivation

    backend = Counting()
    with fresh(), torch.no_grad():
        for spelling in ("int_mm", "dequantised"):
            module = DynamicActivation(spelling)
            compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
            for rows in (20, 33, 300):
                x = torch.randn(2, rows, 128).bfloat16()
                assert close(compiled(x), module(x))
        assert backend.compiles == 2
        assert [d.scheme for d in lowering.report()] == ["w8a8", "w8a8"]


def test_warm_caches_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph from the FX graph or AOTAutograd cache must use the weights of this model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=True):
        for seed in (0, 1):
            torch._dynamo.reset()
            dynamo_counters.clear()
            module = graph_zoo.SubMul(seed=seed)
            compiled = torch.compile(module, backend=Counting(real=True), fullgraph=True)
            assert close(compiled(X), module(X))
        hits = dynamo_counters["aot_autograd"]["autograd_cache_hit"]
        hits += dynamo_counters["inductor"]["fxgraph_cache_hit"]
        bypasses = dynamo_counters["inductor"]["fxgraph_cache_bypass"]
        assert hits >= 1, dict(dynamo_counters["aot_autograd"])
        assert bypasses == 0, dict(dynamo_counters["inductor"])
    torch._dynamo.reset()


class Lora(nn.Module):
    def __init__(self, base: graph_zoo.Idiom) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.base = base
        self.a = nn.Parameter(torch.randn(8, graph_zoo.K, generator=g).bfloat16() * 0.1)
        self.b = nn.Parameter(torch.randn(graph_zoo.N, 8, generator=g).bfloat16() * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def test_training_keeps_every_gradient() -> None:
    def gradients(call: object, model: Lora) -> list[Tensor]:
        model.zero_grad()
        x = X.clone().requires_grad_()
        call(x).float().square().sum().backward()  # type: ignore[operator]
        assert x.grad is not None
        assert model.a.grad is not None
        assert model.b.grad is not None
        return [x.grad, model.a.grad.clone(), model.b.grad.clone()]

    with fresh():
        model = Lora(graph_zoo.SubMul())
        expected = gradients(model, model)
        backend = Counting()
        found = gradients(torch.compile(model, backend=backend, fullgraph=True), model)
        decisions = [d for d in lowering.report() if d.outcome == SWAPPED]
        assert len(decisions) == 1, lowering.report()
        for got, want in zip(found, expected, strict=True):
            assert relative_error(got, want) < 3e-2


def test_two_threads_compile_and_run_at_once() -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            module = graph_zoo.RepeatInterleave(seed=seed)
            with torch.no_grad():
                compiled = torch.compile(module, backend=Counting(), fullgraph=True)
                for _ in range(5):
                    assert close(compiled(X), module(X))
        except BaseException as problem:
            errors.append(problem)

    with fresh():
        threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors


def test_autocast_and_inference_mode() -> None:
    with fresh(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module = graph_zoo.SubMul()
        y = torch.compile(module, backend=Counting(), fullgraph=True)(X)
        assert close(y, module(X))
        assert outcomes() == [SWAPPED]


class Remember(graph_pass.CustomGraphPass):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "remember"


def test_enable_chains_and_disable_restores() -> None:
    config = torch._inductor.config
    other = Remember()
    with fresh(), config.patch(joint_custom_pre_pass=other), torch.no_grad():
        lowering.enable()
        lowering.enable()
        module = graph_zoo.SubMul()
        y = torch.compile(module, fullgraph=True)(X)
        assert close(y, module(X))
        assert outcomes() == [SWAPPED]
        assert other.calls == 1
        lowering.disable()
        assert config.joint_custom_pre_pass is other


def test_backend_takes_mode_and_options() -> None:
    with fresh(), torch.no_grad():
        module = graph_zoo.SubMul()
        other = Remember()
        options = {"joint_custom_pre_pass": other}
        y = torch.compile(module, backend=lowering.backend, options=options)(X)
        assert close(y, module(X))
        assert other.calls == 1
        assert outcomes() == [SWAPPED]
    with fresh(), pytest.raises(Exception, match="nonsense"):
        torch.compile(module, backend=lowering.backend, options={"nonsense": 1})(X)


def test_the_pass_is_one_object_with_a_stable_identity() -> None:
    assert graph_pass.LOWERING.uuid() == graph_pass.LoweringPass().uuid()
    other = Remember()
    assert graph_pass.Chain((other,)) == graph_pass.Chain((other,))
    assert graph_pass.Chain((other,)).uuid() != graph_pass.LOWERING.uuid()
    assert graph_pass.Chain((print,)).uuid() is None


class Attention(nn.Module):
    """q, k and v of one input, the last with another group structure if asked."""

    def __init__(self, third: type[graph_zoo.Idiom]) -> None:
        super().__init__()
        self.q, self.k = graph_zoo.SubMul(seed=1), graph_zoo.SubMul(seed=2)
        self.v = third(seed=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x).relu()


@pytest.mark.parametrize("third", [graph_zoo.HalvesCat, graph_zoo.Int8Asymmetric])
def test_siblings_become_one_gemm(third: type[graph_zoo.Idiom]) -> None:
    """Packed alike they are one GEMM; otherwise still one op, and right either way."""
    backend = Counting()
    with fresh(), torch.no_grad():
        module = Attention(third)
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        for got, want in zip(compiled(X), module(X), strict=True):
            assert close(got, want)
        assert outcomes() == [SWAPPED] * 3
        assert lowering.counters()["fused"] == 2
        module.k.s.mul_(3)
        for got, want in zip(compiled(X), module(X), strict=True):
            assert close(got, want)
        (graph,) = backend.graphs
        calls = [n for n in graph.graph.nodes if "linear_from_leaves" in str(n.target)]
        assert len(calls) == 1


def test_equal_outputs_do_not_become_aliases() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = graph_zoo.SubMul()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x.relu().view(-1), x.relu().view(-1), self.linear(x)

    with fresh(), torch.no_grad():
        a, b, _ = torch.compile(Twice(), backend=Counting(), fullgraph=True)(X)
        a.zero_()
        assert bool((b != 0).any())


def test_captured_weights_are_refreshed_in_their_buffers() -> None:
    """What a CUDA graph replay reads: the same memory, with the new values."""
    with fresh(), torch.no_grad():
        module = graph_zoo.SubMul()
        compiled = torch.compile(module, backend=lowering.backend, mode="reduce-overhead")
        compiled(X)
        (entry,) = (e for e in runtime._MEMO.values() if any(r() is module.p for r in e.leaves))
        entry.captured = True
        before = [t.data_ptr() for each in entry.packed for t in each.tensors()]
        old = [t.clone() for each in entry.packed for t in each.tensors()]
        _update_in_place(module)
        runtime.refresh_captured()
        after = [t for each in entry.packed for t in each.tensors()]
        assert [t.data_ptr() for t in after] == before
        assert any(not torch.equal(a, b) for a, b in zip(after, old, strict=True))
        assert close(compiled(X), module(X))
        assert lowering.counters()["run.refreshed"] == 1
        lowering.invalidate()
        assert [t.data_ptr() for each in entry.packed for t in each.tensors()] == before


def test_a_captured_weight_that_changes_structure_is_an_error() -> None:
    with fresh(), torch.no_grad():
        module = graph_zoo.SubMul()
        compiled = torch.compile(module, backend=Counting())
        compiled(X)
        (entry,) = (e for e in runtime._MEMO.values() if any(r() is module.p for r in e.leaves))
        entry.captured = True
        module.s.fill_(0.01)
        module.z.fill_(8)
        with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
            runtime.refresh_captured()


def test_constants_made_in_forward_and_closures() -> None:
    """Neither is a parameter or buffer; the codes are integers of a fixed shape all the same."""
    g = torch.Generator().manual_seed(9)
    packed = torch.randint(0, 256, (48, 64), generator=g).to(torch.uint8)
    scale = (torch.rand(48, 4, 1, generator=g) * 0.02 + 0.01).bfloat16()

    def product(x: Tensor) -> Tensor:
        shifts = torch.tensor([0, 4], dtype=torch.uint8)
        q = ((packed.unsqueeze(-1) >> shifts) & 15).view(48, 4, 32).to(x.dtype)
        return nn.functional.linear(x, ((q - 8) * scale).view(48, 128))

    with fresh(), torch.no_grad():
        compiled = torch.compile(product, backend=Counting(), fullgraph=True)
        assert close(compiled(X), product(X))
        packed.bitwise_xor_(0x77)
        assert close(compiled(X), product(X))
        assert outcomes() == [SWAPPED], lowering.report()


def test_arguments_as_weights() -> None:
    def product(x: Tensor, q: Tensor, s: Tensor) -> Tensor:
        return x @ (q.to(x.dtype) * s).t()

    g = torch.Generator().manual_seed(10)
    q = torch.randint(-128, 128, (48, 128), generator=g).to(torch.int8)
    s = (torch.rand(48, 1, generator=g) * 0.01).bfloat16()
    with fresh(), torch.no_grad():
        compiled = torch.compile(product, backend=Counting(), fullgraph=True)
        assert close(compiled(X, q, s), product(X, q, s))
        assert outcomes() == [SWAPPED], lowering.report()


def test_op_has_a_truthful_schema_and_fake() -> None:
    with fresh(), torch.no_grad():
        backend = Counting()
        module = graph_zoo.SubMul()
        torch.compile(module, backend=backend, fullgraph=True)(X)
        (graph,) = backend.graphs
        (call,) = (n for n in graph.graph.nodes if "linear_from_leaves" in str(n.target))
    leaves = [module.p, module.z, module.s]
    recipe = next(arg for arg in call.args if isinstance(arg, str))
    dtypes = [leaf.meta["val"].dtype for leaf in call.args[1]]
    shapes = [leaf.meta["val"].shape for leaf in call.args[1]]
    ordered = [
        next(t for t in leaves if t.dtype == d and t.shape == s)
        for d, s in zip(dtypes, shapes, strict=True)
    ]
    torch.library.opcheck(
        torch.ops.intlass.linear_from_leaves.default,
        (X, ordered, recipe),
        test_utils=("test_schema", "test_faketensor"),
    )
