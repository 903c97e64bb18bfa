"""Launches that may begin while the kernel before them on their stream still runs (sm_90 and up).

CUDA calls it programmatic dependent launch. A kernel whose config says ``starts_early`` may be
under way as soon as every block of the one before it runs and has said so (``launch_dependents``,
memory.cuh). It may then read integer codes of weights, which no kernel that says so writes, and
must call ``wait_for_predecessors`` before it touches anything else. CUDA graphs keep this.

CuPy has no binding of cuLaunchKernelEx.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID
# CUlaunchAttribute: its id, then a union of 64 bytes
_ATTRIBUTE = ctypes.create_string_buffer(
    struct.pack("=I4xi60x", _PROGRAMMATIC_STREAM_SERIALIZATION, 1)
)


@functools.cache
def libcuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = ctypes.c_char_p, *[ctypes.c_void_p] * 3
    library.cuGetErrorName.argtypes = ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)
    return library


def launcher(
    function: int, grid: tuple[int, int, int], block: tuple[int, int, int], smem_bytes: int
) -> Callable[[int, int, int], None]:
    """What enqueues ``function``, given a stream, a table of parameters and 0."""
    # CUlaunchConfig: dimensions, stream, attributes
    head = struct.pack("=7I4x", *grid, *block, smem_bytes)
    tail = struct.pack("=QI4x", ctypes.addressof(_ATTRIBUTE), 1)
    launch = libcuda().cuLaunchKernelEx

    def enqueue(stream_ptr: int, table: int, extra: int) -> None:
        status = launch(head + stream_ptr.to_bytes(8, "little") + tail, function, table, extra)
        if status:
            name = ctypes.c_char_p()
            libcuda().cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError((name.value or b"error %d" % status).decode())

    return enqueue
