"""Products of integers on a CPU: the numbers of the reference, whatever the operands' layout."""

from __future__ import annotations

import pytest
import torch
from gemm_case import Case, build
from tolerance import assert_identical

from intlass_ops import cpu_integers, explain
from intlass_ops.ops import matmul_int8_bf16_tn

CASES = [
    Case("s8", "s8"),
    Case("s8", "s4", groups=4),
    Case("s8", "u4", groups=4),
    Case("u4", "u4", groups=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = build(case, "cpu")
    fast = explain(call.run)
    monkeypatch.setattr(cpu_integers, "is_exact", lambda: False)
    slow = explain(call.run)
    assert slow.dispatches[0].kernel == "reference float64"
    assert fast.dispatches[0].kernel in ("cpu int8", "reference float64")
    assert_identical(fast.result, slow.result)


@pytest.mark.parametrize("k", [1, 2, 129])
@pytest.mark.parametrize("layout", ["plain", "by columns", "cut"])
def test_layouts_that_confuse_the_product_of_pytorch(k: int, layout: str) -> None:
    a = torch.randint(-128, 128, (5, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (7, k), dtype=torch.int8)
    exact = a.double() @ w.double().T
    if layout == "by columns":
        a, w = a.T.contiguous().T, w.T.contiguous().T
    elif layout == "cut":
        a, w = (torch.nn.functional.pad(t, (3, 4))[:, 3 : 3 + k] for t in (a, w))
    one = torch.ones(())
    y = matmul_int8_bf16_tn(a, w, one, one, out_dtype=torch.float32)
    assert torch.equal(y.double(), exact)
