"""Like layers of a module lie side by side and are one GEMM where they share an input."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_helpers import TOLERANCE, Counting, fresh, relative_error
from torch import Tensor, nn

import intlass_ops
from intlass_ops import cpu_integers, lowering
from intlass_ops.prepare import prepare_
from intlass_ops.side_by_side import as_one, lay_siblings

K, SIZES = 64, (64, 32, 48)
SCHEMES: dict[str, Any] = {
    "w4a16": intlass_ops.Int4WeightOnly(32),
    "w8a16": intlass_ops.Int8WeightOnly(32),
    "w8a8": intlass_ops.Int8DynamicActivationInt8Weight(),
    "w4a8": intlass_ops.Int8DynamicActivationInt4Weight(32),
    "w4a4": intlass_ops.Int4DynamicActivationInt4Weight(32),
}
X = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(3)).bfloat16()
W4A16 = SCHEMES["w4a16"]
OP = torch.ops.intlass.matmul_siblings.default


class Three(nn.Module):
    """q, k and v of one input, and a fourth layer like them that reads something else."""

    def __init__(self, seed: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = (nn.Linear(K, n, bias=bias) for n in SIZES)
        self.o = nn.Linear(K, K, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, q = self.v(x), self.q(x)
        return self.o(q), self.k(x), v


def three(scheme: Any = W4A16, seed: int = 0, **options: Any) -> Three:
    model = Three(seed, **options).bfloat16().requires_grad_(False)
    intlass_ops.quantize_(model, scheme)
    return model


def weights(model: Three) -> list[Tensor]:
    return [getattr(model, name).weight for name in "qkv"]


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(relative_error(y, z) < TOLERANCE[y.dtype] for y, z in pairs)


def joined(backend: Counting) -> list[int]:
    """How many linears each joined GEMM of the compiled graphs has."""
    graphs = [each.graph for each in backend.graphs]
    return [len(node.args[1]) for graph in graphs for node in graph.nodes if node.target is OP]


def compiled(model: nn.Module, backend: Counting, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_of_one_input_are_one_gemm(scheme: str, bias: bool) -> None:
    model, backend = three(SCHEMES[scheme], bias=bias), Counting()
    with fresh(), torch.no_grad():
        found = compiled(model, backend)(X)
        assert same(found, model(X))
    assert joined(backend) == [3]
    assert all(y.is_contiguous() for y in found)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in model.buffers())


class Int8Dynamic(nn.Module):
    """Of another library: its own arithmetic makes codes of the activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("scale", linear.weight.float().abs().amax(1) / 127)
        codes = (linear.weight.float() / self.scale.unsqueeze(1)).round().to(torch.int8)
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.5
        codes = (rows / scale).round().clamp(-128, 127).to(torch.int8)
        y = torch._int_mm(codes, self.codes.t()).float() * scale * self.scale
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def test_prepared_linears_with_activations_of_their_own_are_one_gemm() -> None:
    model = Three().bfloat16().requires_grad_(False)
    for name in "qkvo":
        setattr(model, name, Int8Dynamic(getattr(model, name)))
    x = X.repeat(1, 7, 1)  # rows enough for torch._int_mm
    with fresh(), torch.no_grad():
        expected = model(x)
        prepare_(model)
        for each in (model, copy.deepcopy(model)):
            backend = Counting()
            assert same(compiled(each, backend)(x), expected)
            assert joined(backend) == [3]
            parts = [getattr(each, name).weight for name in "qkv"]
            assert as_one(parts) is not None


def test_a_quantised_swiglu_reads_the_halves_where_they_are() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Linear(K, 2 * K, bias=False) for _ in range(2))
            self.down = nn.Linear(2 * K, K, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            return y

    model, backend = Mlp().bfloat16(), Counting()
    intlass_ops.quantize_(model, SCHEMES["w8a8"])
    expected = (model(X),)
    with fresh(), torch.no_grad():
        assert same((compiled(model, backend)(X),), expected)
    assert joined(backend) == [2]
    (graph,) = (each.graph for each in backend.graphs)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    # without VNNI, INT8 products of a CPU are the reference's, which strict() would refuse
    strict = intlass_ops.strict() if cpu_integers.is_exact() else contextlib.nullcontext()
    with fresh(), torch.no_grad(), strict:
        explanation = intlass_ops.explain(compiled(model, Counting(real=True)), X)
    assert same((explanation.result,), expected)
    found = {d.path: (d.shape, d.scheme, d.group_size) for d in explanation.linears}
    assert found == dict.fromkeys(("gate", "up"), ((2 * K, K), "w8a8", K))
    assert str(explanation).count(f"fused to N={4 * K}") == 2


def _swap(m: Three) -> None:
    m.k.weight = m.k.weight.flip(0).contiguous()


def _scale_in_place(m: Three) -> None:
    m.v.scales.mul_(-2)


def _swap_scales(m: Three) -> None:
    m.q.scales = m.q.scales * 3


def _assign_data(m: Three) -> None:
    m.q.weight.data = m.q.weight.flip(1).contiguous()


def _load(m: Three) -> None:
    m.load_state_dict(three(seed=7).state_dict())


def _load_assign(m: Three) -> None:
    state = three(seed=8).state_dict()
    m.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)


def _exchange(m: Three) -> None:
    m.q, m.o = m.o, m.q


def _copy_each(m: Three) -> None:
    m._apply(torch.clone)
    m.q.weight.bitwise_not_()


CHANGES = [
    _swap,
    _scale_in_place,
    _swap_scales,
    _assign_data,
    _load,
    _load_assign,
    _exchange,
    _copy_each,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: Callable[[Three], None]) -> None:
    backend, model = Counting(), three()
    with fresh(), torch.no_grad():
        call = compiled(model, backend)
        before = call(X)
        change(model)
        assert not same(before, model(X))
        assert same(call(X), model(X))
    assert backend.compiles == 1


def test_weights_that_are_gone_are_forgotten() -> None:
    model = three()
    lists = weights(model), [getattr(model, name).scales for name in "qkv"], [], []
    first = OP(X, *lists)
    assert len(lowering.joined._SIDE_BY_SIDE) == 1
    assert torch.equal(OP(X, *lists), first)
    del model, lists
    gc.collect()
    assert not lowering.joined._SIDE_BY_SIDE


def test_instances_that_lie_otherwise_run_the_same_graph() -> None:
    backend, apart = Counting(), three(seed=1)
    for layer in (apart.q, apart.k, apart.v):
        layer.load_state_dict(
            {name: t.clone() for name, t in layer.state_dict().items()}, assign=True
        )
    assert as_one(weights(apart)) is None
    with fresh(), torch.no_grad():
        for model in (three(), three(seed=2), apart, copy.deepcopy(apart)):
            assert same(compiled(model, backend)(X), model(X))
        assert backend.compiles == 1


@pytest.mark.parametrize("names", [("q", "k", "v"), ("v", "k", "q"), ("q", "v", "o")])
def test_every_order_in_memory_is_right(names: tuple[str, ...]) -> None:
    class Calls(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(getattr(self, name)(x) for name in names)

    model, backend = Calls().bfloat16(), Counting()
    intlass_ops.quantize_(model, W4A16)
    with fresh(), torch.no_grad():
        explanation = intlass_ops.explain(compiled(model, backend), X)
        assert same(explanation.result, model(X))
    assert joined(backend) == [3]
    # Between q and v lies k: only v and o are one.
    assert len(explanation.dispatches) == (2 if "o" in names else 1)


def test_control_flow_takes_the_layers() -> None:
    class Branches(Three):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.one, self.other, (x,))

        def one(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x)], -1)

        def other(self, x: Tensor) -> Tensor:
            return torch.cat([self.k(x), self.q(x)], -1)

    model = Branches().bfloat16()
    intlass_ops.quantize_(model, W4A16)
    with fresh(), torch.no_grad():
        assert same((compiled(model, Counting())(X),), (model(X),))


def test_rows_are_dynamic_and_gradients_stay() -> None:
    backend, model = Counting(), three()
    with fresh():
        with torch.no_grad():
            call = compiled(model, backend, dynamic=True)
            for rows in (5, 2, 64, 4096):
                x = torch.randn(rows, K).bfloat16()
                torch._dynamo.mark_dynamic(x, 0)
                assert same(call(x), model(x))
        assert backend.compiles == 1
        assert joined(backend) == [3]
        x = X.clone().requires_grad_()
        found = torch.autograd.grad(sum(y.sum() for y in call(x)), x)
        assert same(found, torch.autograd.grad(sum(y.sum() for y in model(x)), x))


def _through_a_file(m: Three) -> Three:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    loaded: Three = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        _through_a_file,
        lambda m: m.half(),
        lambda m: m.type(torch.float32),
        lambda m: m._apply(lambda t: t.clone()),  # what a move to another device does
    ],
)
def test_copies_lie_side_by_side(copied: Callable[[Three], Three]) -> None:
    model = three(intlass_ops.Int4WeightOnly(32, method="mse"))  # scales in fp32
    expected = model(X)
    model = copied(model)
    parts = ("weight", "scales", "zeros")
    assert all(
        as_one([m.get_buffer(part) for m in (model.q, model.k)]) is not None for part in parts
    )
    assert same(model(X), expected)
    backend = Counting()
    with fresh(), torch.no_grad():
        assert same(compiled(model, backend)(X), expected)
    assert joined(backend) == [3]


def test_a_layer_that_moves_alone_takes_no_more_than_itself() -> None:
    model = three()
    moved = model.k._apply(torch.clone)
    assert moved.weight.untyped_storage().nbytes() == moved.weight.nbytes
    assert as_one(weights(model)) is None
    lay_siblings(model)
    assert as_one(weights(model)) is not None
    empty = model.to("meta").to_empty(device="cpu")
    assert as_one(weights(empty)) is not None


def test_op_has_a_truthful_schema_and_fake() -> None:
    layers = [three(bias=True).q, three(seed=1, bias=True).k]
    parts = [
        [layer.get_buffer(n) for layer in layers] for n in ("weight", "scales", "zeros", "bias")
    ]
    torch.library.opcheck(OP, (X, *parts, K), test_utils=("test_schema", "test_faketensor"))
