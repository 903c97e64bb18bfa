"""NVRTC: source + frozen Config -> cubin, through the disk cache. Needs no GPU and no driver."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from ..errors import KernelCompileError
from . import source, toolkit
from .cache import CubinCache, default_directory
from .source import KernelConfig, Program
from .toolkit import OLDEST_ARCH, Compiler

# NVRTC's defaults keep denormals, IEEE division and rounding ties: never a fast-math option here.
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
_EXPECTED = "(C7517)"  # a wait that ptxas puts into a loop: hopper_parts.cuh
_ARCH = re.compile(r"(sm|compute)_(\d+)[af]?")

_log = logging.getLogger(__name__)
_caches: dict[Path, CubinCache] = {}


def compile_cubin(config: KernelConfig, arch: str) -> bytes:
    """The cubin of ``config`` for ``arch`` ("sm_90a"), or for "compute_90" its PTX."""
    return compile_or_load(config, arch)[0]


def compile_or_load(config: KernelConfig, arch: str) -> tuple[bytes, bool]:
    """As ``compile_cubin``, and whether NVRTC had to run."""
    tools = toolkit.compiler()
    _check_arch(arch, tools)
    program = source.program(config)
    directory = default_directory()
    cache = _caches.setdefault(directory, CubinCache(directory))
    return cache.get_or_build(
        cache_key(program, arch, tools), lambda: _run_nvrtc(config, program, arch, tools)
    )


def arch_of_capability(major: int, minor: int) -> str:
    """What to compile for: "sm_80", "sm_90a", "sm_120". PTX for a GPU newer than this NVRTC."""
    number = 10 * major + minor
    known = toolkit.compiler().archs
    if number not in known:
        return f"compute_{max(arch for arch in known if arch < number)}"
    return "sm_90a" if number == 90 else f"sm_{number}"


def cache_key(program: Program, arch: str, tools: Compiler) -> str:
    """Everything the cubin depends on. The toolkit's headers count by their version, so that an
    environment that has moved keeps its cubins."""
    parts = [*_OPTIONS, arch, repr(tools.version), str(tools.headers_version)]
    parts += [program.name, program.text, *(part for header in program.headers for part in header)]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _check_arch(arch: str, tools: Compiler) -> None:
    match = _ARCH.fullmatch(arch)
    usable = [number for number in tools.archs if number >= OLDEST_ARCH]
    if match is None or int(match[2]) not in usable:
        raise KernelCompileError(
            f"arch={arch!r} is none that NVRTC {tools.version[0]}.{tools.version[1]} compiles "
            f"these kernels for: {', '.join(f'sm_{number}' for number in usable)}, sm_90a"
        )


def _run_nvrtc(config: KernelConfig, program: Program, arch: str, tools: Compiler) -> bytes:
    nvrtc = tools.nvrtc
    names = tuple(name.encode() for name, _ in program.headers)
    texts = tuple(text.encode() for _, text in program.headers)
    options = (*_OPTIONS, f"--gpu-architecture={arch}", f"--include-path={tools.headers}")
    handle = nvrtc.createProgram(program.text, program.name, texts, names)
    try:
        try:
            nvrtc.compileProgram(handle, options)
        except Exception as error:
            raise KernelCompileError(
                f"NVRTC {tools.version[0]}.{tools.version[1]} could not compile {config!r} for "
                f"{arch}:\n{nvrtc.getProgramLog(handle).strip() or error}"
            ) from error
        lines = nvrtc.getProgramLog(handle).splitlines()
        log = "\n".join(line for line in lines if line.strip(" \0") and _EXPECTED not in line)
        if log:
            _log.warning("NVRTC on %r for %s:\n%s", config, arch, log)
        image = nvrtc.getPTX(handle) if arch.startswith("compute") else nvrtc.getCUBIN(handle)
        return bytes(image)
    finally:
        nvrtc.destroyProgram(handle)
