"""Tensor maps: how TMA (sm_90 and newer) is told where a matrix lies and which box of it to copy.

CuPy has no binding of cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import ctypes
import functools

from ..errors import KernelLaunchError
from .early_launch import libcuda

NUM_BYTES = 128  # of a CUtensorMap
_ALIGNMENT = 64
# enum values of cuda.h
_UINT8, _NO_INTERLEAVE, _L2_PROMOTION_128B, _ZEROS_OUTSIDE = 0, 0, 2, 0
_SWIZZLE = {32: 1, 64: 2, 128: 3, 256: 0}  # by the bytes of a row of the box


@functools.lru_cache(maxsize=8192)
def of_rows(
    address: int, rows: int, row_bytes: int, stride: int, box_rows: int, box_bytes: int
) -> bytes:
    """The map of a row-major matrix of bytes, copied in boxes, zero outside.

    ``address`` and ``stride`` (bytes from row to row) are multiples of 16. Rows of a box have
    ``box_bytes``: 32, 64 or 128, swizzled, or 256 as they lie.
    """
    room = (ctypes.c_char * (NUM_BYTES + _ALIGNMENT))()
    start = ctypes.addressof(room)
    start += -start % _ALIGNMENT
    status = libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        _UINT8,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(row_bytes, rows),
        (ctypes.c_uint64 * 1)(stride),
        (ctypes.c_uint32 * 2)(box_bytes, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE[box_bytes],
        _L2_PROMOTION_128B,
        _ZEROS_OUTSIDE,
    )
    if status:
        raise KernelLaunchError(
            f"cuTensorMapEncodeTiled: error {status} for {rows} rows of {row_bytes} bytes, "
            f"{stride} bytes apart, at {address:#x}, in boxes of {box_rows} x {box_bytes}"
        )
    return ctypes.string_at(start, NUM_BYTES)
