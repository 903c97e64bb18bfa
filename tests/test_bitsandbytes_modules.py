"""`prepare_` on bitsandbytes' 4-bit linears, the library's own modules.

Not here: their files (test_formats_bitsandbytes_4bit.py), those of other libraries
(test_lowering_prepare.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intlass_ops import Lut4Linear, prepare_

pytest.importorskip("bitsandbytes")

import bitsandbytes
from bitsandbytes.functional import dequantize_4bit

N, K = 96, 256
SCHEMES = {"nf4": "nf4a16", "fp4": "bnbfp4a16"}
X = torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def linear(kind: str = "nf4", *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    module = bitsandbytes.nn.Linear4bit(options.pop("k", K), N, bias=options.pop("bias", True))
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, module.in_features, generator=g).to(dtype)
    module.weight = bitsandbytes.nn.Params4bit(w, quant_type=kind, **options)
    if module.bias is not None:
        module.bias.data = torch.randn(N, generator=g).to(dtype)
    return module


def dense(module: Any) -> Tensor:
    state = module.weight.quant_state
    state.dtype = torch.float32  # not rounded again to that of what it was made of
    return dequantize_4bit(module.weight.data, state)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "double", "storage", "dtype"),
    [
        ("nf4", False, torch.uint8, torch.float16),
        ("nf4", False, torch.bfloat16, torch.bfloat16),
        ("nf4", True, torch.float32, torch.float32),
        ("nf4", True, torch.uint8, torch.bfloat16),
        ("fp4", False, torch.bfloat16, torch.float32),
        ("fp4", True, torch.uint8, torch.bfloat16),
    ],
)
def test_weights_are_the_librarys(
    kind: str, double: bool, storage: torch.dtype, dtype: torch.dtype
) -> None:
    options = {"compress_statistics": double, "quant_storage": storage}
    module = linear(kind, dtype=dtype, **options).to("cpu")
    expected, bias = dense(module), module.bias.detach().clone()
    model = nn.Sequential(module).eval()
    (decision,) = prepare_(model)
    assert (decision.outcome, decision.scheme) == ("swapped", SCHEMES[kind])
    (ours,) = model
    assert isinstance(ours, Lut4Linear)
    assert not ours.training
    assert ours.group_size == 64
    # of FP4, whose numbers are thirds, the scale is rounded instead of the number
    rtol = 0.0 if kind == "nf4" else 2**-22
    torch.testing.assert_close(ours.dequantize(), expected, rtol=rtol, atol=0)
    assert torch.equal(ours.bias, bias)
    if kind == "nf4" and not double:
        assert ours.scales.dtype == dtype
    assert prepare_(model) == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_computes_what_the_library_does(dtype: torch.dtype) -> None:
    module = linear(dtype=dtype).to("cpu")
    x = X.to(dtype)
    expected = module(x).float()  # before: on some CPUs it is laid out anew at its first call
    model = nn.Sequential(linear(dtype=dtype).to("cpu"))
    prepare_(model)
    y = model(x)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


def test_modules_that_are_used_twice_or_have_no_bias() -> None:
    shared = linear(bias=False).to("cpu")
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(K, N)})
    assert [each.outcome for each in prepare_(model)] == ["swapped", "swapped"]
    assert model["a"] is model["b"]
    assert model["a"].bias is None
    assert type(model["c"]) is nn.Linear


def laid_out(module: Any) -> Any:
    """As a CPU with AVX512's bfloat16 has it after the first call."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    module = module.to("cpu")
    module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (linear, "its weight is not quantised yet"),
        (lambda: linear(k=160).to("cpu"), "K=160 with blocksize=64: blocks that run on into"),
        (lambda: laid_out(linear()), "laid its weight out for this CPU"),
    ],
)
def test_what_is_left_as_it_is(make: Any, reason: str) -> None:
    module = make()
    model = nn.Sequential(module)
    (decision,) = prepare_(model)
    assert decision.outcome == "declined"
    assert reason in decision.reason
    assert model[0] is module


def test_other_numbers_than_its_own() -> None:
    module = linear().to("cpu")
    module.weight.quant_state.code = module.weight.quant_state.code.flip(0)
    (decision,) = prepare_(nn.Sequential(module))
    assert "codes of bitsandbytes' nf4" in decision.reason
