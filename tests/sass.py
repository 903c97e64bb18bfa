"""What a cubin really contains: registers, memory and machine instructions of its kernels.

Through cuobjdump and nvdisasm, which Triton's wheel carries; a CUDA toolkit's on PATH do as well.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from intlass_ops.cuda import cubin

_USAGE = re.compile(
    r"Function (?P<entry>\w+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)
_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/")
# From sm_90 on the system keeps 1 KiB of shared memory of every block, and cuobjdump counts it in.
_RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Usage:
    """What one kernel needs."""

    registers: int  # a thread's
    local_bytes: int  # a thread's: arrays and spills that found no register
    shared_bytes: int  # a block's, static


def usage(image: bytes, entry: str, arch: str) -> Usage:
    found = {
        match["entry"]: match
        for match in _USAGE.finditer(_run("cuobjdump", "-res-usage", _whole(image)))
    }
    match = found[entry]
    shared = int(match["shared"])
    if int(re.sub(r"\D", "", arch)) >= 90:
        shared -= _RESERVED_SHARED
    return Usage(int(match["registers"]), int(match["stack"]) + int(match["local"]), shared)


def disassemble(image: bytes) -> str:
    """One instruction a line. Takes most of a second, whatever the size."""
    return _run("nvdisasm", "-c", _whole(image))


def disassemble_all(images: Sequence[bytes], arch: str) -> list[str]:
    """The same for many images in that second: bare instructions, told apart by their addresses."""
    codes = [cubin.code(image) for image in images]
    model = "SM" + re.sub(r"\D", "", arch)
    listing = _run("nvdisasm", f"--binary={model}", b"".join(codes))
    lines = [
        (int(match[1], 16), match.string)
        for match in map(_LINE.match, listing.split("\n"))
        if match
    ]
    found, end = [], 0
    for code in codes:
        start, end = end, end + len(code)
        found.append("\n".join(line for at, line in lines if start <= at < end))
    return found


def has_instruction(code: str, pattern: str) -> bool:
    """Whether an instruction of ``code`` begins with ``pattern``, a regular expression."""
    # "/*01d0*/  @P0 STL.128 [R1], R12 ;", the predicate being optional
    return re.search(rf"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\d+ +)?{pattern}", code, re.M) is not None


def _whole(image: bytes) -> bytes:
    """CuPy cuts off the last byte of an image, a zero."""
    return image + b"\0"


def _run(tool: str, option: str, content: bytes) -> str:
    path = _find(tool)
    if path is None:
        pytest.skip(f"no {tool}: it comes with Triton (pip install triton) or a CUDA toolkit")
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        result = subprocess.run([path, option, file.name], capture_output=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{tool} {option} failed: {result.stderr.decode()}")
    return result.stdout.decode()


@functools.cache
def _find(tool: str) -> Path | None:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / tool
        if bundled.is_file():
            return bundled
    on_path = shutil.which(tool)
    return Path(on_path) if on_path else None
