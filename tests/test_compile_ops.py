"""The ops and IntLinear under torch.compile (fullgraph) and torch.export, dynamic shapes included.

The backends here only trace; what backend="intlass" makes of a graph is tested with lowering/.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from gemm_case import Case, build
from illegal import MUTATIONS, Mutation
from strategies import BF16, FP32, SCHEMES, a_zero_of
from tolerance import assert_identical
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import intlass_ops as ia

each_scheme = pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8", "w4a8", "w4a4"])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="aot_eager", fullgraph=True, **options)


def model(scheme: str, device: str, dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48, bias=False))
    ia.quantize_(layers, SCHEMES[scheme])
    return layers.to(dtype).to(device)


_CASES = [
    Case("bf16", "u4", k=96, groups=3, bias=FP32, alpha="float"),
    Case("s8", "s8", lead=(2, 3), a_scale="token", a_zero=torch.int32, alpha="tensor"),
    Case("u4", "s4", k=33, a_scale="flat", a_zero=a_zero_of("u4")),
    Case("fp32", "s8", groups=4),
    Case("bf16", "e4m3", groups=4, bias=BF16, activation="silu", residual=True),
    Case("bf16", "nf4", k=33, bias=FP32, activation="silu", residual=True),
]


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_compiled_calls_equal_eager_ones(case: Case, device: str) -> None:
    call = build(case, device, numbers="random")
    assert_identical(compiled(call.run)(), call.run())


def test_compiled_quantisers_equal_eager_ones(device: str) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).to(device)

    def quantise(x: Tensor) -> list[Tensor | None]:
        q, scale, zero = ia.quantize_int4(x, granularity="group", group_size=32, symmetric=False)
        again = ia.quantize_int4(x, scale, zero, granularity="group", group_size=32)
        stochastic, _, _ = ia.quantize_int8(x, rounding="stochastic", seed=3)
        return [
            q,
            scale,
            zero,
            again,
            stochastic,
            ia.unpack_int4(q),
            ia.pack_int4(ia.unpack_int4(q)),
        ]

    for got, expected in zip(compiled(quantise)(x), quantise(x), strict=True):
        assert_identical(got, expected)


def test_compiled_stochastic_rounding_draws_anew_at_each_call(device: str) -> None:
    """The seed is drawn when the graph runs, not when it is traced."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    quantise = compiled(lambda x: ia.quantize_int8(x, rounding="stochastic")[0])
    assert not torch.equal(quantise(x), quantise(x))


# ----------------------------------------------------------------------------------- dynamic shapes

_TOKENS = (7, 2, 300, 4096)


@each_scheme
def test_one_graph_for_any_number_of_tokens(scheme: str, device: str) -> None:
    """PyTorch itself gives sizes 0 and 1 graphs of their own, unless a dimension is unbacked."""
    layers = model(scheme, device)
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(layers, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in _TOKENS:
            x = torch.randn(m, 64, dtype=BF16, device=device)
            assert_identical(fn(x), layers(x))
        assert counter.frame_count == 1
        fn(x[:1])
        fn(x[1:2])
        assert counter.frame_count == 2


@each_scheme
def test_one_graph_for_all_sizes_when_unbacked(scheme: str, device: str) -> None:
    layers = model(scheme, device)
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(layers, backend=counter, fullgraph=True)
    with torch.no_grad():
        for m in (1, *_TOKENS, 0):
            x = torch.randn(m, 64, dtype=BF16, device=device)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            assert_identical(fn(x), layers(x))
    assert counter.frame_count == 1


def test_batch_and_sequence_are_dynamic_together(device: str) -> None:
    layers = model("w8a8", device)
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(layers, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lead in ((2, 3), (4, 5), (3, 64), (16, 2)):
            x = torch.randn(*lead, 64, dtype=BF16, device=device)
            assert_identical(fn(x), layers(x))
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------- errors

_REFUSED_CASES = [
    Case("bf16", "u4", lead=(2,), n=5, k=96),
    Case("s8", "s8", lead=(2,), n=5, k=96, a_scale="token"),
    Case("fp16", "e4m3", lead=(2,), n=5, k=96),
    Case("fp16", "nf4", lead=(2,), n=5, k=96),
]


def message_of(error: type[Exception] | tuple[type[Exception], ...], fn: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        fn()
    return str(caught.value)


@pytest.mark.parametrize(
    ("mutation", "case"),
    [(m, c) for c in _REFUSED_CASES for m in MUTATIONS if m.applies(c)],
    ids=str,
)
def test_errors_read_the_same_when_compiled(mutation: Mutation, case: Case) -> None:
    illegal = mutation.mutate(build(case, "cpu"))
    eager = message_of(mutation.error, illegal.run)
    # Dynamo reports an error of a fake kernel in an exception of its own.
    fn = torch.compile(illegal.run, backend="eager", fullgraph=True)
    assert eager in message_of(Exception, fn)


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "up"},
        {"seed": 3},
        {"granularity": "group", "group_size": 40},
        {"granularity": "group"},
        {"scale": torch.ones(3)},
    ],
    ids=str,
)
def test_quantiser_errors_read_the_same_when_compiled(options: dict[str, Any]) -> None:
    x = torch.zeros(2, 64)
    eager = message_of(ValueError, lambda: ia.quantize_int8(x, **options))
    fn = torch.compile(lambda: ia.quantize_int8(x, **options), backend="eager", fullgraph=True)
    assert eager in message_of(Exception, fn)


# ---------------------------------------------------------------------------------------- gradients


def test_gradients_through_a_compiled_graph(device: str) -> None:
    layers = model("w4a16", device, FP32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(device)
    grads = []
    for fn in (layers, compiled(layers, dynamic=True)):
        leaf = x.clone().requires_grad_()
        fn(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:Error detected in")  # PyTorch's own, beside the error
def test_a_missing_gradient_is_named_when_compiled(device: str) -> None:
    x = torch.randn(5, 64, dtype=BF16, device=device, requires_grad=True)
    with pytest.raises(Exception, match="matmul_int8_bf16_tn: a_scale requires a gradient"):
        compiled(model("w8a8", device))(x).sum().backward()


# ------------------------------------------------------------------------------------------- export


@each_scheme
def test_export_keeps_the_ops_and_any_number_of_tokens(scheme: str, device: str) -> None:
    layers = model(scheme, device)
    x = torch.randn(8, 64, dtype=BF16, device=device)
    tokens = Dim("tokens", min=1, max=4096)
    program = torch.export.export(layers, (x,), dynamic_shapes=({0: tokens},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    op = "int8" if scheme.startswith("w8") else "int4"
    assert targets.count(f"intlass.matmul_{op}_bf16_tn.default") == 2
    assert targets.count("intlass.quantize_dynamic.default") == (0 if scheme.endswith("a16") else 2)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for m in (1, 2, 300):
        x = torch.randn(m, 64, dtype=BF16, device=device)
        assert_identical(loaded(x), layers(x))


def test_export_of_packing() -> None:
    class Repack(nn.Module):
        def forward(self, packed: Tensor) -> Tensor:
            return ia.pack_int4(ia.unpack_int4(packed, signed=False) ^ 8)

    packed = oracle.pack(torch.randint(0, 16, (3, 6)))
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = torch.export.export(Repack(), (packed,), dynamic_shapes=shapes)
    for shape in ((5, 9), (2, 2)):
        packed = torch.randint(0, 256, shape, dtype=torch.uint8)
        assert_identical(program.module()(packed), packed ^ 0x88)
