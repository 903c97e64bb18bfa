"""Damaged checkpoints: every reader answers with our errors, and with no more memory than the file.

50 mutations of each form here, 2000 under --thorough: flipped and cut bytes, headers whose shapes,
dtypes and names are exchanged, configs with other values.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

from fp4_case import Fp4Weight, draw_fp4
from safetensors.torch import save_file
from tiny_checkpoints import FORMS, Form
from torch import Tensor

from intlass_ops.formats import FormatError
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.layers import buffers_of, read_specs, write_specs
from intlass_ops.formats.mxfp4 import Mxfp4
from intlass_ops.formats.reader import open_reader, quantization_config

VALUES: list[Any] = [None, True, -1, 0, 3, 8, 2**63, 1e308, "", "x", [], {}, [[]], {"a": None}]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from leaves(inner, (*path, key))


def with_other_value(text: bytes, rng: random.Random) -> bytes:
    value = json.loads(text)
    path = rng.choice(list(leaves(value)))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(VALUES)
    return json.dumps(value).encode()


def with_other_header(content: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    kind = rng.randrange(5)
    if kind == 0:
        entry["dtype"] = rng.choice(
            ["I32", "F32", "U32", "I8", "U8", "F16", "F8_E4M3", "F8_E5M2", "I64"]
        )
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        entry["shape"] = rng.choice([[], [0], [1, *entry["shape"]], [2**62, 2**62]])
    elif kind == 3:
        entry["data_offsets"] = [rng.choice([0, 2**62, -1]), rng.choice([0, 64, 2**63])]
    else:
        header[rng.choice(["layer.g_idx", "layer.weight_g_idx", "layer.qzeros", "x"])] = entry
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def with_other_bytes(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def read_everything(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    config = quantization_config(checkpoint)
    if config.get("quant_method") == "intlass":
        for spec in read_specs(str(directory), config).values():
            spec.module()
        return
    reader = open_reader(checkpoint)
    size = (directory / "model.safetensors").stat().st_size
    for path in reader.paths:
        if isinstance(reader, Mxfp4):
            spec, buffers = reader.experts(path)
        else:
            spec, buffers = buffers_of(reader.stored(path), reader.activation(path))
        held = 0
        for name, dtype, shape in spec.tensors:
            tensor = buffers[name]()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            held += tensor.nbytes
        assert held <= 16 * size


def gpt_oss(w: Fp4Weight) -> dict[str, Tensor]:
    """Two experts of half the rows each."""
    return {"w_blocks": w.packed().view(2, 8, -1, 16), "w_scales": w.s.view(2, 8, -1)}


GPT_OSS = Form({"group": 32}, gpt_oss, {"quant_method": "mxfp4"}, make=draw_fp4)
# What each is in another library's layout.
OURS = {
    "intlass": FORMS["packed w4a16"],
    "intlass nvfp4": FORMS["packed nvfp4"],
    "intlass fp8": FORMS["fp8 blocks"],
    "intlass nf4": FORMS["bitsandbytes nf4"],
}


@pytest.mark.parametrize("name", [*FORMS, "gpt-oss", *OURS])
def test_mutated_checkpoints_raise_our_errors(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    count = 2000 if request.config.getoption("--thorough") else 50
    form = {**FORMS, **OURS, "gpt-oss": GPT_OSS}[name]
    weight = form.make(32 if form.draw.get("bits") == 3 else 16, 64, 0, **form.draw)
    tensors = {f"layer.{part}": t.contiguous() for part, t in form.store(weight).items()}
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file(tensors, file, {"layer.weight": form.metadata} if form.metadata else None)
    settings = form.config
    if name in OURS:
        config.write_text(json.dumps({"quantization_config": settings}))
        stored = open_reader(Checkpoint(tmp_path)).stored("layer")
        settings = write_specs({"layer": buffers_of(stored, None)[0]})
    config.write_text(json.dumps({"quantization_config": settings}))
    read_everything(tmp_path)  # as it is, it is sound
    content, text = file.read_bytes(), config.read_bytes()
    refused = 0
    rng = random.Random(name)
    for _ in range(count):
        kind = rng.randrange(4)
        file.write_bytes(
            with_other_header(content, rng) if kind == 0
            else with_other_bytes(content, rng) if kind == 1
            else content
        )  # fmt: skip
        config.write_bytes(
            with_other_value(text, rng) if kind == 2
            else with_other_bytes(text, rng) if kind == 3
            else text
        )  # fmt: skip
        try:
            read_everything(tmp_path)
        except FormatError:
            refused += 1
    assert refused > count / 4


def test_mutated_gguf_files_raise_our_errors(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    gguf = pytest.importorskip("gguf")
    from tiny_gguf import finish

    from intlass_ops.formats.gguf import FP4_TYPES, QUANTIZED, GGUFFile

    count = 2000 if request.config.getoption("--thorough") else 100
    rng = random.Random("gguf")
    path = tmp_path / "w.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("texts", ["one", "two"])
    for kind in map(gguf.GGMLQuantizationType.__getitem__, QUANTIZED):
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        # Below 0x7C every half is finite.
        octets = bytes(rng.randrange(0x7C) for _ in range(2 * size * (256 // weights)))
        writer.add_tensor(kind.name, np.frombuffer(octets, np.uint8).reshape(2, -1), raw_dtype=kind)
    content = finish(writer, path).read_bytes()

    def read() -> None:
        file, held = GGUFFile(path), 0
        for name, info in file.tensors.items():
            if info.type in FP4_TYPES:
                stored = file.fp4(name)
                held += stored.read().nbytes + stored.read_scales().nbytes
            else:
                held += file.weight(name).nbytes
        assert held <= 16 * len(content)

    read()
    refused = 0
    for _ in range(count):
        path.write_bytes(with_other_bytes(content, rng))
        try:
            read()
        except FormatError:
            refused += 1
    assert refused > count / 4
