"""explain and strict: every dispatch is reported with its module, fallbacks can be forbidden."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gemm_case import Case, build
from strategies import BF16, FP32
from torch import nn

import intlass_ops as ia
from intlass_ops import cpu_integers, lowering

# Runs without a kernel of ours: on a GPU float32 activations; on a CPU integer ones, if its own
# INT8 product cannot be trusted.
FALLBACK = {"cpu": Case("s8", "u4", groups=4), "cuda": Case("fp32", "u4", groups=4)}
NO_FALLBACK = {"cpu": Case("fp32", "u4", groups=4), "cuda": Case("s8", "u4", groups=4)}


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_integers, "is_exact", lambda: False)


def net(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(32, 16)})
    model = nn.Sequential(layers["a"], nn.Sequential(nn.ReLU(), layers["b"])).to(device)
    ia.quantize_(model, ia.Int4WeightOnly(32))
    return model


def test_every_call_is_reported_with_its_shape_and_module(device: str) -> None:
    x = torch.randn(3, 64, device=device, dtype=BF16)
    explanation = ia.explain(net(device), x)
    assert [
        (d.module, d.op, d.scheme, d.m, d.n, d.k, d.group_size) for d in explanation.dispatches
    ] == [
        ("0", "matmul_int4_bf16_tn", "w4a16", 3, 32, 64, 32),
        ("1.1", "matmul_int4_bf16_tn", "w4a16", 3, 16, 32, 32),
    ]
    assert all(d.kernel and d.reason for d in explanation.dispatches)
    assert torch.equal(explanation.result, net(device)(x))


def test_weights_that_pytorch_takes_apart_at_every_call_are_told() -> None:
    class Both(torch.Tensor):
        """As torchao's weights are: a tensor made of others."""

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes"], None

    model = nn.Linear(4, 4).requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    assert ia.explain(compiled, torch.ones(1, 4)).unwrapped == 0
    model.weight = nn.Parameter(torch.Tensor.as_subclass(model.weight, Both), requires_grad=False)
    explanation = ia.explain(torch.compile(model, backend="eager"), torch.ones(1, 4))
    assert explanation.unwrapped == 1
    assert "prepare_(model)" in str(explanation)


def test_the_report_is_a_table_that_counts_repeated_calls(device: str) -> None:
    model, x = net(device), torch.randn(3, 64, device=device, dtype=BF16)
    explanation = ia.explain(lambda: [model(x) for _ in range(4)])
    lines = str(explanation).splitlines()
    assert " ".join(lines[0].split()) == "module op scheme M N K group kernel calls why"
    assert len(lines) == 3
    assert all(" 4 " in line for line in lines[1:])
    assert "w4a16" in lines[1]
    assert str(ia.explain(lambda: None)) == "no intlass product ran"


@pytest.mark.usefixtures("without_vnni")
def test_fallbacks_are_told_apart(device: str) -> None:
    for case, fallback in ((FALLBACK[device], True), (NO_FALLBACK[device], False)):
        explanation = ia.explain(build(case, device).run)
        assert [d.fallback for d in explanation.dispatches] == [fallback]
        assert len(explanation.fallbacks) == fallback


@pytest.mark.parametrize(
    ("case", "scheme"),
    [
        (Case("bf16", "s4"), "w4a16"),
        (Case("bf16", "s8"), "w8a16"),
        (Case("bf16", "e4m3"), "fp8a16"),
        (Case("bf16", "nf4"), "nf4a16"),
        (Case("s8", "s8"), "w8a8"),
        (Case("s8", "u4"), "w4a8"),
        (Case("s4", "u4"), "w4a4"),
    ],
)
def test_schemes(case: Case, scheme: str, device: str) -> None:
    (dispatch,) = ia.explain(build(case, device).run).dispatches
    assert dispatch.scheme == scheme
    assert (dispatch.m, dispatch.n, dispatch.k, dispatch.group_size) == (5, 48, 128, 128)


def test_explanations_nest(device: str) -> None:
    call = build(NO_FALLBACK[device], device)
    inner: list[ia.Explanation] = []

    def run() -> None:
        call.run()
        inner.append(ia.explain(call.run))

    outer = ia.explain(run)
    assert len(outer.dispatches) == 2
    assert len(inner[0].dispatches) == 1


def test_an_error_passes_through_and_leaves_nothing_behind(device: str) -> None:
    model = net(device)
    with pytest.raises(ValueError, match="columns"):
        ia.explain(model, torch.randn(3, 63, device=device))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    (dispatch,) = ia.explain(build(NO_FALLBACK[device], device).run).dispatches
    assert dispatch.module == ""


@pytest.mark.usefixtures("without_vnni")
def test_strict_forbids_what_runs_without_our_kernels(device: str) -> None:
    fallback, fast = build(FALLBACK[device], device), build(NO_FALLBACK[device], device)
    with ia.strict():
        fast.run()
        message = r"^matmul_int4_bf16_tn: w4a\d+ M=5 N=48 K=128 group_size=32 would run as .+: .+"
        with pytest.raises(ia.FallbackError, match=message):
            fallback.run()
        with ia.strict():
            pass
        with pytest.raises(ia.FallbackError):
            fallback.run()
    fallback.run()


@pytest.mark.usefixtures("without_vnni")
def test_strict_names_the_module(device: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).to(device)
    config = ia.Int8DynamicActivationInt8Weight() if device == "cpu" else ia.Int8WeightOnly()
    ia.quantize_(model, config, lambda _, name: name == "1")
    x = torch.randn(2, 64, device=device, dtype=FP32)
    with ia.strict(), pytest.raises(ia.FallbackError, match=r"matmul_int8_bf16_tn in 1: "):
        ia.explain(model, x)


def test_dispatches_inside_a_compiled_graph_are_reported(device: str) -> None:
    model, x = net(device), torch.randn(3, 64, device=device, dtype=BF16)
    fn = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        fn(x)
        assert len(ia.explain(fn, x).dispatches) == 2


def test_threads_report_to_the_one_explanation(device: str) -> None:
    call = build(NO_FALLBACK[device], device)

    def run() -> None:
        threads = [threading.Thread(target=call.run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(ia.explain(run).dispatches) == 4


class Scaled(nn.Module):
    """x @ (a quantised weight).T: int8 codes times a scale, or codes that index a table."""

    def __init__(self, n: int, k: int, *, table: bool = False) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(n)
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=seed)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.rand(n, 1, generator=seed))
        values = torch.randn(256, generator=seed).sort().values if table else None
        self.register_buffer("table", values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            return x @ (self.codes.float() * self.scales).T
        return x @ self.table[self.codes.int() + 128].T


def compiled_net(*, table: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    torch.compiler.reset()
    layers = nn.ModuleDict({"up": Scaled(32, 64), "down": Scaled(16, 32, table=table)})
    model = nn.Sequential(layers["up"], nn.Sequential(layers["down"], nn.Linear(16, 8)))
    return torch.compile(model, backend=lowering.backend, fullgraph=True)


@torch.no_grad()
def test_each_linear_of_a_compiled_model_is_explained_and_strict_refuses_declined_ones() -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        net = compiled_net(table=True)
        for explanation in (ia.explain(net, torch.randn(2, 64)) for _ in range(2)):
            assert [(d.path, d.outcome, d.scheme, d.shape) for d in explanation.linears] == [
                ("0", "swapped", "w8a16", (32, 64)),
                ("1.0", "declined", "quantised", (16, 32)),
                ("1.1", "dense", "dense", (8, 16)),
            ]
            assert [d.path for d in explanation.declined] == ["1.0"]
            lines = [" ".join(line.split()) for line in str(explanation).splitlines()]
            assert lines[0] == "linear N K group outcome scheme error <= kernel why"
            assert re.match(r"0 32 64 64 swapped w8a16 \d\.\de-0\d cpu ", lines[1])
            assert lines[2].startswith("1.0 16 32 declined quantised - ")
            assert lines[3] == "1.1 8 16 dense dense - a floating-point weight"
    x = torch.randn(2, 64)
    message = r"(?s)^1 quantised linears would run as they are:\s+1\.0 \[N=16, K=32\]: declined .+"
    for _ in range(2):
        with ia.strict(), pytest.raises(ia.FallbackError, match=message):
            net(x)
    net(x)


@torch.no_grad()
def test_a_graph_from_a_cache_is_not_taken_for_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(2, 64)
    compiled_net(table=True)(x)
    net = compiled_net(table=True)
    assert ia.explain(net, x).unknown == 1
    assert "caches" in str(ia.explain(net, x))
    with ia.strict(), pytest.raises(ia.FallbackError, match=r"caches.*torch\.compiler\.reset"):
        net(x)
    # Inside the context the caches are left alone.
    net = compiled_net(table=False)
    with ia.strict():
        net(x)
