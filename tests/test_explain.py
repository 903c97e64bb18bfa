"""explain and strict: every dispatch is reported with its module, fallbacks can be forbidden."""

from __future__ import annotations

import threading

import pytest
import torch
from gemm_case import Case, build
from strategies import BF16, FP32
from torch import nn

import intlass_ops as ia

# Runs without a kernel of ours: on a CPU integer activations, on a GPU float32 ones.
FALLBACK = {"cpu": Case("s8", "u4", groups=4), "cuda": Case("fp32", "u4", groups=4)}
NO_FALLBACK = {"cpu": Case("fp32", "u4", groups=4), "cuda": Case("s8", "u4", groups=4)}


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


def test_the_report_is_a_table_that_counts_repeated_calls(device: str) -> None:
    model, x = net(device), torch.randn(3, 64, device=device, dtype=BF16)
    explanation = ia.explain(lambda: [model(x) for _ in range(4)])
    lines = str(explanation).splitlines()
    assert " ".join(lines[0].split()) == "module op scheme M N K group kernel calls why"
    assert len(lines) == 3
    assert all(" 4 " in line for line in lines[1:])
    assert "w4a16" in lines[1]
    assert str(ia.explain(lambda: None)) == "no intlass op ran"


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
