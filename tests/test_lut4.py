"""Tables of sixteen numbers: NF4's and others, and what no test of all ops has of their ops.

Not here: those tests, which have them among the weights of a `Case` (test_matmul.py,
test_cpu.py, test_opcheck.py and others); layers and checkpoints.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gemm_case import Case, build
from gemm_checks import check_bounded, check_exact
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from strategies import BF16, FLOATS, FP16, FP32, lut4_cases
from tolerance import assert_close, assert_identical
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from intlass_ops import batch_invariant, config, cpu, dequantize, explain, lut4, matmul_lut4_bf16_tn
from intlass_ops.cuda import source

VALUES = lut4.TABLES["nf4"]

# ---------------------------------------------------------------------------------- numbers, codes


def quantiles(count: int) -> np.ndarray:
    """``count`` upper ones of a normal distribution, their places even from the offset of QLoRA's
    authors to the median, which is left out. In float32, as torch.linspace does it on a CPU."""
    first, last = np.float32(0.9677083), np.float32(0.5)
    i, n = np.arange(count, dtype=np.float32), np.float32(count)
    step = (last - first) / n
    places = np.where(i < (count + 1) // 2, first + step * i, last - step * (n - i))
    return np.asarray(norm.ppf(places.astype(np.float64)), dtype=np.float32)


def test_the_numbers_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA's appendix E, bitsandbytes' create_normal_map: one more above zero than below."""
    found = np.sort(np.concatenate((quantiles(8), [np.float32(0)], -quantiles(7))))
    assert tuple((found / found.max()).tolist()) == VALUES
    assert VALUES == oracle.NF4
    assert len(VALUES) == 16


def test_the_numbers_are_those_of_float32() -> None:
    assert torch.tensor(VALUES).tolist() == list(VALUES)
    assert list(VALUES) == sorted(set(VALUES))
    assert (VALUES[0], VALUES[7], VALUES[15]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 16, 33])
def test_codes_become_numbers_rounded_once(k: int, dtype: torch.dtype, device: str) -> None:
    codes = (torch.arange(16)[:, None] + 7 * torch.arange(k)).to(device) % 16
    found = lut4.decode(oracle.pack(codes), k, "nf4", dtype)
    assert found.dtype == dtype
    assert_identical(found.double(), oracle.numbers("nf4", codes, dtype))


def test_each_number_has_its_code(device: str) -> None:
    numbers = torch.tensor(VALUES, device=device)
    codes = lut4.encode(numbers.view(2, 8), "nf4")
    assert codes.dtype == torch.uint8
    assert codes.tolist() == torch.arange(16).view(2, 8).tolist()
    packed = oracle.pack(codes.flatten())
    assert_identical(lut4.decode(packed, 16, "nf4"), numbers)


@pytest.mark.parametrize("table", lut4.TABLES)
def test_each_number_of_a_table_has_its_code(table: str, device: str) -> None:
    assert lut4.TABLES[table] == oracle.TABLES[table]
    codes = torch.arange(16, device=device)
    values = lut4.decode_codes(codes, table)
    assert_identical(values.double(), oracle.numbers(table, codes))
    again = lut4.encode(values, table)
    assert_identical(lut4.decode_codes(again, table), values)
    assert again.unique().numel() == values.unique().numel()  # of two zeros one


def test_numbers_of_other_tables_are_exact_in_16_bits() -> None:
    for table in ("iq4nl", "fp4", "bnbfp4"):
        for dtype in (BF16, FP16):
            assert tuple(lut4.numbers(table, dtype).tolist()) == lut4.TABLES[table]


def test_kernels_have_the_same_numbers() -> None:
    """cuda/lut4.cuh has the lower and the upper bytes of four at a time."""
    assert tuple(lut4.TABLES) == config.LUT4
    text = (source.SOURCE_DIR / "lut4.cuh").read_text()
    found = re.findall(r"struct Lut4Table<(\w+), (\w+)> {\s+.*{(.*)};\s+.*{(.*)};", text)
    assert {(table, x) for table, x, *_ in found} == {
        *itertools.product(config.LUT4, ("bf16", "fp16"))
    }
    for table, x, low, high in found:
        octets = (
            b"".join(int(word, 16).to_bytes(4, "little") for word in words.split(", "))
            for words in (low, high)
        )
        halves = torch.tensor([a | b << 8 for a, b in zip(*octets, strict=True)])
        numbers = halves.to(torch.uint16).view(BF16 if x == "bf16" else FP16)
        assert_identical(numbers, lut4.numbers(table, numbers.dtype))


def test_halfway_between_two_numbers_is_the_upper_one() -> None:
    numbers = torch.tensor(VALUES, dtype=torch.float64)
    halfway = (numbers[1:] + numbers[:-1]) / 2
    assert lut4.encode(halfway, "nf4").tolist() == list(range(1, 16))
    assert lut4.encode(halfway.nextafter(-torch.ones(())), "nf4").tolist() == list(range(15))


def test_what_lies_beyond_and_what_is_no_number() -> None:
    x = torch.tensor([-1.5, 1.5, -math.inf, math.inf, math.nan, -0.0])
    assert lut4.encode(x, "nf4").tolist() == [0, 15, 0, 15, 7, 7]


@given(st.lists(st.floats(-1.25, 1.25, width=32), min_size=1, max_size=20))
def test_no_number_is_nearer_than_that_of_the_code(values: list[float]) -> None:
    x, numbers = torch.tensor(values), torch.tensor(VALUES).double()
    error = (x.double()[:, None] - numbers).abs()
    chosen = error.gather(1, lut4.encode(x, "nf4").long()[:, None])[:, 0]
    assert torch.equal(chosen, error.amin(1))


# -------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("case", lut4_cases(), ids=lambda c: f"{c}-{c.scale}-{c.out}")
def test_every_number_of_tokens(case: Case, device: str) -> None:
    """Bit for bit where float32 has nothing to round: under bf16 of all sixteen numbers."""
    check_bounded(case, device)
    check_exact(case, device)


@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("table", ["iq4nl", "fp4", "bnbfp4"])
def test_other_tables(table: str, x: str, device: str) -> None:
    for m, scale, out in ((1, FP32, None), (17, BF16, FP32), (300, FP16, BF16)):
        case = Case(x, table, (m,), 48, 160, 5, scale=scale, out=out, bias=FP32)
        check_bounded(case, device)
        check_exact(case, device)


@pytest.mark.parametrize("k", [16, 48, 4100])
@pytest.mark.parametrize("n", [1, 48])
@pytest.mark.parametrize("m", [0, 1, 5, 300])
def test_sizes(m: int, n: int, k: int, device: str) -> None:
    check_exact(Case("bf16", "nf4", (m,), n, k, out=FP32, bias=FP32), device)
    check_bounded(Case("fp16", "nf4", (m,), n, k, scale_shape="scalar", alpha="float"), device)


@pytest.mark.parametrize("group_size", [16, 32, 48, 112, 128])
@pytest.mark.parametrize("scale", FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(1,), (2, 1, 20)], ids=str)
def test_groups(lead: tuple[int, ...], scale: torch.dtype, group_size: int, device: str) -> None:
    """Of whole vectors of any width, and of others."""
    case = Case("fp32", "nf4", lead, 40, 3 * group_size, groups=3, scale=scale)
    check_bounded(case, device)
    check_exact(replace(case, scale_layout="transposed", w_layout="columns"), device)


@pytest.mark.skipif(cpu.compiler() is None, reason="needs a C++ compiler")
def test_a_cpu_has_kernels_for_every_call_with_tokens() -> None:
    for x in ("bf16", "fp16", "fp32"):
        for m in (1, 5, 40):
            for layout in ("contiguous", "transposed"):
                case = Case(x, "nf4", (m,), k=33, a_layout=layout, w_layout=layout)
                call = build(case, "cpu")
                ran = explain(call.run)
                assert [d.kernel for d in ran.dispatches] == ["cpu"]
                with batch_invariant():
                    assert [d.kernel for d in explain(call.run).dispatches] == ["cpu"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 20, 64])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_number_is_exact_in_every_type(
    groups: int, m: int, dtype: torch.dtype, device: str
) -> None:
    """As the type of the activations has it."""
    codes = (torch.arange(48)[:, None] + 7 * torch.arange(64)) % 16
    w, scales = oracle.pack(codes).to(device), torch.ones(48, groups, device=device)
    for out in (dtype, FP32):
        y = matmul_lut4_bf16_tn(
            torch.eye(64, device=device)[:m].to(dtype), w, scales, out_dtype=out
        )
        assert_identical(y.cpu().double(), oracle.numbers("nf4", codes[:, :m], dtype).T)


def test_without_kernels_the_reference_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "make", lambda *_: None)
    for invariant in (False, True):
        case = Case("bf16", "nf4", (7,), 30, 96, groups=3, bias=FP16, seed=3 + invariant)
        if invariant:
            with batch_invariant():
                check_exact(case, "cpu")
        else:
            check_exact(case, "cpu")


def test_dequantised_numbers_are_those_of_float32(device: str) -> None:
    """Whatever the type of the weight: rounded once, with the scale."""
    codes = (torch.arange(48)[:, None] + 7 * torch.arange(96)) % 16
    scales = torch.rand(48, 3, generator=torch.Generator().manual_seed(0))
    products = oracle.numbers("nf4", codes).float() * scales.repeat_interleave(32, 1)
    w = oracle.pack(codes).to(device)
    for dtype in FLOATS:
        dense = dequantize(w, scales.to(device), dtype=dtype, table="nf4")
        assert_identical(dense.cpu(), products.to(dtype))


@pytest.mark.parametrize("x", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_gradients_of_all_that_has_one(activation: str, x: str, device: str) -> None:
    """What is before the activation is computed again, alpha and bias included."""
    case = Case(x, "nf4", (2, 3), 24, 48, groups=3, bias=FP32, alpha="tensor", residual=True)
    call = build(replace(case, activation=activation), device, numbers="random")
    leaves = [call.a, call.options["bias"], call.options["residual"]]
    a, bias, residual = (t.double().requires_grad_() for t in leaves)
    for t in leaves:
        t.requires_grad_()
    y = call.run()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype).to(device)
    y.backward(grad)
    w = call.weight() * call.options["alpha"].double()
    expected = oracle.ACTIVATIONS[activation](a @ w.T + bias) + residual
    expected.backward(grad.double())
    magnitude = 20 * grad.double().abs() @ w.abs()
    assert_close(leaves[0].grad, a.grad, magnitude)
    sums = 20 * grad.double().abs().flatten(0, 1).sum(0)
    assert_close(leaves[1].grad, bias.grad, sums)
    assert_identical(leaves[2].grad, grad)


BYTES = torch.ones(4, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.ones(3, 32, dtype=torch.int8)}, TypeError, "a has dtype int8; expected one"),
        ({"a": torch.ones(3, 16, dtype=torch.uint8)}, TypeError, "a has dtype uint8"),
        ({"packed_w": BYTES.view(torch.int8)}, TypeError, "packed_w has dtype int8; expected one"),
        ({"packed_w": BYTES[:, :15]}, ValueError, "packed_w has 15 bytes a row; K=32 needs 16"),
        ({"k": 31}, ValueError, "a has 32 columns; K=31 needs 31"),
        ({"scales": torch.ones(4, 3)}, ValueError, "3 groups a row, which do not divide K=32"),
        ({"scales": torch.ones(4, 4)}, ValueError, r"scales \(4, 4\)\) is not a multiple of 16"),
        ({"scales": torch.ones(5)}, ValueError, r"scales has shape \(5,\)"),
        ({"scales": BYTES[:, 0]}, TypeError, "scales has dtype uint8"),
        ({"zeros": torch.ones(4)}, TypeError, "unexpected keyword argument 'zeros'"),
        ({"table": "fp8"}, ValueError, "table='fp8'; expected one of 'nf4', 'iq4nl', 'fp4', "),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"a": torch.ones(3, 32), "packed_w": BYTES, "scales": torch.ones(4)}
    with pytest.raises(error, match=f"matmul_(nf|lut)4_bf16_tn.*{message}"):
        matmul_lut4_bf16_tn(**{**given, **change})


def test_dequantize_takes_packed_codes_without_zeros() -> None:
    with pytest.raises(ValueError, match="zeros belong to INT4 and INT8 weights, w is nf4"):
        dequantize(BYTES, torch.ones(4), torch.ones(4), table="nf4")
    with pytest.raises(TypeError, match="dequantize: w has dtype int8; expected one of uint8"):
        dequantize(BYTES.view(torch.int8), torch.ones(4), table="nf4")
    with pytest.raises(ValueError, match="dequantize: table='nf5'; expected None or one of 'nf4'"):
        dequantize(BYTES, torch.ones(4), table="nf5")


# ----------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_any_number_of_tokens(device: str) -> None:
    case = Case("bf16", "nf4", (1,), 48, 96, groups=3, bias=FP32, activation="gelu")
    call = build(case, device, numbers="random")

    def layer(a: Tensor) -> Tensor:
        return matmul_lut4_bf16_tn(a, call.w, call.scales, **call.options)

    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for m in (7, 2, 300):
        a = torch.randn(m, 96, device=device).to(BF16)
        assert_identical(fn(a), layer(a))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_gradients_through_a_compiled_graph(device: str) -> None:
    case = Case("fp32", "nf4", (5,), 48, 96, groups=3, bias=FP32, activation="silu")
    call = build(case, device, numbers="random")

    def layer(a: Tensor) -> Tensor:
        return matmul_lut4_bf16_tn(a, call.w, call.scales, **call.options)

    grads = []
    for fn in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)):
        a = call.a.clone().requires_grad_()
        fn(a).square().sum().backward()
        grads.append(a.grad)
    torch.testing.assert_close(grads[1], grads[0])
