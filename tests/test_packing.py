"""pack_int4, unpack_int4: the bytes, the inverse, every shape and dtype, what they refuse."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from gemm_case import LAYOUTS, relayout
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_identical
from torch._subclasses.fake_tensor import FakeTensorMode

from intlass_ops import pack_int4, unpack_int4

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def test_even_k_lies_in_the_low_nibble(device: str) -> None:
    q = torch.tensor([[1, 2, 3], [-1, -8, 7]], dtype=torch.int8, device=device)
    assert pack_int4(q).tolist() == [[0x21, 0x03], [0x8F, 0x07]]
    assert pack_int4(torch.tensor([15, 0, 9], device=device)).tolist() == [0x0F, 0x09]


@pytest.mark.parametrize("signed", [True, False])
def test_every_byte_survives_the_round_trip(signed: bool, device: str) -> None:
    packed = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)[:, None]
    codes = unpack_int4(packed, signed=signed)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.long(), oracle.unpack(packed, 2, signed))
    assert torch.equal(pack_int4(codes), packed)


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, bool]:
    """Codes of any shape and integer dtype, and whether they are signed."""
    dtype = draw(st.sampled_from(INTEGERS))
    signed = dtype != torch.uint8 and draw(st.booleans())
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(st.integers(0, 35)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    low = -8 if signed else 0
    return torch.randint(low, low + 16, shape, generator=generator).to(dtype), signed


@given(code_tensors(), st.sampled_from(LAYOUTS))
def test_any_codes_pack_as_documented_and_come_back(
    device: str, drawn: tuple[torch.Tensor, bool], layout: str
) -> None:
    codes, signed = drawn
    codes = relayout(codes.to(device), layout)
    packed = pack_int4(codes)
    assert_identical(packed, oracle.pack(codes))
    assert packed.is_contiguous()
    unpacked = unpack_int4(packed, codes.shape[-1], signed=signed)
    assert_identical(unpacked, codes.to(torch.int8))
    assert unpacked.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (2, 4, 6)], ids=str)
def test_codes_of_any_layout_pack_to_rows(shape: tuple[int, ...], layout: str, device: str) -> None:
    codes = torch.arange(math.prod(shape), dtype=torch.int8, device=device).reshape(shape) % 16 - 8
    packed = pack_int4(relayout(codes, layout))
    assert_identical(packed, oracle.pack(relayout(codes, layout)))
    assert packed.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_bytes_of_any_layout_unpack(layout: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (3, 6, 5), generator=generator, dtype=torch.uint8)
    packed = relayout(packed.to(device), layout)
    for k in (9, 10):
        codes = unpack_int4(packed, k)
        assert torch.equal(codes.long(), oracle.unpack(packed, k, True))
        assert codes.is_contiguous()


def test_the_default_k_is_twice_the_bytes(device: str) -> None:
    assert unpack_int4(torch.zeros(2, 3, dtype=torch.uint8, device=device)).shape == (2, 6)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "codes", [[-9, 0], [0, 16], [-1, 8], [-8, 15], [-128, 127], [2**31, 0]], ids=str
)
def test_codes_out_of_range_are_refused_by_value(codes: list[int], device: str) -> None:
    span = rf"codes span \[{min(codes)}, {max(codes)}\]"
    with pytest.raises(ValueError, match=f"^pack_int4: {span}.*\\[-8, 7\\].*\\[0, 15\\]"):
        pack_int4(torch.tensor([codes], device=device))


def _bytes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("op", "args", "error", "message"),
    [
        (pack_int4, (torch.zeros(2),), TypeError, "pack_int4: q has dtype float32; expected one"),
        (pack_int4, (torch.zeros(2).bool(),), TypeError, "pack_int4: q has dtype bool; expected"),
        (pack_int4, (torch.zeros((), dtype=torch.int8),), ValueError, "pack_int4: q is a scalar"),
        (
            unpack_int4,
            (torch.zeros(2, dtype=torch.int8),),
            TypeError,
            "unpack_int4: packed has dtype int8; expected one of uint8",
        ),
        (unpack_int4, (_bytes(),), ValueError, "unpack_int4: packed is a scalar"),
        (unpack_int4, (_bytes(2, 3), 7), ValueError, "k=7 needs 4 bytes a row, packed has 3"),
        (unpack_int4, (_bytes(2, 3), 4), ValueError, "k=4 needs 2 bytes a row, packed has 3"),
        (unpack_int4, (_bytes(2, 0), -1), ValueError, "unpack_int4: k=-1 is negative"),
    ],
)
def test_illegal_arguments_are_refused_alike_everywhere(
    op: object, args: tuple, error: type[Exception], message: str, device: str
) -> None:
    assert callable(op)

    def said(tensor: torch.Tensor) -> str:
        with pytest.raises(error) as caught:
            op(tensor, *args[1:])
        assert type(caught.value) is error
        return str(caught.value)

    text = said(args[0].to(device))
    assert message in text
    assert text.startswith(op.__name__ + ": ")
    assert said(args[0].to("meta")) == text
    with FakeTensorMode() as mode:
        assert said(mode.from_tensor(args[0])) == text
