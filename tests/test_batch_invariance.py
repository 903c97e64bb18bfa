"""`batch_invariant()`: a row of a product depends neither on the others nor on their number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gemm_case import Call, Case, build
from strategies import BF16, FP32, KINDS
from test_hopper_config import a_shape

import intlass_ops as ia
from intlass_ops import batch_invariance, config, cpu, cpu_integers

TOKENS = 70
SIZES = (1, 2, 3, 5, 6, 7, 9, 17, 33, 64, 65)
# float32 outputs, so that a difference in the last bit of a sum shows; split K by default.
FLOATS = {
    "groups": Case("bf16", "u4", (TOKENS,), 50, 4096, groups=32, out=FP32, bias=FP32),
    "straddling": Case("fp16", "u4", (TOKENS,), 50, 2064, groups=43, zero=FP32, out=FP32),
    "odd": Case("bf16", "s4", (TOKENS,), 33, 1001, out=FP32, alpha="float"),
    "int8": Case("bf16", "s8", (TOKENS,), 50, 4096, groups=32, out=FP32),
    "fp8": Case("bf16", "e4m3", (TOKENS,), 50, 2064, groups=43, out=FP32),
    "nf4": Case("bf16", "nf4", (TOKENS,), 50, 2064, groups=43, out=FP32),
    "fp32": Case("fp32", "u4", (TOKENS,), 50, 1024, groups=8),
}


def rows(call: Call, begin: int, end: int) -> Call:
    part = {n: v[begin:end] if n in ("a_scale", "a_zero") else v for n, v in call.options.items()}
    return replace(call, a=call.a[begin:end], options=part)


def check(case: Case, device: str) -> None:
    call = build(case, device, numbers="random")
    with ia.batch_invariant():
        together = call.run()
        for m in SIZES:
            for begin in (0, TOKENS - m, (TOKENS - m) // 2):
                part = rows(call, begin, begin + m).run()
                assert torch.equal(part, together[begin : begin + m]), (m, begin)


@pytest.mark.parametrize("name", FLOATS)
def test_a_row_of_floats_does_not_depend_on_the_others(name: str, device: str) -> None:
    check(FLOATS[name], device)


@pytest.mark.parametrize("kind", ["w4a8", "w8a8", "w4a4"])
@pytest.mark.parametrize("trusted", [True, False])
def test_nor_does_one_of_integers(
    kind: str, trusted: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_integers, "is_exact", lambda: trusted)
    check(replace(KINDS[kind], lead=(TOKENS,), out=FP32), device)


def test_without_a_compiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "make", lambda *_: None)
    check(replace(FLOATS["groups"], seed=7), "cpu")  # a signature without a plan


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3), (), (1, 3)])
@pytest.mark.parametrize("x", ["bf16", "fp32", "s8"])
def test_any_leading_dimensions(x: str, lead: tuple[int, ...], device: str) -> None:
    call = build(Case(x, "u4", lead, 24, 64, groups=2, out=BF16), device)
    with ia.batch_invariant():
        assert torch.equal(call.run(), call.expected().y.to(BF16))


def test_plans_of_both_modes_do_not_mix(device: str) -> None:
    call = build(replace(FLOATS["groups"], lead=(2,)), device, numbers="random")

    def why() -> str:
        return ia.explain(call.run).dispatches[0].reason

    usual = why()
    with ia.batch_invariant():
        with ia.batch_invariant():
            inside = why()
        assert batch_invariance.enabled()
        assert inside == why()
    assert not batch_invariance.enabled()
    assert usual == why() != inside


def test_a_compiled_layer_obeys_the_context_it_runs_in(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2048, 48)).to(device)
    ia.quantize_(model, ia.Int4WeightOnly(32))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    x = torch.randn(9, 2048, device=device)
    x = x if device == "cpu" else x.to(BF16)
    compiled(x)
    with ia.batch_invariant(), torch.no_grad():
        together = compiled(x)
        assert torch.equal(together, model(x))
        for i in range(9):
            assert torch.equal(compiled(x[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("arch", config.ARCHS)
@pytest.mark.parametrize(("x", "w"), config.PAIRS)
def test_one_kernel_serves_every_number_of_tokens(arch: str, x: str, w: str) -> None:
    gpu = config.device_of(arch)
    for group_size in (64, 128, 4096):
        shape = a_shape(x, w, 1, 4096, 4096, group_size)
        shape = replace(shape, batch_invariant=True, has_a_zero=x == "u4")
        picked = {config.pick(gpu, replace(shape, m=m)) for m in (1, 8, 9, 16, 17, 300, 9000)}
        assert len(picked) == 1
        (only,) = picked
        assert isinstance(only, config.Gemm)
        assert only.split_k == 1
        why = config.reason(gpu, shape)
        assert why.endswith("batch_invariant(): one kernel for every M")
