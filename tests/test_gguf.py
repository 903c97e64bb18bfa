"""GGUF files: codes kept bit for bit, values equal to gguf's own, damage named and not believed."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf import quants  # noqa: E402
from tiny_gguf import BLOCKS, add, finish, random_blocks, write_tensors  # noqa: E402
from tolerance import assert_close  # noqa: E402

from intlass_ops import IntLinear, unpack_int4  # noqa: E402
from intlass_ops.formats import FormatError, gguf_grids  # noqa: E402
from intlass_ops.formats.gguf import GGUFFile  # noqa: E402
from intlass_ops.integrations import gguf_tensors  # noqa: E402

BLOCK = 32
KINDS = (Type.Q4_0, Type.Q4_1, Type.Q8_0)
rng = np.random.default_rng(0)


def random_weight(n: int = 24, k: int = 4 * BLOCK) -> np.ndarray:
    return (rng.standard_normal((n, k)) * rng.lognormal(size=(n, 1))).astype(np.float32)


def stored_codes(raw: np.ndarray, kind: Type, k: int) -> np.ndarray:
    """The file's codes [N, K], decoded independently of the reader."""
    size = {Type.Q4_0: 18, Type.Q4_1: 20, Type.Q8_0: 34}[kind]
    blocks = raw.reshape(raw.shape[0], -1, size)
    if kind == Type.Q8_0:
        return blocks[..., 2:].view(np.int8).reshape(-1, k)
    nibbles = blocks[..., size - 16 :]
    codes = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1).reshape(-1, k).astype(np.int8)
    return codes - 8 if kind == Type.Q4_0 else codes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_and_scales_are_those_of_the_file(tmp_path: Path, kind: Type) -> None:
    values = random_weight()
    file = GGUFFile(write_tensors(tmp_path / "w.gguf", {"w": (values, kind)}))
    weight = file.weight("w")
    raw = quants.quantize(values, kind)
    n, k = values.shape
    if weight.bits == 8:
        codes = weight.codes
    else:
        codes = unpack_int4(weight.codes, k, signed=weight.zeros is None)
    np.testing.assert_array_equal(codes.numpy(), stored_codes(raw, kind, k))
    size = raw.shape[1] // (k // BLOCK)
    halves = raw.reshape(n, -1, size)[..., :2].copy().view(np.float16)[..., 0]
    np.testing.assert_array_equal(weight.scales.numpy(), halves)
    assert (weight.shape, weight.group_size, weight.name) == ((n, k), BLOCK, "w")
    assert (weight.zeros is not None) == (kind == Type.Q4_1)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_dequantized_equals_gguf_bit_for_bit(tmp_path: Path, kind: Type) -> None:
    values = random_weight()
    file = GGUFFile(write_tensors(tmp_path / "w.gguf", {"w": (values, kind)}))
    expected = quants.dequantize(quants.quantize(values, kind), kind)
    np.testing.assert_array_equal(file.weight("w").dequantize().numpy(), expected)
    np.testing.assert_array_equal(file.dense("w").numpy(), expected)


def test_q4_1_is_within_the_documented_rounding(tmp_path: Path) -> None:
    values = random_weight(n=200) + rng.standard_normal((200, 1)).astype(np.float32) * 20
    file = GGUFFile(write_tensors(tmp_path / "w.gguf", {"w": (values, Type.Q4_1)}))
    raw = quants.quantize(values, Type.Q4_1).reshape(200, -1, 20)
    d, m = (raw[..., i : i + 2].copy().view(np.float16).astype(np.float64) for i in (0, 2))
    codes = stored_codes(raw.reshape(200, -1), Type.Q4_1, values.shape[1])
    exact = codes.reshape(200, -1, BLOCK) * d + m
    bound = 2.0**-23 * (np.abs(m) + np.abs(exact))
    got = file.weight("w").dequantize().double().numpy().reshape(exact.shape)
    assert np.all(np.abs(got - exact) <= bound)


def test_q4_1_block_without_a_scale_is_its_minimum_exactly(tmp_path: Path) -> None:
    raw = quants.quantize(random_weight(n=2), Type.Q4_1).reshape(2, -1, 20)
    raw[0, 1, :2] = 0  # d = 0 and codes that are not
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", raw.reshape(2, -1), raw_dtype=Type.Q4_1)
    weight = GGUFFile(finish(writer, tmp_path / "w.gguf")).weight("w")
    minimum = raw[0, 1, 2:4].copy().view(np.float16)[0]
    dense = weight.dequantize()
    assert (dense[0, BLOCK : 2 * BLOCK] == float(minimum)).all()
    others = torch.arange(dense.shape[1]).view(-1, BLOCK)[[0, 2, 3]].flatten()
    expected = torch.from_numpy(quants.dequantize(raw.reshape(2, -1), Type.Q4_1))
    torch.testing.assert_close(dense[:, others], expected[:, others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("m", [1, 20])
def test_linear_over_the_codes_is_within_tolerance(tmp_path: Path, kind: Type, m: int) -> None:
    values = random_weight(n=40, k=8 * BLOCK)
    weight = GGUFFile(write_tensors(tmp_path / "w.gguf", {"w": (values, kind)})).weight("w")
    x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(1))
    y = IntLinear(weight.codes, weight.scales, weight.zeros)(x)
    dense = quants.dequantize(quants.quantize(values, kind), kind)
    w = torch.from_numpy(dense).double()
    assert_close(y, x.double() @ w.T, x.double().abs() @ w.abs().T)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_of_random_bits_agree_with_gguf(tmp_path: Path, kind: Type) -> None:
    n, k = 12, 768
    raw = random_blocks(kind, (n, k), 0.1)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    weight = GGUFFile(finish(writer, tmp_path / "w.gguf")).weight("w")
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    if weight.zeros is None or kind in (Type.IQ1_S, Type.IQ3_S):
        assert torch.equal(weight.dequantize(), expected)
    else:
        # The exact w is between; both sides round their minimum's product or quotient.
        bound = 2.0**-22 * (0.1 * 63 + expected.abs())
        assert bool(((weight.dequantize() - expected).abs() <= bound).all())
    assert weight.group_size == BLOCKS[kind][1]
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    y = gguf_tensors.int_layer(weight)(x)
    w = weight.dequantize().double()
    assert_close(y, x.double() @ w.T, x.double().abs() @ w.abs().T)


def test_every_mxfp4_code_and_scale_is_that_of_gguf_bit_for_bit(tmp_path: Path) -> None:
    """But for the sign of zero, which ggml's table has not; the largest overflow on both sides."""
    raw = np.empty((255, 16, 17), np.uint8)  # a row for each scale that is no NaN
    raw[..., 0] = np.arange(255)[:, None]
    raw[..., 1:] = np.arange(256).reshape(16, 16)  # every pair of codes
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", raw.reshape(255, -1), raw_dtype=Type.MXFP4)
    writer.add_tensor("e", raw.reshape(3, 85, -1), raw_dtype=Type.MXFP4)
    file = GGUFFile(finish(writer, tmp_path / "w.gguf"))
    with np.errstate(over="ignore"):
        expected = quants.dequantize(raw.reshape(255, -1), Type.MXFP4)
    assert np.isinf(expected[-1]).any()
    assert np.abs(expected[expected != 0]).min() == 2.0**-128
    layer = file.fp4("w").load()
    assert (layer.kind, layer.group_size, layer.in_features) == ("mxfp4", BLOCK, 512)
    for found in (layer.dequantize(), file.dense("w"), file.dense("e").flatten(0, 1)):
        np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(layer.scales.numpy(), raw[..., 0])
    with pytest.raises(FormatError, match=r"w has type MXFP4; a weight is read from"):
        file.weight("w")
    with pytest.raises(FormatError, match=r"e has shape \(3, 85, 512\); expected \[N, K\]"):
        file.fp4("e")
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    rows = slice(100, 140)
    few = type(layer)(layer.weight[rows], layer.scales[rows])
    w = torch.from_numpy(expected[rows]).double()
    assert_close(few(x), x.double() @ w.T, x.double().abs() @ w.abs().T)


def test_every_nvfp4_code_and_scale_is_that_of_gguf_bit_for_bit(tmp_path: Path) -> None:
    raw = np.zeros((127, 8, 36), np.uint8)  # a row for each scale that is no NaN
    raw[..., :4] = np.arange(127)[:, None, None]
    raw[..., 4:] = np.arange(256).reshape(8, 32)  # every pair of codes
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("a.weight", raw.reshape(127, -1), raw_dtype=Type.NVFP4)
    writer.add_tensor("b.weight", raw.reshape(127, -1), raw_dtype=Type.NVFP4)
    writer.add_tensor("b.scale", np.array([0.5], np.float32))
    file = GGUFFile(finish(writer, tmp_path / "w.gguf"))
    expected = quants.dequantize(raw.reshape(127, -1), Type.NVFP4)
    layer = file.fp4("a.weight").load()
    assert (layer.kind, layer.group_size, layer.in_features) == ("nvfp4", 16, 512)
    np.testing.assert_array_equal(layer.dequantize().numpy(), expected)
    np.testing.assert_array_equal(file.dense("b.weight").numpy(), expected / 2)
    assert file.sidecars("a.weight") == ()
    assert file.sidecars("b.weight") == ("b.scale",)
    assert file.sidecars("b.scale") == ()


def test_bits_are_signs_lowest_first(tmp_path: Path) -> None:
    """Q1_0, which the gguf package does not dequantise."""
    kind = getattr(Type, "Q1_0", None)
    if kind is None:
        pytest.skip("this version of gguf has no Q1_0")
    signs = rng.integers(0, 2, (3, 4, 128), dtype=np.uint8)
    scales = np.array([0.5, 0.25, 1.5], np.float16)[:, None, None].repeat(4, 1)
    raw = np.concatenate([scales.view(np.uint8), np.packbits(signs, -1, "little")], -1)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", raw.reshape(3, -1), raw_dtype=kind)
    weight = GGUFFile(finish(writer, tmp_path / "w.gguf")).weight("w")
    assert (weight.bits, weight.group_size, weight.shape) == (4, 128, (3, 512))
    expected = ((2.0 * signs - 1) * scales).reshape(3, -1)
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


@pytest.mark.parametrize(
    ("byte", "scale", "message"),
    [
        (127, [1.0], "the scales of w.weight hold a NaN"),
        (200, [1.0], "the scales of w.weight hold a NaN"),
        (64, [1.0, 2.0], r"w.scale is \[1.0, 2.0\]; expected 1 positive numbers"),
        (64, [0.0], "w.scale is .* expected 1 positive"),
        (64, [float("nan")], "w.scale is .* expected 1 positive"),
    ],
)
def test_damage_to_scales_of_nvfp4(
    tmp_path: Path, byte: int, scale: list[float], message: str
) -> None:
    raw = np.full((2, 36), byte, np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w.weight", raw, raw_dtype=Type.NVFP4)
    writer.add_tensor("w.scale", np.array(scale, np.float32))
    file = GGUFFile(finish(writer, tmp_path / "w.gguf"))
    with pytest.raises(FormatError, match=message):
        file.fp4("w.weight").load()


def test_take_rows_moves_whole_rows(tmp_path: Path) -> None:
    file = GGUFFile(write_tensors(tmp_path / "w.gguf", {"w": (random_weight(), Type.Q4_1)}))
    weight, order = file.weight("w"), torch.randperm(24)
    assert torch.equal(weight.take_rows(order).dequantize(), weight.dequantize()[order])


def test_metadata_and_float_tensors_agree_with_gguf(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.texts", ["", "ünïcode", "x" * 300])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_custom_alignment(64)
    halves = rng.standard_normal((3, 5)).astype(np.float16)
    writer.add_tensor("half", halves)
    writer.add_tensor("whole", halves.astype(np.float32))
    file = GGUFFile(finish(writer, path))
    reader = gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents(), key
    assert [t.name for t in reader.tensors] == list(file.tensors)
    assert [t.data_offset for t in reader.tensors] == [t.offset for t in file.tensors.values()]
    for name in ("half", "whole"):
        np.testing.assert_array_equal(file.dense(name).numpy(), halves.astype(np.float32))


def small_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("texts", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("w", quants.quantize(random_weight(4, BLOCK), Type.Q4_1), raw_dtype=Type.Q4_1)
    return finish(writer, path).read_bytes()


def write_parts(folder: Path, per_part: int = 2) -> tuple[list[Path], dict[str, np.ndarray]]:
    values = {f"w{i}": random_weight(8) for i in range(5)}
    writer = gguf.GGUFWriter(folder / "w.gguf", "llama", split_max_tensors=per_part)
    for name, each in values.items():
        add(writer, name, each, Type.Q8_0)
    finish(writer, folder)
    return sorted(folder.glob("w-*.gguf")), values


def test_parts_of_a_file_are_read_as_one(tmp_path: Path) -> None:
    (first, *others), values = write_parts(tmp_path)
    assert len(others) == 2
    file = GGUFFile(first)
    assert [*file.tensors] == [*values]
    assert file.metadata["general.architecture"] == "llama"
    for name, each in values.items():
        expected = quants.dequantize(quants.quantize(each, Type.Q8_0), Type.Q8_0)
        np.testing.assert_array_equal(file.weight(name).dequantize().numpy(), expected)
        np.testing.assert_array_equal(file.dense(name).numpy(), expected)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    (first, second, third), _ = write_parts(tmp_path)
    with pytest.raises(FormatError, match=r"part 1 \(from 0\) of 3; open the first one"):
        GGUFFile(second)
    renamed = first.rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="open the first one"):
        GGUFFile(renamed)
    renamed.rename(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(FormatError, match="this is not part 2 of"):
        GGUFFile(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="w-00002-of-00003"):
        GGUFFile(first)


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf")
    cut = tmp_path / "cut.gguf"
    end = GGUFFile(tmp_path / "whole.gguf").info("w")
    for size in range(end.offset + end.nbytes):
        cut.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            GGUFFile(cut).weight("w")


def test_no_altered_byte_of_the_header_does_more_than_raise(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf")
    header = GGUFFile(tmp_path / "whole.gguf").info("w").offset
    altered = tmp_path / "altered.gguf"
    for position in range(header):
        for value in (0x00, 0x7F, 0xFF):
            content = bytearray(whole)
            content[position] = value
            altered.write_bytes(content)
            try:
                file = GGUFFile(altered)
                for name in file.tensors:
                    file.weight(name)
            except FormatError:
                pass


def header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
        (header(version=1), "version 1; supported are"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(entries=2**60), r"announces 1152921504606846976 items"),
        (header(tensors=2**60), r"1152921504606846976 tensors are announced"),
        (header(entries=1) + text("k") + struct.pack("<I", 99), "unknown value type 99"),
        (header(entries=1) + text("k") + struct.pack("<IQ", 8, 2**62), "ends inside k"),
        (header(entries=1) + text("k") + struct.pack("<IIQ", 9, 4, 2**61), "announces"),
        (header(entries=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "value type 9"),
        (header(entries=2) + 2 * (text("k") + struct.pack("<IB", 7, 1)), "occurs twice"),
        (header(tensors=1) + tensor("w", (1,) * 5, 0), "5 dimensions"),
        (header(tensors=1) + tensor("w", (33, 2), 3), "whole blocks of 32"),
        (header(tensors=1) + tensor("w", (2**33, 2**33), 3), "ends inside tensor w"),
        (header(tensors=1) + tensor("w", (32, 1), 3, 2**63), "ends inside tensor w"),
        (header(tensors=2) + 2 * tensor("w", (1,), 0) + bytes(64), "'w' occurs twice"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        GGUFFile(path)
    assert str(path) in str(error.value)


def test_unsupported_type_is_named_when_asked_for(tmp_path: Path) -> None:
    values = rng.standard_normal((2, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    add(writer, "good", values, Type.Q8_0)
    writer.add_tensor("bad", np.zeros((2, 256), dtype=np.int8), raw_dtype=Type.I8)
    file = GGUFFile(finish(writer, tmp_path / "w.gguf"))
    assert file.weight("good").bits == 8
    with pytest.raises(FormatError, match=r"bad has type I8; a weight is read from Q4_0"):
        file.weight("bad")
    with pytest.raises(FormatError, match=r"bad has type I8; supported are F32"):
        file.dense("bad")
    with pytest.raises(FormatError, match="no tensor 'worse'"):
        file.weight("worse")


def test_grids_want_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": (np.ones((2, 256)), Type.IQ3_S), "t": (np.ones((2, 256)), Type.TQ2_0)}
    file = GGUFFile(write_tensors(tmp_path / "w.gguf", tensors))
    gguf_grids._grid.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match=r"type IQ3_S index a grid .*: pip install gguf"):
        file.weight("w")
    assert file.weight("t").bits == 4


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_block_parameter_that_is_not_finite_is_damage(tmp_path: Path, value: float) -> None:
    raw = quants.quantize(random_weight(n=3), Type.Q4_1).reshape(3, -1, 20)
    raw[1, 2, 2:4] = np.array([value], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", raw.reshape(3, -1), raw_dtype=Type.Q4_1)
    file = GGUFFile(finish(writer, tmp_path / "w.gguf"))
    with pytest.raises(FormatError, match=r"w has a block parameter (inf|nan) \(row 1, block 2\)"):
        file.weight("w")
