"""What a compiled kernel says about itself, read from the bytes: no driver, no tools.

A cubin is an ELF file. Its section ``.nv.info.<entry>`` holds one KPARAM_INFO record for each
kernel parameter; PTX spells the same out as ``.param`` lines. Checked against NVRTC 12.9 and 13.0.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

_KPARAM_INFO = 0x17
_FRAME_SIZE = 0x11  # in ".nv.info": symbol, bytes
_SIZED_VALUE = 0x04  # attribute format: a 16-bit size, then that many bytes
# .param .u32 name | .param .u64 .ptr .global .align 16 name | .param .align 64 .b8 name[128]
_PTX_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)(?:\s+\.ptr[\s.\w]*)?\s+[\w$]+(?:\[(\d+)\])?"
)


def parameter_sizes(image: bytes, entry: str) -> tuple[int, ...]:
    """Bytes of each parameter of kernel ``entry``, in order.

    Raises ValueError where ``image`` is not a cubin or PTX that holds ``entry``.
    """
    if image.startswith(b"\x7fELF"):
        return _sizes_in_cubin(image, entry)
    return _sizes_in_ptx(image.decode("utf-8", errors="replace"), entry)


def stack_bytes(image: bytes) -> int:
    """Local memory of a thread: what found no register. 0 for PTX, which does not know yet."""
    if not image.startswith(b"\x7fELF"):
        return 0
    info = dict(_sections(image)).get(".nv.info", b"")
    return max((struct.unpack("<II", v)[1] for v in _values(info, _FRAME_SIZE)), default=0)


def code(image: bytes) -> bytes:
    """The instructions of a cubin, one function after the other."""
    return b"".join(text for name, text in _sections(image) if name.startswith(".text."))


def _sizes_in_cubin(image: bytes, entry: str) -> tuple[int, ...]:
    wanted = f".nv.info.{entry}"
    sections = dict(_sections(image))
    if wanted not in sections:
        raise ValueError(f"cubin has no section {wanted}")
    sizes = {}
    for value in _values(sections[wanted], _KPARAM_INFO):
        # index, ordinal, offset; then bits, of which the upper 14 are the size
        _, ordinal, _, bits = struct.unpack("<IHHI", value)
        sizes[ordinal] = bits >> 18
    return tuple(sizes[ordinal] for ordinal in range(len(sizes)))


def _values(info: bytes, wanted: int) -> Iterator[bytes]:
    """The records of one attribute in a section of kernel information."""
    position = 0
    while position < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, position)
        position += 4
        if form == _SIZED_VALUE:
            if attribute == wanted:
                yield info[position : position + size]
            position += size


def _sections(image: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every section of a 64-bit little-endian ELF image that has content."""
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", image, table + i * entry_size)  # name, type, -, -, at, size
        for i in range(count)
    ]
    names_at = headers[names_index][4]
    for name, kind, _, _, at, size in headers:
        if kind != 8:  # NOBITS takes no room in the file
            start = names_at + name
            yield image[start : image.index(b"\0", start)].decode(), image[at : at + size]


def _sizes_in_ptx(text: str, entry: str) -> tuple[int, ...]:
    declaration = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(([^)]*)\)", text)
    if declaration is None:
        raise ValueError(f"PTX has no .entry {entry}")
    return tuple(
        int(count) if count else int(bits) // 8
        for bits, count in _PTX_PARAMETER.findall(declaration.group(1))
    )
