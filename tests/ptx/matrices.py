"""Fragments of whole warps: ldmatrix, stmatrix, mma.sync and wgmma.

Layouts are those of the PTX ISA, "Matrix Fragments". Products are exact in float64 or int64; sums
are rounded to the accumulator's type once an instruction.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import (
    of_bfloat16,
    of_e4m3,
    of_e5m2,
    of_float16,
    to_float32,
)
from .text import Instruction, Operand

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step, Values

_LANES = np.arange(32)
_GROUP, _QUARTER = _LANES // 4, _LANES % 4
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_BITS = {"bf16": 16, "f16": 16, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "e4m3": 8, "e5m2": 8}


def step(machine: Machine, i: Instruction) -> Step | None:
    if i.name == "ldmatrix":
        return _load_matrix(machine, i)
    if i.name == "stmatrix":
        return _store_matrix(machine, i)
    if i.name == "movmatrix":
        return _move_matrix(machine, i)
    if i.name == "mma":
        return _mma(machine, i)
    if i.name == "wgmma":
        return _wgmma(machine, i) if i.modifiers[0] == "mma_async" else lambda lanes: None
    return None


def _elements(words: Values, kind: str) -> Values:
    """The numbers of 32-bit words [..., R], in order of their place: [..., R * 32 / bits]."""
    bits = _BITS[kind]
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    parts = words[..., None] >> shifts & np.uint32((1 << bits) - 1)
    parts = parts.reshape(*words.shape[:-1], -1)
    if kind == "bf16":
        return of_bfloat16(parts.astype(np.uint16))
    if kind == "f16":
        return of_float16(parts.astype(np.uint16))
    if kind == "e4m3":
        return of_e4m3(parts)
    if kind == "e5m2":
        return of_e5m2(parts)
    values = parts.astype(np.int64)
    if kind.startswith("s"):
        values = np.where(values >> (bits - 1), values - (1 << bits), values)
    return values


def _words(machine: Machine, operand: Operand, lanes: Lanes) -> Values:
    """uint32 [warps, 32, registers]"""
    items = operand.items or (operand,)
    count = len(machine.indices(lanes))
    columns = [np.broadcast_to(machine.getter(o, 4)(lanes), count) for o in items]
    return np.stack(columns, -1).reshape(-1, 32, len(items)).view(np.uint32)


def _matrix_of(words: Values, kind: str, rows: int, k: int) -> Values:
    """[warps, rows, k] of the fragments of A (16 rows) or B (8 columns).

    A register holds 32 bits of k of a row; registers go by rows (of A), then by the halves of k.
    """
    numbers = _elements(words, kind)
    each = 32 // _BITS[kind]  # of a register
    out = np.zeros((len(words), rows, k), numbers.dtype)
    halves = rows // 8
    for register in range(words.shape[-1]):
        row = _GROUP + 8 * (register % halves)
        first = register // halves * 4 * each + _QUARTER * each
        for e in range(each):
            out[:, row, first + e] = numbers[:, :, register * each + e]
    return out


def _sums(words: Values, integers: bool) -> Values:
    if integers:
        return words.view(np.int32).astype(np.int64)
    return words.view(np.float32).astype(np.float64)


def _rounded(sums: Values, integers: bool) -> Values:
    return sums.astype(np.int32).view(np.uint32) if integers else to_float32(sums)


def _mma(machine: Machine, i: Instruction) -> Step:
    shape = next(m for m in map(_SHAPE.fullmatch, i.modifiers) if m)
    rows, columns, k = map(int, shape.groups())
    assert (rows, columns) == (16, 8), i.line
    kinds = [m for m in i.modifiers if m in _BITS or m in ("f32", "s32")]
    integers = kinds[0] == "s32"
    d, a, b, c = i.operands
    writes = [machine.setter(o) for o in d.items]

    def multiply(lanes: Lanes) -> None:
        left = _matrix_of(_words(machine, a, lanes), kinds[1], 16, k)
        right = _matrix_of(_words(machine, b, lanes), kinds[2], 8, k)
        product = left @ right.transpose(0, 2, 1)
        before = _sums(_words(machine, c, lanes), integers)
        for register, write in enumerate(writes):
            row, column = _GROUP + register // 2 * 8, 2 * _QUARTER + register % 2
            total = product[:, row, column] + before[:, :, register]
            write(lanes, _rounded(total, integers).reshape(-1))

    return multiply


def _load_matrix(machine: Machine, i: Instruction) -> Step:
    count = int(next(m[1:] for m in i.modifiers if m in ("x1", "x2", "x4")))
    transposed = "trans" in i.modifiers
    outs = i.operands[0].items or i.operands[:1]
    address, writes = machine.address(i.operands[1]), [machine.setter(o) for o in outs]

    def load(lanes: Lanes) -> None:
        at = address(lanes).reshape(-1, 32)
        which = machine.indices(lanes).reshape(-1, 32)
        for m in range(count):
            rows = at[:, 8 * m : 8 * m + 8]
            threads = which[:, 8 * m : 8 * m + 8].reshape(-1)
            place = machine.shared_places(rows.reshape(-1), threads, 16, i.line)
            matrix = machine.shared.view(np.uint16).reshape(-1, 8)[place].reshape(-1, 8, 8)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            pairs = np.ascontiguousarray(matrix).view(np.uint32)  # [warps, 8, 4]
            writes[m](lanes, pairs.reshape(-1))

    return load


def _move_matrix(machine: Machine, i: Instruction) -> Step:
    assert "trans" in i.modifiers, i.line
    get, write = machine.getter(i.operands[1], 4), machine.setter(i.operands[0])

    def move(lanes: Lanes) -> None:
        matrix = np.ascontiguousarray(get(lanes)).view(np.uint16).reshape(-1, 8, 8)
        write(lanes, np.ascontiguousarray(matrix.transpose(0, 2, 1)).view(np.uint32).reshape(-1))

    return move


def _store_matrix(machine: Machine, i: Instruction) -> Step:
    count = int(next(m[1:] for m in i.modifiers if m in ("x1", "x2", "x4")))
    transposed = "trans" in i.modifiers
    sources = i.operands[1].items or i.operands[1:2]
    address, getters = machine.address(i.operands[0]), [machine.getter(o, 4) for o in sources]

    def store(lanes: Lanes) -> None:
        at = address(lanes).reshape(-1, 32)
        which = machine.indices(lanes).reshape(-1, 32)
        for m in range(count):
            pairs = np.ascontiguousarray(getters[m](lanes)).reshape(-1, 8, 4)
            matrix = pairs.view(np.uint16).reshape(-1, 8, 8)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            rows, threads = at[:, 8 * m : 8 * m + 8], which[:, 8 * m : 8 * m + 8].reshape(-1)
            place = machine.shared_places(rows.reshape(-1), threads, 16, i.line)
            machine.shared.view(np.uint16).reshape(-1, 8)[place] = matrix.reshape(-1, 8)

    return store


# ------------------------------------------------------------------------------------- wgmma


def _tile(machine: Machine, block: int, descriptor: int, rows: int, row_bytes: int) -> Values:
    """uint8 [rows, row_bytes] of an operand in shared memory, rows along k.

    Eight rows are a unit, `stride` bytes from one to the next; bits of the address are swizzled.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    span = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]  # bytes of a row of a unit
    row, byte = np.arange(rows)[:, None], np.arange(row_bytes)[None, :]
    if span == 16:  # units of 8 rows by 16 bytes, side by side
        at = start + row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
    else:
        at = start + row // 8 * stride + row % 8 * span + byte
        at = at ^ ((at >> 7 & (span // 16 - 1)) << 4)
    assert at.max() < machine.shared_bytes
    return machine.shared[block * machine.row + at]


def _wgmma(machine: Machine, i: Instruction) -> Step:
    shape = next(m for m in map(_SHAPE.fullmatch, i.modifiers) if m)
    _, columns, k = map(int, shape.groups())
    kinds = [m for m in i.modifiers if m in _BITS or m in ("f32", "s32")]
    integers = kinds[0] == "s32"
    d, a, b, accumulate, *flags = i.operands
    scales = [int(o.text) for o in flags]
    assert scales[:2] in ([], [1, 1]), i.line
    assert not any(scales[2:]), f"transposed: {i.line}"
    writes = [machine.setter(o) for o in d.items]
    get_b, get_p = machine.getter(b, 8), machine.getter(accumulate, 1)
    row_bytes = k * _BITS[kinds[1]] // 8

    def multiply(lanes: Lanes) -> None:
        which = machine.indices(lanes)
        assert len(which) % 128 == 0
        groups = which.reshape(-1, 128)
        assert np.all(groups[:, 0] % 128 == 0)
        assert np.all(np.diff(groups, axis=1) == 1)
        keep = np.broadcast_to(get_p(lanes), which.shape).reshape(-1, 128)[:, 0]
        right = np.broadcast_to(get_b(lanes), which.shape).reshape(-1, 128)[:, 0]
        before = _sums(_words(machine, d, lanes), integers)  # [warps, 32, registers]
        before = before.reshape(-1, 4, 32, len(writes))
        after = np.empty_like(before)
        if a.kind == "vector":
            of_warps = _matrix_of(_words(machine, a, lanes), kinds[1], 16, k)
            left = of_warps.reshape(-1, 64, k)
        else:
            given = np.broadcast_to(machine.getter(a, 8)(lanes), which.shape).reshape(-1, 128)
            left = np.stack([
                _numbers(_tile(machine, int(machine.block[group[0]]), int(place[0]), 64, row_bytes),
                         kinds[1])
                for group, place in zip(groups, given, strict=True)
            ])  # fmt: skip
        for g, group in enumerate(groups):
            tile = _tile(machine, int(machine.block[group[0]]), int(right[g]), columns, row_bytes)
            product = left[g] @ _numbers(tile, kinds[2]).T
            for register in range(len(writes)):
                row = _GROUP + register // 2 % 2 * 8
                column = register // 4 * 8 + 2 * _QUARTER + register % 2
                for warp in range(4):
                    total = product[16 * warp + row, column]
                    old = before[g, warp, :, register] if keep[g] else 0
                    after[g, warp, :, register] = total + old
        for register, write in enumerate(writes):
            write(lanes, _rounded(after[..., register].reshape(-1), integers))

    return multiply


def _numbers(tile: Values, kind: str) -> Any:
    return _elements(np.ascontiguousarray(tile).view(np.uint32), kind)
