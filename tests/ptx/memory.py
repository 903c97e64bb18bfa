"""Global memory, and the instructions that load, store and change it, or shared memory."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import copies
from .text import BYTES, STORED, Instruction

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step, Values


def step(machine: Machine, i: Instruction) -> Step | None:
    of_name = {"ld": _load, "st": _store, "atom": _atomic, "red": _atomic}.get(i.name)
    return None if of_name is None else of_name(machine, i)


class OutOfBounds(RuntimeError):
    """A kernel read or wrote where no tensor lies."""


class Memory:
    """The bytes of some arrays at their own addresses."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        """``arrays``: of uint8, one dimension, which share no bytes."""
        found = sorted((a.__array_interface__["data"][0], a) for a in arrays if a.size)
        self.starts = [start for start, _ in found]
        self.arrays = [a for _, a in found]

    def _parts(self, addresses: Values, size: int, line: str) -> list[tuple[Any, Any, Any]]:
        """(array, which of the addresses, their places in it in elements of ``size`` bytes)"""
        if np.any(addresses % np.uint64(size)):
            raise OutOfBounds(f"not aligned to {size} bytes: {line}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        index = bisect.bisect_right(self.starts, low) - 1
        everything: Any = slice(None)
        if index >= 0 and high <= self.starts[index] + self.arrays[index].size:
            return [(index, everything, addresses)]
        indices = np.searchsorted(np.array(self.starts, dtype=np.uint64), addresses, "right") - 1
        parts = []
        for index in np.unique(indices):
            which = np.flatnonzero(indices == index)
            some = addresses[which]
            if index < 0 or int(some.max()) + size > self.starts[index] + self.arrays[index].size:
                raise OutOfBounds(f"{int(some.max()):#x}: {line}")
            parts.append((index, which, some))
        return parts

    def _typed(self, index: int, size: int) -> Any:
        whole = self.arrays[index]
        return whole[: whole.size // size * size].view(STORED[size])

    def load(self, addresses: Values, size: int, line: str) -> Values:
        out = np.empty(len(addresses), STORED[size])
        for index, which, some in self._parts(addresses, size, line):
            at = ((some - np.uint64(self.starts[index])) // np.uint64(size)).astype(np.int64)
            out[which] = self._typed(index, size)[at]
        return out

    def store(self, addresses: Values, values: Values, size: int, line: str) -> None:
        for index, which, some in self._parts(addresses, size, line):
            at = ((some - np.uint64(self.starts[index])) // np.uint64(size)).astype(np.int64)
            self._typed(index, size)[at] = values[which]


def _load(machine: Machine, i: Instruction) -> Step:
    into, source = i.operands
    kind = i.types[-1]
    size, is_signed = BYTES[kind], kind.startswith("s") and BYTES[kind] < 4
    outs = into.items if into.kind == "vector" else (into,)
    writes = [machine.setter(o) for o in outs]
    address = machine.address(source)
    if "param" in i.modifiers:

        def parameter(lanes: Lanes) -> None:
            first = (address(lanes) - np.uint64(copies.PARAMETERS)).astype(np.int64)
            for k, write in enumerate(writes):
                places = (first + k * size)[:, None] + np.arange(size)
                write(lanes, machine.parameters[places].view(STORED[size])[:, 0])

        return parameter
    shared = any(m.startswith("shared") for m in i.modifiers)
    assert shared or "global" in i.modifiers, i.line
    spins = "acquire" in i.modifiers

    def step(lanes: Lanes) -> Any:
        at = address(lanes)
        _check_vector(at, size * len(writes), i)
        for k, write in enumerate(writes):
            some = at + np.uint64(k * size)
            if shared:
                value = machine.shared_as(size)[machine.shared_places(some, lanes, size, i.line)]
            else:
                value = machine.memory.load(some, size, i.line)
            if is_signed:
                value = value.view(f"i{size}").astype(np.int64).astype(np.uint64)
                value = value.astype(machine.program.dtypes[outs[k].text])
            write(lanes, value)
        if not spins:
            return None
        which = machine.indices(lanes)
        machine.pc[which], machine.yielded[which] = machine.here + 1, True
        return True

    return step


def _check_vector(at: Values, size: int, i: Instruction) -> None:
    if np.any(at % np.uint64(size)):
        raise OutOfBounds(f"not aligned to {size} bytes: {i.line}")


def _store(machine: Machine, i: Instruction) -> Step:
    if "async" in i.modifiers:
        return copies.store_async(machine, i)
    into, source = i.operands
    size = BYTES[i.types[-1]]
    sources = source.items if source.kind == "vector" else (source,)
    getters, address = [machine.getter(o, size) for o in sources], machine.address(into)
    shared = any(m.startswith("shared") for m in i.modifiers)
    assert shared or "global" in i.modifiers, i.line

    def step(lanes: Lanes) -> None:
        at = address(lanes)
        _check_vector(at, size * len(getters), i)
        for k, get in enumerate(getters):
            value = np.broadcast_to(get(lanes), at.shape).astype(STORED[size])
            some = at + np.uint64(k * size)
            if shared:
                machine.shared_as(size)[machine.shared_places(some, lanes, size, i.line)] = value
            else:
                machine.memory.store(some, value, size, i.line)

    return step


def _atomic(machine: Machine, i: Instruction) -> Step:
    returns = i.name == "atom"
    target, source = i.operands[returns : returns + 2]
    kind = i.types[-1]
    size = BYTES[kind]
    address, get = machine.address(target), machine.getter(source, size)
    write = machine.setter(i.operands[0]) if returns else None
    how = next(m for m in i.modifiers if m in ("add", "or", "and", "max", "min", "exch"))
    combine: dict[str, Callable[[int, int], int]] = {
        "add": lambda a, b: a + b & (1 << 8 * size) - 1,
        "or": lambda a, b: a | b, "and": lambda a, b: a & b, "exch": lambda a, b: b,
        "max": max, "min": min,
    }  # fmt: skip

    def step(lanes: Lanes) -> None:
        at = address(lanes)
        values = np.broadcast_to(get(lanes), at.shape)
        before = np.empty(len(at), STORED[size])
        for k in range(len(at)):
            one = at[k : k + 1]
            before[k] = machine.memory.load(one, size, i.line)[0]
            after = combine[how](int(before[k]), int(values[k]))
            machine.memory.store(one, np.array([after], STORED[size]), size, i.line)
        if write is not None:
            write(lanes, before)

    return step
