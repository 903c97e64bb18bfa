"""`prepare_`: linears of every library become packed ones in place, and compute the same."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import library_zoo
import module_zoo
import pytest
import torch
from lowering_helpers import DECLINED, SWAPPED, TOLERANCE, fresh, relative_error
from torch import nn

from intlass_ops import Int8DynamicActivationInt8Weight, IntLinear, quantize_
from intlass_ops.nn import PackedLinear
from intlass_ops.prepare import prepare_


def converted(model: nn.Module) -> list[tuple[str, str]]:
    with warnings.catch_warnings(), fresh(), torch.no_grad():
        warnings.simplefilter("ignore")
        return [(decision.outcome, decision.scheme) for decision in prepare_(model)]


@pytest.mark.parametrize("name", module_zoo.MODULES)
def test_module_is_packed_and_exact(name: str) -> None:
    make, scheme = module_zoo.MODULES[name]
    try:
        linear, x, expected = make()
    except ImportError as missing:
        pytest.skip(f"{name}: {missing}")
    model = nn.Sequential(linear)
    assert converted(model) == [(SWAPPED, scheme)]
    del linear
    with torch.no_grad():
        y = model(x)
    assert relative_error(y, expected.to(y.dtype)) < TOLERANCE[x.dtype]
    if not isinstance(model[0], IntLinear):
        with fresh(), torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
            assert relative_error(compiled(x), y) < TOLERANCE[x.dtype]


LIVE = (
    "torchao: int8 weight-only group 64",
    "torchao: int8 dynamic asymmetric activation, int8 weight",
    "torchao: int8 static activation, int8 weight",
    "torchao: 8da4w group 32",
    "hqq: 8-bit axis 1",
    "hqq: 4-bit axis 0",
    "optimum-quanto: qint8",
    "optimum-quanto: qint4 fp32",
    "optimum-quanto: qfloat8",
    "torchao: float8 weight-only per row",
)


@pytest.mark.parametrize("name", LIVE)
def test_library_model_is_packed_in_place(name: str) -> None:
    entry = library_zoo.LIBRARY[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, x = entry.make()
    except ImportError as missing:
        pytest.skip(f"{name}: {missing}")
    with torch.no_grad():
        expected = model(x)
        assert [outcome for outcome, _ in converted(model)] == [entry.outcome] * 2
        assert relative_error(model(x), expected) < max(TOLERANCE[x.dtype], 1e-2)


class PerTensor(nn.Module):
    """One activation scale in all, which is no scale a token."""

    def __init__(self, n: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, n
        self.register_buffer("w", torch.randint(-127, 128, (n, 64)).to(torch.int8))
        self.register_buffer("s", torch.rand(n) * 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.float().abs().amax() / 127
        q = (x.float() / a).round().clamp(-128, 127).to(torch.int8)
        y = nn.functional.linear(q.float() * a, self.w.float() * self.s[:, None])
        return y.to(x.dtype)


def test_quantisers_like_ours_are_replaced_where_that_is_allowed() -> None:
    linear, x, expected = module_zoo.MODULES["compressed-tensors: W8A8 dynamic"][0]()
    others = [module_zoo.MODULES[f"compressed-tensors: {n}"][0]()[0] for n in ("W8A8 static",)]
    model = nn.ModuleList([linear, *others, PerTensor()])
    with warnings.catch_warnings(), fresh(), torch.no_grad():
        warnings.simplefilter("ignore")
        decisions = prepare_(model, same_codes=False)
        assert relative_error(model[0](x), expected.to(x.dtype)) < 2e-2
    assert [each.outcome for each in decisions] == [SWAPPED] * len(model)
    assert [isinstance(each, IntLinear) for each in model] == [True, False, False]
    assert model[0].activation == "int8"
    assert "with our own quantiser" in decisions[0].reason


def test_layers_of_equal_arithmetic_share_its_code_and_can_be_copied() -> None:
    model = nn.ModuleList([PerTensor(), PerTensor()])
    assert converted(model) == [(SWAPPED, "w8a8")] * 2
    first, second = model
    assert first.run is second.run
    x = torch.randn(3, 5, 64)
    for same in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        assert torch.equal(same(x), second(x))
        same.load_state_dict(first.state_dict())
        assert torch.equal(same(x), first(x))


def _checks_a_layer(layers: list[nn.Module], x: torch.Tensor) -> float:
    """How much torch.compile checks at every call for each layer but the first."""
    counted = []

    def keep(guards: Sequence[Any]) -> list[bool]:
        counted.append(len(guards))
        return [True] * len(guards)

    with fresh(), torch.no_grad():
        for model in (layers[0], nn.Sequential(*layers)):
            torch.compile(model, backend="eager", options={"guard_filter_fn": keep})(x)
            torch.compiler.reset()
    return (counted[1] - counted[0]) / (len(layers) - 1)


def test_torch_compile_checks_no_more_of_a_prepared_layer_than_of_our_own() -> None:
    prepared = nn.Sequential(PerTensor(64), PerTensor(64), PerTensor(64))
    ours = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in prepared))
    converted(prepared)
    quantize_(ours, Int8DynamicActivationInt8Weight())
    x = torch.randn(4, 64)
    assert _checks_a_layer([*prepared], x) <= _checks_a_layer([*ours], x)


def test_originals_are_released_and_shared_modules_stay_shared() -> None:
    shared = module_zoo.GptFastInt8()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    gone = weakref.ref(shared)
    del shared
    assert converted(model) == [(SWAPPED, "w8a16")] * 2
    gc.collect()
    assert gone() is None
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], IntLinear)
    assert type(model["c"]) is nn.Linear


def test_what_cannot_be_read_stays_and_says_why() -> None:
    unknown = module_zoo.HiddenKernel(
        qweight=torch.zeros(4, 64, dtype=torch.int32), in_features=32, out_features=64
    )
    model = nn.Sequential(unknown)
    with fresh(), torch.no_grad():
        (decision,) = prepare_(model)
    assert decision.outcome == DECLINED
    assert "exception" in decision.reason
    assert model[0] is unknown
    with pytest.raises(TypeError, match="prepare_: the model is a GptFastInt8"):
        prepare_(module_zoo.GptFastInt8())


def test_act_order_keeps_its_permutation_in_the_state_dict() -> None:
    linear, _, _ = module_zoo.MODULES["GPTQ: 4-bit v1, act-order"][0]()
    model = nn.Sequential(linear)
    converted(model)
    assert isinstance(model[0], PackedLinear)
    assert "0.order" in model.state_dict()
    assert "act_order=True" in repr(model[0])
