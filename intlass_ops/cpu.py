"""Fast CPU products of weights of 4 and 8 bits: cpu_kernels.cpp, compiled here, once.

Lives here: building and calling those kernels. A plan holds what a call's signature (dtypes,
shapes, strides) decides, so that the next such call only fills in pointers. Not here: argument
checks, alpha, bias and what follows (ops/matmul_kernels.py), oracle and fallback (reference.py).
Measurements, and why not ATen's int4 kernel: docs/notes/cpu.md.

torch.compile on a CPU needs a C++ compiler anyway; a machine without one gets a single warning and
the reference.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
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

from . import batch_invariance, lut4
from .cuda.cache import CubinCache, default_directory
from .errors import KernelCompileError

_TILES_FROM_M = 6  # kTileFrom of cpu_kernels.cpp
_TILE_M = 4  # rows of a whole tile there

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
_TABLE = (_POINTER, _INT, _LONG, _LONG)  # address, kind, strides of rows and columns
_SIZES_THREADS = (_LONG, _LONG, _LONG, _INT)
_SIGNATURES = {
    "matmul_int4": (_POINTER, _POINTER, _LONG, _POINTER, *_TABLE, *_TABLE, *_SIZES_THREADS),
    "matmul_int8": (_POINTER, _POINTER, _LONG, _POINTER, *_TABLE, *_SIZES_THREADS),
    "matmul_fp8": (_POINTER, _POINTER, _LONG, _POINTER, *_TABLE, *_SIZES_THREADS),
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
_OF_BYTES = {"s8": "matmul_int8", "e4m3": "matmul_fp8"}  # kernels of a code a byte
_FP4_SCALES, _FP4_CODES = {32: 7, 16: 8}, 9  # by the size of a group: e8m0, e4m3; e2m1
_SIXTEEN = 10  # values of a table's codes
_X_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_load_lock = threading.Lock()
# What Inductor's generated code allocates with (PyTorch 2.11 and 2.13), in half the time.
_empty: Callable[..., Tensor] = getattr(
    torch._C._dynamo.guards,
    "_empty_strided_cpu",
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype),
)


class Plan:
    """What the signature of a call decides: the kernel and every argument but the pointers."""

    why = "decoded in registers, few tokens"
    _why_tiles = "decoded into the first-level cache, many tokens"

    def __init__(
        self, problem: Any, shape: tuple[int, ...], scales: Tensor, zeros: Tensor | None
    ) -> None:
        """``shape``: of a. Scales and zeros: scalar, [N] or [N, 1 or K/group_size]."""
        self.problem = problem
        n, k, group_size = problem.n, problem.k, problem.group_size
        self.m = self.rows = math.prod(shape[:-1])
        if batch_invariance.enabled():
            # Whole tiles of rows alone: every row passes through the same instructions.
            self.rows = math.ceil(max(self.m, _TILES_FROM_M) / _TILE_M) * _TILE_M
        if self.rows >= _TILES_FROM_M:
            self.why = self._why_tiles
        self.shape = (*shape[:-1], n)
        self.strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        self.scales, self.zeros = _table(scales), _table(zeros)
        self.sizes = (n, k, group_size)
        self.unit = 1.0  # of the sums
        if problem.w_kind == "e2m1":
            self.scales = _FP4_SCALES[group_size], *self.scales[1:]
            self.zeros = _FP4_CODES, 0, 0
            self.unit = 4.0 if group_size == 32 else 1.0
        self.values: Any = None  # of codes that are neither integers nor e2m1
        if problem.w_kind in lut4.TABLES:
            self.values = _values(problem.w_kind, _X_DTYPE[problem.x_kind])
            self.zeros = _SIXTEEN, 0, 0
        self.zero_type = None if zeros is None or zeros.dtype in _KIND else torch.float32
        self.of_bytes = _OF_BYTES.get(problem.w_kind)

    def run(self, a: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """float32 [..., N] = a @ w.T; what follows is the caller's."""
        kernels = _loaded
        assert kernels is not None, "a plan is made after the kernels are loaded"
        # A copy must outlive the call that reads its pointer.
        a = (a if a.dtype is torch.float32 else a.to(torch.float32)).contiguous()
        w = w.contiguous()
        if self.rows != self.m:
            a = torch.nn.functional.pad(a.view(self.m, -1), (0, 0, 0, self.rows - self.m))
            y = _empty((self.rows, self.sizes[0]), (self.sizes[0], 1), torch.float32)
        else:
            y = _empty(self.shape, self.strides, torch.float32)
        pointers = (y.data_ptr(), a.data_ptr(), self.rows, w.data_ptr(), scales.data_ptr())
        threads = torch.get_num_threads()
        if self.of_bytes is not None:
            kernels[self.of_bytes](*pointers, *self.scales, *self.sizes, threads)
        elif zeros is None:
            kernels["matmul_int4"](
                *pointers, *self.scales, self.values, *self.zeros, *self.sizes, threads
            )
        else:
            z = zeros if self.zero_type is None else zeros.to(self.zero_type).contiguous()
            kernels["matmul_int4"](
                *pointers, *self.scales, z.data_ptr(), *self.zeros, *self.sizes, threads
            )
        if self.unit != 1.0:
            y *= self.unit
        return y if self.rows == self.m else y[: self.m].view(self.shape)


_plans: dict[Any, Plan] = {}
_MAX_PLANS = 4096  # one a number of tokens: a server would otherwise collect them for ever


def key_of(
    op: str,
    a: Tensor,
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int | None,
    out_dtype: torch.dtype | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Any:
    """The signature of a call: all that its checks and its plan read."""
    return (
        op,
        type(a),
        a.dtype,
        a.shape,
        w.dtype,
        w.shape,
        scales.dtype,
        scales.shape,
        scales.stride(),
        zeros is None or (zeros.dtype, zeros.shape, zeros.stride()),
        alpha is None or (alpha.dtype, alpha.shape),
        bias is None or (bias.dtype, bias.shape),
        activation,
        residual is None or (residual.dtype, residual.shape),
        k,
        out_dtype,
        batch_invariance.enabled(),
    )


find = _plans.get


def make(
    key: Any, problem: Any, a: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None
) -> Plan | None:
    """The plan of a checked call, kept under ``key``; None where nothing fast fits."""
    # Subclasses (functional tensors, fake ones) have no bytes to point at.
    if type(a) is not Tensor or not a.is_floating_point() or not a.numel() or not w.numel():
        return None
    if (_loaded or _kernels()) is None:
        return None
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    plan = _plans[key] = Plan(problem, tuple(a.shape), scales, zeros)
    return plan


@functools.cache
def _values(table: str, dtype: torch.dtype) -> Any:
    """Its numbers, rounded to ``dtype``, as sixteen C floats."""
    return (ctypes.c_float * 16)(*lut4.numbers(table, dtype).tolist())


def _table(t: Tensor | None) -> tuple[int, int, int]:
    """Kind and strides (0 where it repeats) of a scalar, [N] or [N, 1 or G] table."""
    if t is None:
        return 0, 0, 0
    kind = _KIND.get(t.dtype, _KIND[torch.float32])
    if t.numel() == 1:
        return kind, 0, 0
    # Zeros of a dtype without a kind are converted to dense ones.
    strides = t.stride() if t.dtype in _KIND else t.contiguous().stride()
    return kind, strides[0], strides[1] if t.dim() == 2 and t.shape[1] > 1 else 0


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
    # Stays open: the loader knows libraries by name, and would take the next of this number for it.
    with open(descriptor, "wb", closefd=False) as file:
        file.write(binary)
    library = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    kernels: dict[str, Any] = {}
    for name, arguments in _SIGNATURES.items():
        kernels[name] = getattr(library, f"intlass_{name}")
        kernels[name].argtypes, kernels[name].restype = arguments, None
    return kernels
