"""FP8 weights (e4m3) in graphs and under `prepare_`: swapped and right, or declined and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import graph_zoo
import module_zoo
import pytest
import torch
from graph_zoo import GROUP, K, N
from lowering_helpers import (
    DECLINED,
    SWAPPED,
    TOLERANCE,
    Counting,
    cuda_trace,
    fresh,
    outcomes,
    relative_error,
)
from torch import Tensor, nn

import intlass_ops
from intlass_ops import Fp8Linear, lowering
from intlass_ops.lowering import blocks, runtime
from intlass_ops.prepare import prepare_

FP8 = torch.float8_e4m3fn
X = torch.randn(3, K, generator=torch.Generator().manual_seed(3)).bfloat16()


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) / 100 + 0.001


class Spelled(graph_zoo.Fp8PerRow):
    """Codes w [N, K], and whatever scales a spelling wants: s."""

    def __init__(self, weight: Callable[[Spelled], Tensor], **buffers: Tensor) -> None:
        super().__init__(torch.bfloat16)
        self.weight_of = weight
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_of(self).to(x.dtype))


def _blocks(m: Spelled) -> Tensor:
    w = m.w.float().unflatten(0, (-1, 16)).unflatten(-1, (-1, GROUP))
    return (w * m.s.unsqueeze(1).unsqueeze(-1)).reshape(N, K)


def _expanded(m: Spelled) -> Tensor:
    s = m.s.view(N // 16, 1, -1, 1).expand(-1, 16, -1, GROUP).reshape(N, K)
    return m.w.float() * s


def _grouped(m: Spelled) -> Tensor:
    return (m.w.float().view(N, -1, GROUP) * m.s.float()).view(N, K)


GROUPS = K // GROUP
# The spelling, and the group that is found.
SPELLINGS: dict[str, tuple[Callable[[], Spelled], int]] = {
    "per tensor": (lambda: Spelled(lambda m: m.w.float() * m.s, s=random()), K),
    "divided by reciprocals": (lambda: Spelled(lambda m: m.w.float() / m.s, s=1 / random(N, 1)), K),
    "groups": (lambda: Spelled(_grouped, s=random(N, GROUPS, 1)), GROUP),
    "blocks, viewed": (lambda: Spelled(_blocks, s=random(N // 16, GROUPS)), GROUP),
    "blocks, expanded": (lambda: Spelled(_expanded, s=random(N // 16, GROUPS)), GROUP),
    "exponents as scales": (
        lambda: Spelled(_grouped, s=random(N, GROUPS, 1).to(torch.float8_e8m0fnu)),
        GROUP,
    ),
    "bytes": (
        lambda: Spelled(
            lambda m: m.bytes.view(FP8).float() * m.s,
            s=random(N, 1),
            bytes=graph_zoo.Fp8PerRow().w.view(torch.uint8),
        ),
        K,
    ),
    "scales of columns": (lambda: Spelled(lambda m: m.w.float() * m.s, s=random(1, K)), K),
    "rounded to FP8 in the graph": (
        lambda: Spelled(
            lambda m: (m.f / m.s).to(FP8).float() * m.s, s=random(N, 1), f=random(N, K)
        ),
        K,
    ),
    "transposed": (lambda: Spelled(lambda m: (m.w.t().float() * m.s).t(), s=random(1, N)), K),
}


def compiled(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        y: Tensor = torch.compile(module, backend=Counting(), fullgraph=True)(x)
    return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_swapped(name: str, dtype: torch.dtype) -> None:
    make, group = SPELLINGS[name]
    module, x = make(), X.to(dtype)
    with fresh():
        y = compiled(module, x)
        (decision,) = lowering.report()
        assert lowering.counters()["run.packed.fp8"] == 1
    assert (decision.outcome, decision.scheme) == (SWAPPED, "fp8a16"), decision
    assert decision.group_size == group
    assert relative_error(y, module(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_swapped_in_a_graph_for_cuda(name: str) -> None:
    with fresh():
        cuda_trace(SPELLINGS[name][0](), X)
        assert outcomes() == [SWAPPED], lowering.report()
        assert lowering.report()[0].scheme == "fp8a16"


def test_the_result_is_within_the_bound_that_is_told() -> None:
    module = graph_zoo.Fp8PerRow(torch.float32)
    with fresh():
        y = compiled(module, X.float())
        bound = lowering.report()[0].bound
    w = module.w.double() * module.s.double()[:, None]
    assert bound is not None
    assert bool(((y - X.double() @ w.t()).abs() <= bound * (X.double().abs() @ w.abs().t())).all())


def test_a_large_weight_is_measured_in_blocks_of_rows() -> None:
    """The last block has finer groups than those before."""
    k = 1024
    g = torch.Generator().manual_seed(1)
    w = (torch.randn(2 * blocks.BLOCK_ELEMENTS // k + 8, k, generator=g) * 60).to(FP8)
    s = torch.full((len(w), k // GROUP, 1), 0.01)
    s[-4:] = random(4, k // GROUP, 1)

    def weight(m: Spelled) -> Tensor:
        return (m.w.float().view(*m.s.shape[:2], -1) * m.s).view(-1, k)

    module, x = Spelled(weight, w=w, s=s), torch.randn(2, k, generator=g)
    with fresh():
        y = compiled(module, x)
        assert lowering.counters()["run.packed.fp8"] == 1
    assert relative_error(y, module(x)) < TOLERANCE[torch.float32]


class OneToken(graph_zoo.Fp8PerRow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mv(self.w.to(x.dtype) * self.s.to(x.dtype).unsqueeze(1), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_matrix_times_a_vector_is_the_whole_graph(dtype: torch.dtype) -> None:
    module, x = OneToken(), X[0].to(dtype)
    with fresh():
        y = compiled(module, x)
        assert outcomes() == [SWAPPED], lowering.report()
    assert relative_error(y, module(x)) < TOLERANCE[dtype]


def test_strict_and_explain_name_the_scheme() -> None:
    module = graph_zoo.Fp8PerRow()
    with fresh(), torch.no_grad(), intlass_ops.strict():
        explanation = intlass_ops.explain(torch.compile(module, backend=lowering.backend), X)
    assert [each.scheme for each in explanation.linears] == ["fp8a16"]
    assert [each.scheme for each in explanation.dispatches] == ["fp8a16"]


DECLINES = {
    graph_zoo.Fp8OtherType: "codes of float8_e5m2: of FP8, float8_e4m3fn is read",
    graph_zoo.Fp8Rounded: "codes of float8_e5m2",
    graph_zoo.Fp8Added: "something is added to FP8 codes",
}


@pytest.mark.parametrize("kind", DECLINES)
def test_others_are_declined_with_a_reason(kind: type[graph_zoo.Idiom]) -> None:
    with fresh():
        compiled(kind(), X)
        (decision,) = lowering.report()
    assert decision.outcome == DECLINED
    assert DECLINES[kind] in decision.reason


def test_a_clamped_weight_is_declined() -> None:
    with fresh():
        compiled(Spelled(lambda m: (m.w.float() * m.s).clamp(-0.1, 0.1), s=random(N, 1)), X)
        (decision,) = lowering.report()
    assert decision.outcome == DECLINED
    assert "not its own FP8 code times a scale" in decision.reason


class BothFp8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", graph_zoo.Fp8PerRow().w)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x.to(FP8), self.w.t(), one, one, out_dtype=torch.bfloat16)


def test_fp8_activations_stay_the_graphs_own() -> None:
    with fresh():
        cuda_trace(BothFp8(), torch.randn(16, K).bfloat16())
        (decision,) = lowering.report()
    assert decision.outcome == DECLINED
    assert "activations in FP8 too" in decision.reason


@pytest.mark.parametrize("name", ["Fp8PerRow", "Fp8Blocks"])
def test_a_nan_keeps_a_weight_dense_and_says_so(name: str) -> None:
    module = graph_zoo.AFFINE[name]()
    module.w.view(torch.uint8)[5, 7] = 0xFF
    with fresh():
        y = compiled(module, X)
        (decision,) = lowering.report()
    assert decision.outcome == DECLINED
    assert "an FP8 code or a scale is NaN" in decision.reason
    assert bool(y[:, 5].isnan().all())
    assert int(y.isnan().sum()) == len(y)


def _negated(module: graph_zoo.Fp8PerRow) -> None:
    module.w.view(torch.uint8).bitwise_xor_(0x80)


def _scaled(module: graph_zoo.Fp8PerRow) -> None:
    module.s.mul_(2)


def _replaced(module: graph_zoo.Fp8PerRow) -> None:
    module.w = module.w.flip(0)


def _given_other_data(module: graph_zoo.Fp8PerRow) -> None:
    module.w.data = module.w.flip(0)


def test_codes_are_read_in_place_and_changes_are_seen() -> None:
    module = graph_zoo.Fp8PerRow()
    backend = Counting()
    with fresh(), torch.no_grad():
        held = runtime.packed_bytes()
        run = torch.compile(module, backend=backend, fullgraph=True)
        run(X)
        assert runtime.packed_bytes() - held == module.s.nbytes
        for change in (_negated, _scaled, _replaced, _given_other_data):
            change(module)
            assert relative_error(run(X), module(X)) < TOLERANCE[torch.bfloat16]
        assert backend.compiles == 1
        del module, run
        torch._dynamo.reset()
    assert runtime.packed_bytes() == held


def test_a_captured_graph_reads_changed_codes_but_no_other_memory() -> None:
    module = graph_zoo.Fp8PerRow()
    with fresh(), torch.no_grad():
        runtime.invalidate()
        run = torch.compile(module, backend=Counting(), fullgraph=True)
        run(X)
        (entry,) = runtime._MEMO.values()
        assert entry.packed is not None
        entry.captured = True
        before = entry.packed[0].scales
        module.w.copy_(module.w.flip(0))
        module.s.mul_(2)
        runtime.refresh_captured()
        assert entry.packed[0].scales is before
        assert relative_error(run(X), module(X)) < TOLERANCE[torch.bfloat16]
        kept = module.w.data
        bytes_ = kept.view(torch.uint8).clone()
        _given_other_data(module)
        with pytest.raises(RuntimeError, match="dtypes or memory"):
            runtime.refresh_captured()
        assert torch.equal(kept.view(torch.uint8), bytes_)
        entry.captured = False
        runtime.invalidate()


def test_one_graph_for_all_row_counts() -> None:
    module, backend = graph_zoo.Fp8Epilogue(), Counting()
    with fresh(), torch.no_grad():
        run = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
        for rows in (5, 2, 64, 300):
            x = torch.randn(rows, K).bfloat16()
            torch._dynamo.mark_dynamic(x, 0)
            assert relative_error(run(x), module(x)) < TOLERANCE[torch.bfloat16]
        assert backend.compiles == 1
        assert outcomes() == [SWAPPED]


def test_layers_of_one_input_and_a_tied_weight() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (graph_zoo.Fp8PerRow(seed=i) for i in range(3))
            self.c.w = self.a.w

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.relu(self.b(x)) * self.c(x)

    module = Layers()
    with fresh():
        y = compiled(module, X)
        assert outcomes() == [SWAPPED] * 3
        assert "run.dense" not in lowering.counters()
    assert relative_error(y, module(X)) < TOLERANCE[torch.bfloat16]


def test_a_frozen_weight_in_a_training_graph() -> None:
    module = graph_zoo.Fp8PerRow(torch.float32)
    with fresh():
        x = X.float().requires_grad_()
        torch.compile(module, backend=Counting(), fullgraph=True)(x).square().sum().backward()
        assert SWAPPED in outcomes()
        again = X.float().requires_grad_()
        module(again).square().sum().backward()
    assert relative_error(x.grad, again.grad) < 1e-4


def prepared(model: nn.Module, **options: bool) -> list[lowering.Decision]:
    with warnings.catch_warnings(), fresh(), torch.no_grad():
        warnings.simplefilter("ignore")
        return prepare_(model, **options)


def test_prepared_layers_are_ours_and_hold_the_same_memory() -> None:
    linear, x, expected = module_zoo.MODULES["FP8 in blocks, by hand"][0]()
    pointer = linear.weight.data_ptr()
    model = nn.ModuleList([linear, linear])
    assert {each.scheme for each in prepared(model)} == {"fp8a16"}
    assert isinstance(model[0], Fp8Linear)
    assert model[0] is model[1]
    assert model[0].weight.data_ptr() == pointer
    assert prepared(model) == []
    for dtype in TOLERANCE:
        y = model.to(dtype)[0](x.to(dtype))
        assert relative_error(y, expected.to(dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("block", [(32, 64), None], ids=["blocks", "tensor"])
def test_layers_that_quantise_activations_are_converted_when_that_is_allowed(
    block: tuple[int, int] | None,
) -> None:
    try:
        linear, x, expected = module_zoo.fp8_linear_of_transformers(block)
    except ImportError as missing:
        pytest.skip(str(missing))
    model = nn.Sequential(linear)
    (decision,) = prepared(model)
    assert decision.outcome == DECLINED
    assert "load_pretrained" in decision.reason
    assert model[0] is linear
    (decision,) = prepared(model, same_codes=False)
    assert (decision.outcome, decision.scheme) == (SWAPPED, "fp8a16")
    assert "activations left as floats" in decision.reason
    assert isinstance(model[0], Fp8Linear)
    assert relative_error(model(x), expected.to(x.dtype)) < TOLERANCE[x.dtype]


def test_fbgemm_of_transformers_is_converted_when_that_is_allowed() -> None:
    try:
        from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
    except ImportError as missing:
        pytest.skip(str(missing))
    linear = FbgemmFp8Linear(K, N, True)
    linear.weight.data, linear.weight_scale.data = graph_zoo.Fp8PerRow().w, random(N, 1)
    linear.bias.data.normal_()
    w = (linear.weight.float() * linear.weight_scale).bfloat16()
    expected = nn.functional.linear(X, w, linear.bias.bfloat16())
    model = nn.Sequential(linear)
    assert [each.outcome for each in prepared(model)] == [DECLINED]
    assert [each.outcome for each in prepared(model, same_codes=False)] == [SWAPPED]
    assert relative_error(model(X), expected) < TOLERANCE[torch.bfloat16]


def test_compressed_tensors_that_quantise_activations() -> None:
    try:
        linear, x, expected = module_zoo.MODULES["compressed-tensors: FP8 in blocks"][0]()
    except ImportError as missing:
        pytest.skip(str(missing))
    weights = linear.quantization_scheme.weights
    linear.quantization_scheme.input_activations = weights.model_copy()
    model = nn.Sequential(linear)
    (decision,) = prepared(model)
    assert (decision.outcome, model[0]) == (DECLINED, linear)
    assert "same_codes=False" in decision.reason
    (decision,) = prepared(model, same_codes=False)
    assert decision.outcome == SWAPPED
    assert relative_error(model(x), expected.to(x.dtype)) < TOLERANCE[x.dtype]


def test_what_is_more_than_a_linear_is_not_converted() -> None:
    class Wide(module_zoo.PlainFp8):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    module = Wide()
    module.weight_scale_inv.data = module.weight_scale_inv.bfloat16()
    model = nn.Sequential(module)
    (decision,) = prepared(model)
    assert decision.outcome == DECLINED
    assert "more than a bias around the product" in decision.reason


def test_a_nan_is_not_converted() -> None:
    linear = module_zoo.PlainFp8()
    linear.weight.data.view(torch.uint8)[0, 0] = 0x7F
    model = nn.Sequential(linear)
    (decision,) = prepared(model)
    assert decision.outcome == DECLINED
    assert "is NaN" in decision.reason


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["Fp8PerRow", "Fp8Epilogue", "Fp8Blocks"])
def test_replayed_cuda_graphs_see_changed_weights(name: str) -> None:
    module, x = graph_zoo.AFFINE[name]().cuda(), X.cuda()
    with fresh(), torch.no_grad():
        run = torch.compile(
            module, backend=lowering.backend, mode="reduce-overhead", fullgraph=True
        )
        for change in (lambda _: None, _scaled, _negated):
            change(module)
            for _ in range(4):
                assert relative_error(run(x), module(x)) < TOLERANCE[torch.bfloat16]
        assert lowering.counters()["run.packed.fp8"] == 1
        assert lowering.counters().get("run.captured_cold", 0) == 0


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_runs_on_our_kernels(name: str) -> None:
    module, x = SPELLINGS[name][0]().cuda(), X.cuda()
    with fresh(), torch.no_grad(), intlass_ops.strict():
        y = torch.compile(module, backend=lowering.backend, fullgraph=True)(x)
    assert relative_error(y, module(x)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@gpu
def test_prepared_layers_run_on_our_kernels() -> None:
    linear, x, expected = module_zoo.MODULES["FP8 in blocks, by hand"][0]()
    model, x = nn.Sequential(linear).cuda(), x.cuda()
    assert [each.outcome for each in prepared(model)] == [SWAPPED]
    with intlass_ops.strict():
        y = model(x)
    assert relative_error(y.cpu(), expected.to(x.dtype)) < TOLERANCE[x.dtype]
