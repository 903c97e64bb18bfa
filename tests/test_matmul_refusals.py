"""What the ops with INT4, INT8, FP8 and NF4 weights refuse: with one message on every device, on
meta and on fake tensors. Under torch.compile: test_compile_ops.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from gemm_case import Call, Case, build
from hypothesis import given
from hypothesis import strategies as st
from illegal import MUTATIONS, Mutation
from strategies import FP32, a_zero_of, legal_cases
from torch._subclasses.fake_tensor import FakeTensorMode

_REFUSED_CASES = tuple(
    Case(x, w, lead=(2,), n=5, k=96, a_zero=a_zero_of(x))
    for x, w in (
        ("bf16", "u4"),
        ("fp32", "s8"),
        ("s8", "s8"),
        ("s8", "u4"),
        ("u4", "s4"),
        ("bf16", "e4m3"),
        ("bf16", "nf4"),
    )
)


def error_of(call: Call) -> Exception:
    with pytest.raises((ValueError, TypeError)) as caught:
        call.run()
    return caught.value


def check_refusal(mutation: Mutation, call: Call) -> None:
    """The same error on the call's device, on meta tensors and on fake ones."""
    illegal = mutation.mutate(call)
    error = error_of(illegal)
    assert type(error) is mutation.error
    assert str(error).startswith(f"{call.case.op_name}: ")
    for fragment in mutation.fragments(illegal):
        assert fragment in str(error)
    on_meta = error_of(illegal.map(lambda t: t.to("meta")))
    assert (type(on_meta), str(on_meta)) == (type(error), str(error))
    with FakeTensorMode() as mode:
        fake = error_of(illegal.map(mode.from_tensor))
    assert (type(fake), str(fake)) == (type(error), str(error))


@pytest.mark.parametrize(
    ("mutation", "case"),
    [(m, c) for c in _REFUSED_CASES for m in MUTATIONS if m.applies(c)],
    ids=str,
)
def test_illegal_calls_are_refused_alike_everywhere(
    mutation: Mutation, case: Case, device: str
) -> None:
    check_refusal(mutation, build(case, device))


@given(st.data())
def test_any_illegal_call_is_refused(device: str, data: st.DataObject) -> None:
    case = data.draw(legal_cases())
    mutation = data.draw(st.sampled_from([m for m in MUTATIONS if m.applies(case)]))
    check_refusal(mutation, build(case, device))


@pytest.mark.parametrize(
    "name", ["w", "scales", "zeros", "bias", "alpha", "a_scale", "a_zero", "residual"]
)
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    case = Case("s8", "u4", bias=FP32, alpha="tensor", a_scale="token", a_zero=FP32, residual=True)
    call = build(case, "cpu")
    if name in call.options:
        call.options[name] = call.options[name].to("meta")
    else:
        call = replace(call, **{name: getattr(call, name).to("meta")})
    shown = {"w": "packed_w"}.get(name, name)
    with pytest.raises(ValueError, match=f"matmul_int4_bf16_tn: {shown} is on meta, .* on cpu"):
        call.run()
