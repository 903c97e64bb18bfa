"""Weights whose codes index a table, in graphs: NF4 by hand, bitsandbytes' operations, others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_helpers import DECLINED, SWAPPED, Counting, fresh, outcomes
from torch import Tensor, nn

from intlass_ops import IntLinear, Lut4Linear, lowering, lut4
from intlass_ops.lowering import blocks, runtime
from intlass_ops.prepare import prepare_

N, K, GROUP = 96, 256, 64
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
# And how weights that index them are stored
KNOWN: dict[str, tuple[list[float], str]] = {
    "e2m1": (FP4, "fp4a16"),
    "e2m1, twice": ([2 * v for v in FP4], "fp4a16"),
    "e2m1 up to 1": ([v / 6 for v in FP4], "fp4a16"),
    "bitsandbytes": ([v / 192 for v in lut4.TABLES["bnbfp4"]], "bnbfp4a16"),
    "IQ4_NL": (list(lut4.TABLES["iq4nl"]), "iq4nla16"),
    "integers": ([v * abs(v) / 2.0 for v in range(-8, 8)], "w8a16"),
}
OTHER = [v**3 / 7 for v in range(-8, 8)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Looked(nn.Module):
    """w = table[codes] * scales; `weight`: [N, K] from table, high nibbles, low nibbles, scales."""

    def __init__(
        self,
        weight: Callable[..., Tensor],
        table: list[float] = [*lut4.TABLES["nf4"]],  # noqa: B006
        dtype: torch.dtype = torch.float32,
        *,
        constant: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = K
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", random(N, K // GROUP).abs() + 0.1)
        self.weight_of, self.numbers, self.dtype = weight, table, dtype
        if not constant:
            self.register_buffer("table", torch.tensor(table, dtype=dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        table = getattr(self, "table", None)
        table = torch.tensor(self.numbers, dtype=self.dtype) if table is None else table
        high, low = self.codes >> 4, self.codes & 15
        return self.weight_of(table, high, low, self.scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype))


def _joined(high: Tensor, low: Tensor) -> Tensor:
    return torch.stack([high, low], -1).reshape(N, K)


def _scaled(numbers: Tensor, scales: Tensor) -> Tensor:
    return (numbers.reshape(N, -1, GROUP) * scales.to(numbers.dtype).unsqueeze(-1)).reshape(N, K)


def by_index(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    return _scaled(table[_joined(high, low).long()], scales)


def _low_first(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    return by_index(table, low, high, scales)


def _selected(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    return _scaled(table.index_select(0, _joined(high, low).flatten().int()), scales)


def _gathered(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    return _scaled(table.gather(0, _joined(high, low).flatten().long()), scales)


def _embedded(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    codes = _joined(high, low).long()
    return _scaled(nn.functional.embedding(codes, table.unsqueeze(1)), scales)


def _apart(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    """Each half of a byte is looked up and scaled before they meet."""
    halves = [table[half.int()].reshape(N, -1, GROUP // 2) for half in (high, low)]
    scaled = [half * scales.to(table.dtype).unsqueeze(-1) for half in halves]
    return torch.stack(scaled, -1).reshape(N, K)


def _transposed(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    codes = _joined(high, low).t().contiguous()
    return (table[codes.int()] * scales[:, :1].t()).t()


def _one_scale(table: Tensor, high: Tensor, low: Tensor, scales: Tensor) -> Tensor:
    return table[_joined(high, low).int()] * scales[0, 0]


SPELLINGS = {
    each.__name__.strip("_"): each
    for each in (
        by_index, _low_first, _selected, _gathered, _embedded, _apart, _transposed, _one_scale,
    )
}  # fmt: skip


def compiled(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = torch.compile(module, backend=Counting(), fullgraph=True)(x)
    return y


def check(y: Tensor, x: Tensor, w: Tensor, bound: float, bias: Tensor | None = None) -> None:
    """Within the decision's bound of the weight that the graph has."""
    exact, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert bool(((y.double() - exact).abs() <= bound * size).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_swapped(name: str, dtype: torch.dtype) -> None:
    module, x = Looked(SPELLINGS[name]), random(3, K).to(dtype)
    with fresh():
        y = compiled(module, x)
        assert outcomes() == [SWAPPED]
        (decision,) = lowering.report()
    assert decision.scheme == "nf4a16"
    assert decision.bound is not None
    check(y, x, module.dense(torch.float32), decision.bound)
    assert lowering.counters()["run.packed.nf4"]


def test_numbers_and_scales_are_read_exactly() -> None:
    module, x = Looked(by_index), torch.eye(K)
    with fresh():
        assert torch.equal(compiled(module, x).T, module.dense(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_table_may_be_rounded(dtype: torch.dtype) -> None:
    module, x = Looked(by_index, dtype=dtype), random(3, K).to(dtype)
    with fresh():
        y = compiled(module, x)
        (decision,) = lowering.report()
        assert decision.as_stored().scheme == "nf4a16"
    assert decision.bound is not None
    check(y, x, module.dense(torch.float32), decision.bound)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_tables_are_known_by_their_numbers(name: str, constant: bool) -> None:
    table, scheme = KNOWN[name]
    if constant and all(float(number).is_integer() for number in table):
        scheme = "w8a16"  # what the graph multiplies are integers, however it came by them
    module, x = Looked(by_index, table, constant=constant), torch.eye(K)
    with fresh():
        y = compiled(module, x)
        (decision,) = lowering.report()
        assert decision.as_stored().scheme == scheme
    # of thirds the scale is rounded in place of the number
    torch.testing.assert_close(y.T, module.dense(torch.float32), rtol=2**-22, atol=0)


def test_a_table_of_the_graph_is_looked_at_when_it_is_compiled() -> None:
    for table, outcome in ((list(lut4.TABLES["nf4"]), SWAPPED), (OTHER, DECLINED)):
        module, x = Looked(by_index, table, constant=True), random(3, K)
        with fresh():
            y = compiled(module, x)
            assert outcomes() == [outcome]
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    assert "index a table" in lowering.report()[-1].reason


def test_another_table_in_a_buffer_stays_dense() -> None:
    module, x = Looked(by_index, OTHER), random(3, K)
    with fresh():
        with pytest.warns(UserWarning, match="index a table of numbers that are neither known"):
            y = compiled(module, x)
        (decision,) = lowering.report()
        assert decision.as_stored().outcome == DECLINED
    torch.testing.assert_close(y, module(x))


def _shifted(*args: Tensor) -> Tensor:
    return by_index(*args) + 0.5


def _clamped(*args: Tensor) -> Tensor:
    return by_index(*args).clamp(max=0.2)


def _squared(*args: Tensor) -> Tensor:
    return by_index(*args).square()


def _added(*args: Tensor) -> Tensor:
    w = by_index(*args)
    return w + w.flip(1)


@pytest.mark.parametrize("weight", [_shifted, _clamped, _squared, _added])
def test_what_is_no_number_times_a_scale_is_declined(weight: Callable[..., Tensor]) -> None:
    module, x = Looked(weight), random(3, K)
    with fresh(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        y = compiled(module, x)
        assert SWAPPED not in [each.as_stored().outcome for each in lowering.report()]
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_rows_of_zeros_before_others() -> None:
    """0, 1 and -1 are numbers of every table: which one it is, later rows say."""
    for table, scheme in ((list(lut4.TABLES["nf4"]), "nf4a16"), KNOWN["e2m1"], KNOWN["integers"]):
        module, x = Looked(by_index, table), torch.eye(K)
        zero = table.index(0.0)
        module.codes[: N // 2] = 17 * zero
        with fresh(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "BLOCK_ELEMENTS", 8 * K)
            y = compiled(module, x)
            (decision,) = lowering.report()
            assert decision.as_stored().scheme == scheme
        assert torch.equal(y.T, module.dense(torch.float32))


def test_a_weight_is_measured_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * K)
    monkeypatch.setattr(blocks, "whole", None)
    module, x = Looked(by_index), torch.eye(K)
    with fresh():
        assert torch.equal(compiled(module, x).T, module.dense(torch.float32))


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Looked(by_index) for _ in range(3))
        self.parts[1].codes.bitwise_xor_(5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def test_products_of_one_input_are_one() -> None:
    module, x = Siblings(), torch.eye(K)
    with fresh():
        before = lowering.counters().get("run.packed.nf4", 0)
        y = compiled(module, x)
        assert lowering.counters()["run.packed.nf4"] == before + 1
    assert torch.equal(y.T, torch.cat([part.dense(torch.float32) for part in module.parts]))


def test_activations_that_were_codes_are_floats() -> None:
    class Quantised(Looked):
        def forward(self, x: Tensor) -> Tensor:
            codes = x.round().clamp(-128, 127).to(torch.int8)
            return nn.functional.linear(codes.float(), self.dense(torch.float32)) * 0.5

    module, x = Quantised(by_index), 20 * random(3, K)
    with fresh():
        y = compiled(module, x)
        assert outcomes() == [SWAPPED]
        assert lowering.report()[0].scheme == "nf4a16"
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize(
    ("table", "kind"), [(KNOWN["e2m1"][0], Lut4Linear), (KNOWN["integers"][0], IntLinear)]
)
def test_prepare_makes_linears_of_modules(table: list[float], kind: type[nn.Module]) -> None:
    model, x = nn.Sequential(Looked(by_index, table)), torch.eye(K)
    w = model[0].dense(torch.float32)
    (decision,) = prepare_(model)
    assert decision.outcome == SWAPPED, decision
    assert type(model[0]) is kind
    assert torch.equal(model(x).T, w)


def test_gradients_reach_activations() -> None:
    module, x = Looked(by_index), random(3, K).requires_grad_()
    with fresh():
        torch.compile(module, backend=Counting(), fullgraph=True)(x).sum().backward()
        assert SWAPPED in outcomes()
    expected = module.dense(torch.float32).sum(0).expand(3, K)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# bitsandbytes


def four_bit(nested: bool, kind: str = "nf4", n: int = N, k: int = K, **how: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Linear4bit(k, n, quant_type=kind, compress_statistics=nested, **how)
    weight = random(n, k, seed=7) * (1 + random(n, 1).abs())  # scales of many sizes
    module.load_state_dict({"weight": weight, "bias": random(n)})
    return module.to("cpu").train()  # which keeps it from laying its weight out for this CPU


def dense_of(module: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = module.weight.quant_state
    state.dtype = dtype
    w: Tensor = dequantize_4bit(module.weight.data, state)
    return w


class Dequantised(nn.Module):
    """As older versions multiply many tokens, and gradients."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        w = dequantize_4bit(self.inner.weight, self.inner.weight.quant_state)
        return nn.functional.linear(x, w.to(x.dtype), self.inner.bias.to(x.dtype))


class OneToken(nn.Module):
    """As older versions multiply one."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        w, state = self.inner.weight, self.inner.weight.quant_state
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
            x, w, state.shape, state.absmax, state.code, state.blocksize
        )
        return y + self.inner.bias.to(x.dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("nf4", torch.bfloat16), ("fp4", torch.float16), ("nf4", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("wrap", [nn.Sequential, Dequantised, OneToken], ids=lambda w: w.__name__)
def test_operations_of_bitsandbytes(
    wrap: Callable[[Any], nn.Module], nested: bool, kind: str, dtype: torch.dtype
) -> None:
    if wrap is OneToken and nested:
        pytest.skip("that operation has plain scales")
    inner = four_bit(nested, kind, compute_dtype=dtype)
    w = dense_of(inner)
    inner.weight.quant_state.dtype = dtype
    module, x = wrap(inner), random(1 if wrap is OneToken else 3, K).to(dtype)
    with fresh():
        with torch.no_grad():
            y = torch.compile(module, backend=Counting())(x)
        assert outcomes() == [SWAPPED], lowering.report()
        (decision,) = lowering.report()
    scheme = {"nf4": "nf4a16", "fp4": "bnbfp4a16"}[kind]
    assert decision.as_stored().scheme == scheme
    assert decision.bound is not None
    check(y, x, w, decision.bound, inner.bias.detach())


@pytest.mark.parametrize("nested", [False, True])
def test_bytes_in_another_type(nested: bool) -> None:
    inner = four_bit(nested, compute_dtype=torch.float32, quant_storage=torch.bfloat16)
    w = dense_of(inner)
    with fresh(), torch.no_grad():
        y = torch.compile(nn.Sequential(inner), backend=Counting())(torch.eye(K))
        assert outcomes() == [SWAPPED], lowering.report()
    torch.testing.assert_close((y - inner.bias).T, w, rtol=1e-5, atol=1e-5)


def test_scales_of_bitsandbytes_need_not_fill_their_last_block() -> None:
    inner = four_bit(True, n=100, k=192, compute_dtype=torch.float32)
    w = dense_of(inner)
    with fresh(), torch.no_grad():
        y = torch.compile(nn.Sequential(inner), backend=Counting())(torch.eye(192))
        assert outcomes() == [SWAPPED]
    torch.testing.assert_close((y - inner.bias).T, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(four_bit(True, k=160)), "K=160 with blocksize=64: blocks that run"),
    ],
)
def test_what_bitsandbytes_has_and_we_have_not(make: Callable[[], nn.Module], reason: str) -> None:
    module = make()
    k = next(each.in_features for each in module.modules() if hasattr(each, "in_features"))
    x = random(3, k).bfloat16()
    with fresh(), torch.no_grad():
        y = torch.compile(module, backend=Counting())(x)
        assert outcomes() == [DECLINED]
        assert reason in lowering.report()[0].reason
        torch.testing.assert_close(y, module(x))


def test_a_weight_that_is_laid_out_for_a_cpu_is_left() -> None:
    """As CPUs with AVX512's bfloat16 have it after a call; others cannot run it."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    inner = four_bit(False, compute_dtype=torch.bfloat16)
    weight = inner.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    with fresh(), torch.no_grad(), contextlib.suppress(Exception):
        torch.compile(OneToken(inner), backend=Counting())(random(1, K).bfloat16())
    assert outcomes() == [DECLINED]
    assert "laid its weight out for this CPU" in lowering.report()[0].reason


def test_adapters_of_bitsandbytes_train() -> None:
    """QLoRA: gradients through a weight that does not train."""
    inner = four_bit(True, compute_dtype=torch.float32)
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    w, x = dense_of(inner), random(3, K).requires_grad_()
    with fresh():
        torch.compile(nn.Sequential(inner), backend=Counting())(x).sum().backward()
        assert SWAPPED in outcomes(), lowering.report()
    expected = w.sum(0).expand(3, K)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPELLINGS)
def test_on_a_gpu(name: str) -> None:
    module = Looked(SPELLINGS[name]).cuda()
    x = random(5, K).bfloat16().cuda()
    with fresh():
        with torch.no_grad():
            y = torch.compile(module, backend=lowering.backend, fullgraph=True)(x)
        (decision,) = lowering.report()
        assert decision.as_stored().scheme == "nf4a16"
    assert decision.bound is not None
    check(y, x, module.dense(torch.float32), decision.bound)
    runtime.invalidate()
