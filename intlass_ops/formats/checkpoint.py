"""Checkpoint directories: `config.json` and safetensors, every name and size checked, never pickle.

Lives here: `Checkpoint` (which tensors there are, reading one) and `Layer`, the tensors of one
linear. Not here: what the tensors mean (a file for each format).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import FormatError

_MAX_JSON_BYTES = 256 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# Scales of a quantised key/value cache. Here the cache stays in 16 bits; they are no weights.
CACHE_SCALES = frozenset(
    f"{of}_{what}" for of in "qkv" for what in ("scale", "zero_point", "global_scale")
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FormatError names the file and what is wrong with it."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise FormatError(f"{path}: not JSON ({problem})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Header:
    """One tensor as the file announces it; ``dtype`` is None for types that are not read here."""

    file: Path
    dtype: torch.dtype | None
    stored: str
    shape: tuple[int, ...]

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """``dtype`` of a tensor that says all by itself: FP8 is nothing without its scale."""
        return None if self.dtype == torch.float8_e4m3fn else self.dtype


class Checkpoint:
    """The safetensors files of a directory as one mapping; tensors are read when asked for.

    ``tensors``: name to `Header`. ``read(name)``: the tensor. ``config``: config.json.
    ``metadata``: texts in the files' headers.

    Raises FileNotFoundError where there is no such directory or no safetensors file in it, and
    FormatError for files that are damaged, contradict their index or leave the directory.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory}: no such directory")
        config = self.directory / "config.json"
        self.config = read_json(config) if config.is_file() else {}
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, Header] = {}
        self.metadata: dict[str, str] = {}
        for file in self._files():
            self._list(file)

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            files = sorted(self.directory.glob("*.safetensors"))
            if not files:
                pickled = sorted(self.directory.glob("*.bin")) + sorted(self.directory.glob("*.pt"))
                hint = (
                    f"; {pickled[0].name} is a pickle, which can run code when it is read: convert "
                    "it to safetensors where you trust it"
                    if pickled
                    else ""
                )
                raise FileNotFoundError(f"{self.directory}: no .safetensors file{hint}")
            return files
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise FormatError(f"{index}: weight_map does not map names to files")
        files = []
        for name in sorted(set(names.values())):
            file = self.directory / name
            if Path(name).name != name or not file.is_file():
                raise FormatError(f"{index}: names {name!r}, which is no file of this directory")
            files.append(file)
        return files

    def _list(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle: Any = safe_open(file, framework="pt")
            self.metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise FormatError(f"{file}: tensor {name!r} is in {other} already")
                view = handle.get_slice(name)
                stored = str(view.get_dtype())
                self.tensors[name] = Header(
                    file, _DTYPES.get(stored), stored, tuple(view.get_shape())
                )
        except (SafetensorError, ValueError) as problem:
            if isinstance(problem, FormatError):
                raise
            raise FormatError(f"{file}: not a sound safetensors file ({problem})") from None
        self._open[file] = handle

    def read(self, name: str) -> Tensor:
        """One tensor, of any type that torch has here."""
        from safetensors import SafetensorError

        header = self.tensors.get(name)
        if header is None:
            raise FormatError(f"{self.directory}: no tensor {name!r}")
        try:
            tensor: Tensor = self._open[header.file].get_tensor(name)
        except (SafetensorError, ValueError, KeyError) as problem:
            raise FormatError(f"{header.file}: {name} cannot be read ({problem})") from None
        return tensor

    def layers(self, marker: str) -> list[str]:
        """Paths of the modules that hold a tensor called ``marker``."""
        end = "." + marker
        return [name[: -len(end)] for name in self.tensors if name.endswith(end)]

    @functools.cached_property
    def parts(self) -> dict[str, set[str]]:
        """The names of the tensors that each module holds itself."""
        found: dict[str, set[str]] = {}
        for name in self.tensors:
            path, _, part = name.rpartition(".")
            found.setdefault(path, set()).add(part)
        return found


@dataclass(frozen=True)
class Layer:
    """The tensors of one linear of a checkpoint."""

    checkpoint: Checkpoint
    path: str

    def fail(self, problem: str) -> FormatError:
        return FormatError(f"{self.checkpoint.directory}: {self.path}: {problem}")

    def has(self, name: str) -> bool:
        return f"{self.path}.{name}" in self.checkpoint.tensors

    def shape(self, name: str, dimensions: int, dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone; refuses other dtypes and dimensions."""
        header = self.checkpoint.tensors.get(f"{self.path}.{name}")
        if header is None:
            raise self.fail(f"{name} is missing")
        if header.dtype not in dtypes:
            raise self.fail(f"{name} is {header.stored}; expected {_names(dtypes)}")
        if len(header.shape) != dimensions or 0 in header.shape:
            raise self.fail(f"{name} has shape {list(header.shape)}; expected {dimensions} sizes")
        return header.shape

    def require(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        """FormatError for a tensor of another shape or dtype, by its header."""
        found = self.shape(name, len(shape), dtypes)
        if found != tuple(shape):
            raise self.fail(f"{name} has shape {list(found)}; expected {list(shape)}")

    def take(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
        """A tensor that must have this shape and one of these dtypes; both checked first."""
        self.require(name, shape, dtypes)
        return self.checkpoint.read(f"{self.path}.{name}")

    def scales(self, name: str, shape: Sequence[int]) -> Tensor:
        """Floating parameters; one that is not finite would hide in codes."""
        values = self.take(name, shape, (torch.float16, torch.bfloat16, torch.float32))
        if not bool(torch.isfinite(values).all()):
            raise self.fail(f"{name} holds an infinity or a NaN; the file is damaged")
        return values


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def number(config: Mapping[str, Any], key: str, where: str, *allowed: int) -> int:
    """An integer of a config; FormatError if it is missing or not one of ``allowed``."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or (allowed and value not in allowed):
        wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "an integer"
        raise FormatError(f"{where}: {key} is {value!r}; expected {wanted}")
    return value
