"""A kernel's source file and a frozen Config become the text that NVRTC compiles.

The Config's fields arrive in CUDA C++ as members of a generated ``struct Config``, by name:

    @dataclass(frozen=True)
    class GemmConfig:                       struct Config {
        source: ClassVar[str] = "gemm.cu"     static constexpr int block_m = 64;
        entry: ClassVar[str] = "gemm"         static constexpr bool has_zeros = true;
        block_m: int                          using out_type = __nv_bfloat16;
        has_zeros: bool                     };
        out_type: str

It comes before the source's first line; types of our own that a field names are declared for it.
Headers of ours travel as NVRTC's in-memory files, so a Program is complete by itself and its hash
says everything.
Compiling it is compiler.py's work.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from . import wgmma

SOURCE_DIR = Path(__file__).parent

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_TYPE_NAME = re.compile(r"[A-Za-z_][\w:<>, ]*")
# What a `using` line of the generated struct needs to have seen before it: nothing for the built-in
# types, a header of the toolkit, or else the declaration of a struct of ours.
_BUILT_IN = re.compile(r"\b(bool|char|short|int|long|float|double|signed|unsigned|void)\b")
_TOOLKIT_HEADERS = {
    "__nv_bfloat16": "cuda_bf16.h",
    "__nv_bfloat162": "cuda_bf16.h",
    "__half": "cuda_fp16.h",
    "__half2": "cuda_fp16.h",
}


class KernelConfig(Protocol):
    """A frozen dataclass whose fields are int, bool, enums of int and str (C++ types)."""

    source: ClassVar[str]  # file name in SOURCE_DIR
    entry: ClassVar[str]  # name of its extern "C" __global__ function
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Program:
    """Everything NVRTC reads, except the headers of the CUDA toolkit."""

    name: str  # as error messages give it: "intlass_ops/cuda/gemm.cu"
    text: str
    headers: tuple[tuple[str, str], ...]  # (name in #include "...", text), sorted by name


def program(config: KernelConfig) -> Program:
    """The generated struct, then ``config.source``, with every header that it can reach."""
    text = _read(config.source)
    headers = {
        name: f'#line 1 "{_display_name(name)}"\n{header}'
        for name, header in _headers(text).items()
    }
    name = _display_name(config.source)
    return Program(
        name=name,
        text=f'{config_struct(config)}{_wgmma(config)}#line 1 "{name}"\n{text}',
        headers=tuple(sorted(headers.items())),
    )


def _headers(text: str) -> dict[str, str]:
    """Every header of ours that a text can reach."""
    headers: dict[str, str] = {}
    included = _INCLUDE.findall(text)
    for name in included:  # grows while it is walked
        if name not in headers and (SOURCE_DIR / name).is_file():
            headers[name] = _read(name)
            included += _INCLUDE.findall(headers[name])
    return headers


@functools.cache
def digest(name: str) -> str:
    """Says which state of a kernel's file and headers was measured: comments and spaces aside."""
    text = _read(name)
    parts = [text, *(header for _, header in sorted(_headers(text).items()))]
    code = (re.sub(r"\s+", "", re.sub(r"//[^\n]*", "", part)) for part in parts)
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:12]


def _wgmma(config: KernelConfig) -> str:
    """What a config with a ``wgmma`` property asks for: (kind of the operands, columns)."""
    shape = getattr(config, "wgmma", None)
    return "" if shape is None else wgmma.wrappers(*shape)


def config_struct(config: KernelConfig) -> str:
    """``struct Config { ... };`` after the declarations of the types it names."""
    if not dataclasses.is_dataclass(config) or not _is_frozen(type(config)):
        # A config that can change after it was looked up would be a wrong key of every cache.
        raise TypeError(f"kernel config {config!r} is not a frozen dataclass")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    types = sorted({value for value in values.values() if isinstance(value, str)})
    members = [f"  {_member(name, value)}" for name, value in values.items()]
    declarations = dict.fromkeys(map(_declaration, types))  # once each
    return "\n".join([*filter(None, declarations), "struct Config {", *members, "};", ""])


def _declaration(type_name: str) -> str:
    if type_name in _TOOLKIT_HEADERS:
        return f"#include <{_TOOLKIT_HEADERS[type_name]}>"
    if _BUILT_IN.search(type_name) or not type_name.isidentifier():
        return ""
    return f"struct {type_name};"


def _member(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"static constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):  # enums of int included
        kind = "int" if -(2**31) < value < 2**31 else "long long"
        return f"static constexpr {kind} {name} = {int(value)};"
    if isinstance(value, str) and _TYPE_NAME.fullmatch(value):
        return f"using {name} = {value};"
    raise TypeError(f"config field {name}={value!r} is none of int, bool and a C++ type name")


def _is_frozen(cls: type) -> bool:
    return bool(getattr(cls, "__dataclass_params__").frozen)  # noqa: B009 - typeshed has no name for it


def _read(name: str) -> str:
    return (SOURCE_DIR / name).read_text(encoding="utf-8")


def _display_name(name: str) -> str:
    """``package/folder/file``: enough to find the file, and the same on every machine."""
    return f"{SOURCE_DIR.parent.name}/{SOURCE_DIR.name}/{name}"
