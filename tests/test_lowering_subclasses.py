"""Weights that are tensor subclasses: their parts are the inputs of what is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lowering_helpers import SWAPPED, Counting, outcomes, relative_error
from torch import Tensor, nn
from torch.nn import functional

from intlass_ops import lowering
from intlass_ops.lowering import graph_pass

N, K = 32, 64


class Codes(Tensor):
    """Int8 codes and two scales per row, of which the first or the second holds, as libraries wrap
    them."""

    codes: Tensor
    first: Tensor
    second: Tensor
    which: str

    @staticmethod
    def __new__(cls, codes: Tensor, first: Tensor, second: Tensor, which: str) -> Codes:
        made: Codes = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=first.dtype, device=codes.device
        )
        made.codes, made.first, made.second, made.which = codes, first, second, which
        return made

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["codes", "first", "second"], {"which": self.which}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, *_: Any) -> Codes:
        return Codes(inner["codes"], inner["first"], inner["second"], context["which"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and isinstance(args[1], Codes):
            x, w = args[:2]
            dense = w.codes.to(x.dtype) * getattr(w, w.which).unsqueeze(-1)
            return functional.linear(x, dense, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Codes(args[0].codes, args[0].first, args[0].second, args[0].which)
        raise NotImplementedError(func)


def linear(device: str, which: str = "first", seed: int = 0) -> nn.Linear:
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(K, N, bias=False).to(device, torch.bfloat16).requires_grad_(False)
    codes = torch.randint(-127, 128, (N, K), generator=g).to(device, torch.int8)
    scales = [(torch.rand(N, generator=g) + 0.5).to(device, torch.bfloat16) / 100 for _ in range(2)]
    layer.weight = nn.Parameter(Codes(codes, *scales, which), requires_grad=False)
    return layer


@pytest.fixture(autouse=True)
def _asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with a PyTorch that asks each weight at every call what it is made of."""
    monkeypatch.setattr(graph_pass, "SUBCLASSES_ARE_ASKED", True)
    torch._dynamo.reset()
    lowering.clear_report()
    yield
    torch._dynamo.reset()


def test_parts_are_inputs_and_nothing_goes_stale(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.dtype]] = []
    rewrite = graph_pass.rewrite

    def look(graph: torch.fx.Graph, edit: Any) -> None:
        seen.append([node.meta["val"].dtype for node in edit.static])
        rewrite(graph, edit)

    monkeypatch.setattr(graph_pass, "rewrite", look)
    model, backend = nn.Sequential(linear(device), nn.ReLU()), Counting()
    x = torch.randn(5, K, device=device).bfloat16()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert relative_error(compiled(x), model(x)) < 2e-2
        assert outcomes() == [SWAPPED]
        model[0].weight.codes.neg_()
        assert relative_error(compiled(x), model(x)) < 2e-2
        model[0].weight = linear(device, seed=2).weight
        assert relative_error(compiled(x), model(x)) < 2e-2
    assert backend.compiles == 1
    assert [sorted(map(str, each)) for each in seen] == [
        ["torch.bfloat16", "torch.bfloat16", "torch.int8"]
    ]


def test_what_is_no_tensor_of_a_weight_is_part_of_the_cache_key(device: str) -> None:
    """Alike in everything that is an input: the second graph must not be the first one's."""
    x = torch.randn(5, K, device=device).bfloat16()
    for which in ("first", "second"):
        torch._dynamo.reset()
        model = linear(device, which)
        with torch.no_grad():
            y = torch.compile(model, backend=lowering.backend, fullgraph=True)(x)
            assert relative_error(y, model(x)) < 2e-2


def test_activations_keep_their_gradient(device: str) -> None:
    model, x = linear(device), torch.randn(5, K, device=device).bfloat16().requires_grad_()
    compiled = torch.compile(model, backend=Counting(), fullgraph=True)
    compiled(x).float().square().sum().backward()
    found, x.grad = x.grad, None
    model(x).float().square().sum().backward()
    assert found is not None
    assert x.grad is not None
    assert relative_error(found, x.grad) < 3e-2
