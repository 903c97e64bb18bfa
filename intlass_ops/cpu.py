"""Fast W4A16 and W8A16 products on a CPU: cpu_kernels.cpp, compiled once by the machine's compiler.

Lives here: building and calling those kernels, and the choice between them and a dense product of
decoded blocks. Not here: argument checks, alpha, bias and the rounding (ops/matmul.py), the oracle
and fallback (reference.py). Measurements, and why not ATen's int4 kernel: docs/notes/cpu.md.

torch.compile on a CPU needs a C++ compiler anyway; a machine without one gets a single warning and
the reference.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cuda.cache import CubinCache, default_directory
from .errors import KernelCompileError

# From this many rows of activations on, decoding blocks of w for a dense product is faster.
_DENSE_FROM_M = 16
# Decoded weights held at a time (4 MiB): what stays in cache between the decoding and the product.
_BLOCK_ELEMENTS = 1 << 20

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
# Contraction to FMA only rounds less; nothing here may reorder sums or assume finite numbers.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_GCC_FLAGS = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_TABLE = (_POINTER, _INT, _LONG, _LONG)
_SIZES_THREADS = (_LONG, _LONG, _LONG, _INT)
_SIGNATURES = {
    "matmul_int4": (_POINTER, _POINTER, _LONG, _POINTER, *_TABLE, *_TABLE, *_SIZES_THREADS),
    "matmul_int8": (_POINTER, _POINTER, _LONG, _POINTER, *_TABLE, *_SIZES_THREADS),
    "dequantize_int4": (_POINTER, _POINTER, *_TABLE, *_TABLE, *_SIZES_THREADS),
    "dequantize_int8": (_POINTER, _POINTER, *_TABLE, *_SIZES_THREADS),
}

# enum Kind of cpu_kernels.cpp
_KIND = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int8: 5,
    torch.uint8: 6,
}

_load_lock = threading.Lock()
_memory = threading.local()


def matmul_int4_a16(
    a: Tensor, packed_w: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, k: int
) -> Tensor | None:
    """float32 [..., N] = a @ w.T, w = (q - zeros) * scales, or None where nothing fast fits.

    a [..., K] floating; packed_w uint8 [N, ceil(K/2)]; scales, zeros [1 or N, 1 or K/group_size].
    """
    kernels = _loaded or _kernels()
    if kernels is None or not _has_memory(a, packed_w):
        return None
    n = packed_w.shape[0]
    m = a.numel() // k
    a, packed_w = _dense(a), packed_w.contiguous()
    if zeros is not None and zeros.dtype not in _KIND:
        zeros = zeros.to(torch.float32)
    y = a.new_empty((*a.shape[:-1], n))
    threads = torch.get_num_threads()
    tables = (*_table(scales), *_table(zeros))
    if m < _DENSE_FROM_M:
        kernels["matmul_int4"](
            y.data_ptr(), a.data_ptr(), m, packed_w.data_ptr(), *tables, n, k, group_size, threads
        )
        return y

    def decode(first: int, count: int, block: Tensor) -> None:
        codes = packed_w[first:].data_ptr()
        tables = (*_table(scales, first), *_table(zeros, first))
        kernels["dequantize_int4"](block.data_ptr(), codes, *tables, count, k, group_size, threads)

    return _by_blocks(a.view(m, k), y, decode)


def matmul_int8_a16(a: Tensor, b: Tensor, scales: Tensor, group_size: int) -> Tensor | None:
    """float32 [..., N] = a @ w.T, w = b * scales, or None where nothing fast fits.

    a [..., K] floating; b int8 [N, K]; scales [1 or N, 1 or K/group_size].
    """
    kernels = _loaded or _kernels()
    if kernels is None or not _has_memory(a, b):
        return None
    n, k = b.shape
    m = a.numel() // k
    a, b = _dense(a), b.contiguous()
    y = a.new_empty((*a.shape[:-1], n))
    threads = torch.get_num_threads()
    if m < _DENSE_FROM_M:
        kernels["matmul_int8"](
            y.data_ptr(), a.data_ptr(), m, b.data_ptr(), *_table(scales), n, k, group_size, threads
        )
        return y

    def decode(first: int, count: int, block: Tensor) -> None:
        codes = b[first:].data_ptr()
        table = _table(scales, first)
        kernels["dequantize_int8"](block.data_ptr(), codes, *table, count, k, group_size, threads)

    return _by_blocks(a.view(m, k), y, decode)


def _by_blocks(x: Tensor, y: Tensor, decode: Callable[[int, int, Tensor], None]) -> Tensor:
    """y = x @ w.T, with some rows of w at a time made by ``decode(first, count, block)``."""
    (m, k), n = x.shape, y.shape[-1]
    rows = min(n, max(64, _BLOCK_ELEMENTS // k))
    block, out = _scratch(rows * k).view(rows, k), y.view(m, n)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        decode(first, count, block)
        torch.mm(x, block[:count].T, out=out[:, first : first + count])
    return y


def _scratch(elements: int) -> Tensor:
    """A buffer of this thread, kept: fresh pages for every product cost more than decoding."""
    held: Tensor | None = getattr(_memory, "block", None)
    if held is None or held.numel() < elements:
        with torch.inference_mode(False):
            size = max(elements, _BLOCK_ELEMENTS)
            held = _memory.block = torch.empty(size, dtype=torch.float32, device="cpu")
    return held[:elements]


def _has_memory(a: Tensor, w: Tensor) -> bool:
    # Subclasses (functional tensors, fake ones) have no bytes to point at.
    return type(a) is Tensor and a.numel() > 0 and w.numel() > 0


def _dense(a: Tensor) -> Tensor:
    return (a if a.dtype is torch.float32 else a.to(torch.float32)).contiguous()


def _table(t: Tensor | None, first: int = 0) -> tuple[int | None, int, int, int]:
    """A [1 or N, 1 or G] table from row ``first``: address, kind, strides (0 where it repeats)."""
    if t is None:
        return None, 0, 0, 0
    rows, columns = t.shape
    row, column = t.stride()
    if rows == 1:
        row = 0
    address = t.data_ptr()
    if first:
        address += t.element_size() * first * row
    return address, _KIND[t.dtype], row, column if columns > 1 else 0


def _kernels() -> dict[str, Any] | None:
    return _loaded if _loaded is not None or _load_tried else _load()


_loaded: dict[str, Any] | None = None
_load_tried = False


def _load() -> dict[str, Any] | None:
    """Build or fetch the library, once a process; one warning if that cannot be done."""
    global _loaded, _load_tried
    with _load_lock:
        if not _load_tried:
            try:
                _loaded = _open(_binary())
            except (KernelCompileError, OSError) as error:
                warnings.warn(
                    f"intlass_ops computes on this CPU with its slow reference: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _load_tried = True
    return _loaded


def _binary() -> bytes:
    found = compiler()
    if found is None:
        raise KernelCompileError(
            "no C++ compiler (g++ or clang++) was found; on Debian and Ubuntu: apt-get install g++"
        )
    cache = CubinCache(default_directory())
    binary, _ = cache.get_or_build(_cache_key(found), lambda: _build(found))
    return binary


def compiler() -> str | None:
    """The C++ compiler, as torch.compile would choose it."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def _cache_key(compiler: str) -> str:
    """Everything the binary depends on: -march=native makes the processor a part of it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    cpu = platform.processor().encode()
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    names = (b"model name", b"flags", b"Features", b"CPU part")
    cpu += b"".join(sorted({line for line in lines if line.startswith(names)}))
    parts = (_SOURCE.read_bytes(), repr((_FLAGS, _GCC_FLAGS)).encode(), version, cpu)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _build(compiler: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.so"
        command = [
            compiler,
            *_FLAGS,
            *_GCC_FLAGS,
            "-shared",
            "-fPIC",
            "-o",
            str(target),
            str(_SOURCE),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            log = done.stderr[-2000:]
            raise KernelCompileError(f"{' '.join(command)} returned {done.returncode}:\n{log}")
        return target.read_bytes()


def _open(binary: bytes) -> dict[str, Any]:
    """Load from memory: folders for temporary files may forbid execution."""
    descriptor = os.memfd_create("intlass_cpu_kernels")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(binary)
        library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    kernels: dict[str, Any] = {}
    for name, arguments in _SIGNATURES.items():
        kernels[name] = getattr(library, f"intlass_{name}")
        kernels[name].argtypes, kernels[name].restype = arguments, None
    return kernels
