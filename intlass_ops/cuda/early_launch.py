"""Launches that may begin while the kernel before them on their stream still runs (sm_90 and up).

CUDA calls it programmatic dependent launch. A kernel whose config says ``starts_early`` may be
under way as soon as every block of the one before it runs and has said so (``launch_dependents``,
memory.cuh). It may then read integer codes of weights, and must call ``wait_for_predecessors``
before it touches anything else. CUDA graphs keep this.

Of our kernels that say so only quantisers write integers, and each when all before it have ended.
So the codes of the last quantiser on a stream are the only ones that may still be under way: a GEMM
whose weights they are is launched in order. Inductor's kernels: lowering/under_way.py.

CuPy has no binding of cuLaunchKernelEx.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

from torch import Tensor

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of CUlaunchAttributeID
# CUlaunchAttribute: its id, then a union of 64 bytes
_ATTRIBUTE = ctypes.create_string_buffer(
    struct.pack("=I4xi60x", _PROGRAMMATIC_STREAM_SERIALIZATION, 1)
)


# By device and stream: the addresses of the last quantiser's codes
_under_way: dict[tuple[int, int], tuple[int, int]] = {}


def quantised(device_index: int, stream: int, codes: Tensor) -> None:
    """A quantiser that lets others start has just been enqueued."""
    start = codes.data_ptr()
    _under_way[device_index, stream] = start, start + codes.nbytes


def may_be_under_way(device_index: int, stream: int, address: int) -> bool:
    """Whether the last quantiser writes the codes at this address."""
    start, end = _under_way.get((device_index, stream), (0, 0))
    return start <= address < end


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
    configs: dict[int, bytes] = {}

    def enqueue(stream_ptr: int, table: int, extra: int) -> None:
        config = configs.get(stream_ptr)
        if config is None:
            config = configs[stream_ptr] = head + stream_ptr.to_bytes(8, "little") + tail
        status = launch(config, function, table, extra)
        if status:
            name = ctypes.c_char_p()
            libcuda().cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError((name.value or b"error %d" % status).decode())

    return enqueue
