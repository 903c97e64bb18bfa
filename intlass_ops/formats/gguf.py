"""GGUF files: metadata, and tensors as weights that keep every code as it is stored.

Lives here: the file's structure. Not here: its block formats (gguf_blocks.py, gguf_grids.py), what
a model does with them (integrations/gguf_models.py).

The structure is walked here rather than by `gguf.GGUFReader`, which is not meant for files one does
not trust (lengths are believed, so a small file can ask for any amount of memory) and which needs
4 s for a vocabulary of 49152 where this takes 0.2 s.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import lut4
from ..fp4_linear import NVFP4
from . import CanonicalWeight, FormatError
from .fp4 import StoredFp4
from .gguf_blocks import BLOCK_TYPES as _WHOLE_TYPES
from .gguf_blocks import FP4_TYPES, Bytes
from .gguf_grids import GRID_TYPES
from .lut4 import StoredLut4

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_NUMBER, _COUNT = "split.no", "split.count"
# value type id -> struct format
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
# tensor type id -> name, elements in a block, bytes of a block
_FLOATS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
_IDS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
BLOCK_TYPES = _WHOLE_TYPES | GRID_TYPES
_BLOCKS = {name: (form.weights, form.bytes) for name, form in BLOCK_TYPES.items()}
_BLOCKS |= {name: (form.weights, form.bytes) for name, form in FP4_TYPES.items()}
_TYPES = _FLOATS | {number: (name, *_BLOCKS[name]) for number, name in _IDS.items()}
INTEGERS, QUANTIZED = tuple(BLOCK_TYPES), tuple(_BLOCKS)
# The rest of ggml's enumeration, to name what is not read.
_UNREAD_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. ``shape`` is row-major: the last dimension is contiguous."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0  # of a file that was split


class GGUFFile:
    """A memory-mapped GGUF file: ``metadata``, ``tensors``, ``weight(name)``, ``dense(name)``.

    ``weight`` is of integers, ``lut4`` of codes of a table; MXFP4 and NVFP4 are ``fp4(name)``.

    Of a file that was split, name the first part: the others lie beside it.

    Raises FormatError for a file that is cut off, malformed or big-endian; FileNotFoundError and
    the like for one that cannot be opened. Unsupported tensor types raise when they are asked for.

    >>> file = GGUFFile("model.gguf")                                         # doctest: +SKIP
    >>> file.weight("blk.0.attn_q.weight").dequantize()                       # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._bytes: list[np.memmap[Any, np.dtype[np.uint8]]] = []
        self.metadata, self.tensors = self._open(self.path)
        for part, other in enumerate(_other_parts(self.path, self.metadata), 1):
            metadata, tensors = self._open(other)
            if (metadata.get(_NUMBER), metadata.get(_COUNT)) != (part, self.metadata[_COUNT]):
                raise FormatError(f"{other}: this is not part {part + 1} of {self.path}")
            twice = self.tensors.keys() & tensors.keys()
            if twice:
                raise FormatError(f"{other}: tensor {min(twice)!r} is in another part too")
            self.tensors |= {n: replace(info, part=part) for n, info in tensors.items()}

    def _open(self, path: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if os.path.getsize(path) == 0:
            raise FormatError(f"{path}: the file is empty")
        self._bytes.append(np.memmap(path, dtype=np.uint8, mode="r"))
        return _Walk(path, self._bytes[-1]).file()

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"{self.path}: no tensor {name!r} in this file") from None

    def is_quantized(self, name: str) -> bool:
        return self.info(name).type in QUANTIZED

    def is_fp4(self, name: str) -> bool:
        return self.info(name).type in FP4_TYPES

    def is_lut4(self, name: str) -> bool:
        form = BLOCK_TYPES.get(self.info(name).type)
        return form is not None and form.table is not None

    def weight(self, name: str, expert: int | None = None) -> CanonicalWeight:
        """A tensor [N, K] in integers, codes unchanged (copied out of the mapping).

        ``expert``: which of a tensor [experts, N, K].
        """
        info = self._typed(name, INTEGERS)
        form = BLOCK_TYPES[info.type]
        name, blocks = self._blocks(info, expert)
        codes, scales, zeros = form.decode(blocks, functools.partial(self._halves, info))
        shape = info.shape[-2], info.shape[-1]
        if form.table is not None:
            codes = lut4.decode(codes, shape[1], form.table, torch.int8)
        return CanonicalWeight(name, codes, scales, zeros, form.bits, form.group_size, shape)

    def lut4(self, name: str) -> StoredLut4:
        """The same of a tensor whose codes index a table (`is_lut4`), in four bits."""
        info = self.info(name)
        form = BLOCK_TYPES[info.type]
        assert form.table is not None
        _, blocks = self._blocks(info, None)
        decode = functools.partial(form.decode, blocks, functools.partial(self._halves, info))
        n, k = info.shape
        scales = decode().scales
        return StoredLut4(
            name, form.table, (n, k), scales.shape[1], scales.dtype, lambda: decode().codes,
            lambda: scales,
        )  # fmt: skip

    def fp4(self, name: str, expert: int | None = None) -> StoredFp4:
        """The same of a tensor in FP4: codes and scales are read when they are asked for."""
        info = self._typed(name, tuple(FP4_TYPES))
        form = FP4_TYPES[info.type]
        of, blocks = self._blocks(info, expert)

        def scales() -> Tensor:
            found = form.scales_of(blocks)
            if bool((found > form.largest).any()):  # ggml takes it for a number
                raise FormatError(f"{self.path}: the scales of {of} hold a NaN; it is damaged")
            return found

        kind, shape = info.type.lower(), (info.shape[-2], info.shape[-1])
        scale = self._second_scale(info, expert) if kind == NVFP4 else None
        return StoredFp4(of, kind, shape, scale, lambda: form.codes_of(blocks), scales)

    def sidecars(self, name: str) -> tuple[str, ...]:
        """Tensors of this file that belong to a weight in NVFP4: its second scale, its inputs'."""
        found = (f"{name.removesuffix('weight')}{kind}" for kind in ("scale", "input_scale"))
        of_nvfp4 = self.info(name).type == NVFP4.upper()
        return tuple(each for each in found if of_nvfp4 and each in self.tensors)

    def _second_scale(self, info: TensorInfo, expert: int | None) -> Tensor:
        name = f"{info.name.removesuffix('weight')}scale"
        if name not in self.tensors:
            return torch.ones(())
        values = self.dense(name).flatten()
        count = 1 if expert is None else info.shape[0]
        if len(values) != count or not bool((values.isfinite() & (values > 0)).all()):
            raise FormatError(
                f"{self.path}: {name} is {values.tolist()[:4]}; expected {count} positive numbers"
            )
        return values[expert or 0].clone()

    def _typed(self, name: str, types: tuple[str, ...]) -> TensorInfo:
        info = self.info(name)
        if info.type not in types:
            raise FormatError(
                f"{self.path}: {name} has type {info.type}; a weight is read from "
                f"{', '.join(QUANTIZED)}"
            )
        return info

    def _blocks(self, info: TensorInfo, expert: int | None) -> tuple[str, Bytes]:
        """Name and blocks [N, K/weights, bytes] of a weight, in the mapping."""
        if len(info.shape) != (2 if expert is None else 3):
            wanted = "[N, K]" if expert is None else "[experts, N, K]"
            raise FormatError(f"{self.path}: {info.name} has shape {info.shape}; expected {wanted}")
        n, k = info.shape[-2:]
        weights, size = _BLOCKS[info.type]
        blocks = self._raw(info).reshape(-1, n, k // weights, size)[expert or 0]
        return info.name if expert is None else f"{info.name}[{expert}]", blocks

    def dense(self, name: str) -> Tensor:
        """Any supported tensor as float32."""
        info = self.info(name)
        if info.type in QUANTIZED and len(info.shape) == 3:
            experts = range(info.shape[0])
            return torch.stack([self._dequantized(info, each) for each in experts])
        if info.type in QUANTIZED:
            return self._dequantized(info, None)
        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if info.type not in dtypes:
            raise FormatError(
                f"{self.path}: {name} has type {info.type}; supported are "
                f"{', '.join((*dtypes, *QUANTIZED))}"
            )
        raw = torch.from_numpy(self._raw(info).copy())
        return raw.view(dtypes[info.type]).view(info.shape).to(torch.float32)

    def _dequantized(self, info: TensorInfo, expert: int | None) -> Tensor:
        if info.type in FP4_TYPES:
            return self.fp4(info.name, expert).load().dequantize()
        return self.weight(info.name, expert).dequantize()

    def _raw(self, info: TensorInfo) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._bytes[info.part][info.offset : info.offset + info.nbytes]

    def _halves(self, info: TensorInfo, pairs: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """fp16 block parameters [N, G]; one that is not finite would hide in codes."""
        values = torch.from_numpy(pairs.copy()).view(torch.float16).squeeze(-1)
        if not bool(torch.isfinite(values).all()):
            n, g = (int(i) for i in (~torch.isfinite(values)).nonzero()[0])
            raise FormatError(
                f"{self.path}: {info.name} has a block parameter {values[n, g].item()} "
                f"(row {n}, block {g}); the file is damaged"
            )
        return values


def _other_parts(path: str, metadata: dict[str, Any]) -> Iterator[str]:
    """The files that a split one goes on in."""
    count, number = metadata.get(_COUNT, 1), metadata.get(_NUMBER, 0)
    if count in (0, 1):
        return
    end = f"-00001-of-{count:05}.gguf" if isinstance(count, int) else None
    if end is None or number != 0 or not path.endswith(end):
        raise FormatError(
            f"{path}: part {number!r} (from 0) of {count!r}; open the first one, whose name ends "
            "in -00001-of-….gguf"
        )
    start = path.removesuffix(end)
    for part in range(2, count + 1):
        yield f"{start}-{part:05}-of-{count:05}.gguf"


class _Walk:
    """One pass over the header; every length is checked against the file before it is used."""

    def __init__(self, path: str, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.path = path
        self.data = memoryview(data.data)
        self.size = len(data)
        self.at = 0

    def fail(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {problem} (at byte {self.at} of {self.size})")

    def take(self, count: int, what: str) -> memoryview:
        if count > self.size - self.at:
            raise self.fail(f"the file ends inside {what}, which needs {count} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def text(self, what: str) -> str:
        raw = bytes(self.take(self.number("Q", what), what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def count(self, smallest: int, what: str) -> int:
        """A number of items that take at least ``smallest`` bytes each."""
        count: int = self.number("Q", what)
        if count * smallest > self.size - self.at:
            raise self.fail(f"{what} announces {count} items, more than the file holds")
        return count

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            raise self.fail(f"{key} has unknown value type {kind}")
        item: int = self.number("I", key)
        if item == _STRING:
            return [self.text(key) for _ in range(self.count(8, key))]
        if item not in _SCALARS:
            raise self.fail(f"{key} is an array of unsupported value type {item}")
        form = _SCALARS[item]
        count = self.count(struct.calcsize("<" + form), key)
        raw = self.take(count * struct.calcsize("<" + form), key)
        return list(struct.unpack(f"<{count}{form}", raw))

    def file(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self.take(4, "the magic number")) != _MAGIC:
            raise FormatError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self.number("I", "the version")
        if version & 0xFFFF == 0:
            raise self.fail("the file is big-endian, which is not supported")
        if version not in _VERSIONS:
            raise self.fail(f"GGUF version {version}; supported are {_VERSIONS}")
        tensor_count = self.number("Q", "the tensor count")
        entry_count = self.count(13, "the metadata")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.text("a metadata key")
            if key in metadata:
                raise self.fail(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.number("I", key), key)
        if tensor_count * 24 > self.size - self.at:
            raise self.fail(f"{tensor_count} tensors are announced, more than the file holds")
        infos = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}; expected a power of two")
        start = math.ceil(self.at / alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, type_, shape, offset, nbytes in infos:
            if name in tensors:
                raise self.fail(f"tensor {name!r} occurs twice")
            if type_ in (t[0] for t in _TYPES.values()) and start + offset + nbytes > self.size:
                raise FormatError(
                    f"{self.path}: the file ends inside tensor {name}, which needs {nbytes} bytes "
                    f"from byte {start + offset} on; the file has {self.size}"
                )
            tensors[name] = TensorInfo(name, type_, shape, start + offset, nbytes)
        return metadata, tensors

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name = self.text("a tensor's name")
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {dimensions} dimensions")
        # Stored with the contiguous dimension first.
        shape = tuple(self.number("Q", name) for _ in range(dimensions))[::-1]
        kind = self.number("I", name)
        offset = self.number("Q", name)
        known, elements, size = _TYPES.get(kind, (_UNREAD_TYPES.get(kind, f"number {kind}"), 1, 0))
        if 0 in shape or shape[-1] % elements:
            raise self.fail(
                f"tensor {name!r} has shape {shape}; {known} needs whole blocks of {elements}"
            )
        return name, known, shape, offset, math.prod(shape) // elements * size
