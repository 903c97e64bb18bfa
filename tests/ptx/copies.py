"""Asynchronous copies and what waits for them: cp.async, mbarriers, TMA, clusters.

A copy arrives as late as it may: when a thread waits for it, or when no thread can go on.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from .text import BYTES, STORED, Instruction

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step, Values

PARAMETERS = 1 << 60  # addresses of parameters
RANK = 24  # bits of an address of shared memory; above are 0, or 1 + the block of the cluster
_ONES = (1 << RANK) - 1


class Waits:
    """What is under way."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # cp.async: what a thread has asked for, and how many groups it has closed
        self.asked: list[tuple[Values, Values, Any]] = []
        self.groups = np.zeros(machine.count, np.int64)
        # mbarriers, by block and address: phase, arrivals to come, of a phase, bytes to come
        self.barriers: dict[tuple[int, int], list[int]] = {}
        self.sleepers: dict[tuple[int, int], list[Values]] = {}
        self.bulk: list[Any] = []  # copies by TMA, which nobody can go on without
        self.arrived = np.zeros(machine.count // machine.threads // machine.cluster, np.int64)
        self.of_cluster: dict[int, list[Values]] = {}

    def deliver(self) -> bool:
        """The oldest copy by TMA that is under way, if there is one."""
        if not self.bulk:
            return False
        self.bulk.pop(0)()
        return True

    def complete(self, key: tuple[int, int], arrivals: int, num_bytes: int) -> None:
        barrier = self.barriers[key]
        barrier[1] -= arrivals
        barrier[3] -= num_bytes
        assert barrier[1] >= 0, f"too many arrivals at {key}"
        if barrier[1] == 0 and barrier[3] == 0:
            barrier[0] ^= 1
            barrier[1] = barrier[2]
            for which in self.sleepers.pop(key, []):
                self.machine.blocked[which] = False


def _of_cluster(machine: Machine, address: int, thread: int) -> tuple[int, int]:
    """The block and the place of an address that may be another block's."""
    block, rank = int(machine.block[thread]), address >> RANK
    if rank:
        block = block // machine.cluster * machine.cluster + rank - 1
    return block, address & _ONES


def step(machine: Machine, i: Instruction) -> Step | None:
    if i.name == "cp":
        if "bulk" in i.modifiers:
            return _bulk(machine, i)
        return _wait_group(machine, i) if "wait_group" in i.modifiers else _cp_async(machine, i)
    if i.name == "mbarrier":
        return _mbarrier(machine, i)
    if i.name == "mapa":
        get, rank = machine.getter(i.operands[1], 4), machine.getter(i.operands[2], 4)
        write = machine.setter(i.operands[0])
        return lambda lanes: write(
            lanes, get(lanes) & np.uint32(_ONES) | rank(lanes) + np.uint32(1) << np.uint32(RANK)
        )
    return None


# ------------------------------------------------------------------------------------ cp.async


def commit(machine: Machine) -> Step:
    def close(lanes: Lanes) -> None:
        machine.waits.groups[machine.indices(lanes)] += 1

    return close


def _cp_async(machine: Machine, i: Instruction) -> Step:
    into, source, count, *more = i.operands
    size = int(count.text)
    to, of = machine.address(into), machine.address(source)
    length = machine.getter(more[0], 4) if more else None
    assert size in (4, 8, 16), i.line

    def ask(lanes: Lanes) -> None:
        which = machine.indices(lanes)
        place = machine.shared_places(to(lanes), lanes, size, i.line)
        at = of(lanes)
        if np.any(at % np.uint64(size)):
            raise ValueError(f"not aligned to {size} bytes: {i.line}")
        read = np.full(len(which), size)
        if length is not None:
            given = np.broadcast_to(length(lanes), which.shape)
            ignored = given.dtype == bool  # a predicate: nothing is read, zeros are written
            read = np.where(given, 0, size) if ignored else given.astype(np.int64)

        def arrive(some: Values) -> None:
            data = np.zeros((len(which), size), np.uint8)
            for first, each in [(w, 4) for w in range(0, size, 4)] + [(b, 1) for b in range(size)]:
                there = some & (read >= first + each)
                there &= (each == 4) | (read // 4 * 4 <= first)  # single bytes end what is read
                if there.any():
                    values = machine.memory.load(at[there] + np.uint64(first), each, i.line)
                    data[there, first : first + each] = values[:, None].view(np.uint8)
            machine.shared.reshape(-1, size)[place[some]] = data[some]

        machine.waits.asked.append((which, machine.waits.groups[which].copy(), arrive))

    return ask


def _wait_group(machine: Machine, i: Instruction) -> Step:
    pending = int(i.operands[0].text)

    def wait(lanes: Lanes) -> None:
        waits = machine.waits
        waiting = np.zeros(machine.count, bool)
        waiting[machine.indices(lanes)] = True
        left = []
        for which, group, arrive in waits.asked:
            due = waiting[which] & (group < waits.groups[which] - pending) & (group >= 0)
            if due.any():
                arrive(due)
                group[due] = -1
            if (group >= 0).any():
                left.append((which, group, arrive))
        waits.asked = left

    return wait


# ------------------------------------------------------------------------------------ mbarriers


def _mbarrier(machine: Machine, i: Instruction) -> Step:
    how = i.modifiers[0]
    if how == "try_wait":
        return _try_wait(machine, i)
    memory = next(o for o in i.operands if o.kind == "memory")
    address = machine.address(memory)
    rest = i.operands[i.operands.index(memory) + 1 :]
    get = machine.getter(rest[0], 4) if rest else None
    expects = "expect_tx" in i.modifiers

    def change(lanes: Lanes) -> None:
        waits = machine.waits
        which, at = machine.indices(lanes), address(lanes)
        values = np.broadcast_to(1 if get is None else get(lanes), which.shape)
        for thread, a, value in zip(which, at, values, strict=True):
            key = _of_cluster(machine, int(a), int(thread))
            if how == "init":
                waits.barriers[key] = [0, int(value), int(value), 0]
            elif how == "arrive":
                if expects:
                    waits.barriers[key][3] += int(value)
                waits.complete(key, 1, 0) if expects or get is None else waits.complete(
                    key, int(value), 0
                )
            elif how == "expect_tx":
                waits.barriers[key][3] += int(value)
            else:
                assert how == "inval", i.line
                del waits.barriers[key]

    return change


def _try_wait(machine: Machine, i: Instruction) -> Step:
    result, memory, parity = i.operands[:3]
    address, get, write = machine.address(memory), machine.getter(parity, 4), machine.setter(result)

    def wait(lanes: Lanes) -> Any:
        waits = machine.waits
        which, at = machine.indices(lanes), address(lanes)
        parities = np.broadcast_to(get(lanes), which.shape)
        waiting = np.zeros(len(which), bool)
        blocks = machine.block[which]
        each = np.stack([at.astype(np.int64), blocks, parities.astype(np.int64)], -1)
        for a, block, p in np.unique(each, axis=0).tolist():
            key = block, a & _ONES
            if waits.barriers[key][0] == p & 1:  # still this phase
                mine = (at == a) & (blocks == block) & (parities == p)
                waiting |= mine
                waits.sleepers.setdefault(key, []).append(which[mine])
        if not waiting.any():
            write(lanes, np.ones(len(which), bool))
            return None
        machine.blocked[which[waiting]] = True
        machine.pc[which[waiting]] = machine.here
        through = which[~waiting]
        if through.size:
            write(through, np.ones(len(through), bool))
        machine.pc[through] = machine.here + 1
        return True

    return wait


# ------------------------------------------------------------------------------------ TMA


def pack_map(
    address: int, rows: int, row_bytes: int, stride: int, box_rows: int, box_bytes: int
) -> bytes:
    """In place of the driver's tensor map: what `_tensor` reads."""
    numbers = address, rows, row_bytes, stride, box_rows, box_bytes
    return struct.pack("=6q", *numbers) + bytes(80)


def _bulk(machine: Machine, i: Instruction) -> Step:
    if "tensor" in i.modifiers:
        return _tensor(machine, i)
    into, source, size, barrier = i.operands
    to, of, done = machine.address(into), machine.address(source), machine.address(barrier)
    get = machine.getter(size, 4)

    def ask(lanes: Lanes) -> None:
        which = machine.indices(lanes)
        sizes = np.broadcast_to(get(lanes), which.shape)
        for thread, t, a, n, b in zip(which, to(lanes), of(lanes), sizes, done(lanes), strict=True):
            block, place = _of_cluster(machine, int(t), int(thread))
            key = _of_cluster(machine, int(b), int(thread))
            assert n % 16 == place % 16 == int(a) % 16 == 0, i.line

            def arrive(a: Any = a, n: int = int(n), at: int = block * machine.row + place,
                       key: Any = key) -> None:  # fmt: skip
                words = a + np.arange(0, n, 16, dtype=np.uint64)
                for half in (0, 8):
                    data = machine.memory.load(words + np.uint64(half), 8, i.line)
                    target = machine.shared.view(np.uint64)
                    target[(at + np.arange(0, n, 16) + half) // 8] = data
                machine.waits.complete(key, 0, n)

            machine.waits.bulk.append(arrive)

    return ask


def _tensor(machine: Machine, i: Instruction) -> Step:
    into, source, barrier, *mask = i.operands
    to, of, done = machine.address(into), machine.address(source), machine.address(barrier)
    column, row = (machine.getter(o, 4) for o in source.items[1].items)
    many = machine.getter(mask[0], 2) if mask else None

    def ask(lanes: Lanes) -> None:
        which = machine.indices(lanes)
        columns, rows = (np.broadcast_to(get(lanes), which.shape) for get in (column, row))
        masks = np.broadcast_to(0 if many is None else many(lanes), which.shape)
        for thread, t, m, x, y, b, blocks in zip(
            which, to(lanes), of(lanes), columns, rows, done(lanes), masks, strict=True
        ):
            first = int(m) - PARAMETERS
            numbers = struct.unpack("=6q", machine.parameters[first : first + 48].tobytes())
            box = _box(machine, numbers, int(np.int32(x)), int(np.int32(y)), i.line)
            own, place = _of_cluster(machine, int(t), int(thread))
            base = own // machine.cluster * machine.cluster
            targets = [own]
            if many is not None:
                targets = [base + r for r in range(machine.cluster) if int(blocks) >> r & 1]
            at = _swizzled(place, numbers[4], numbers[5])
            for block in targets:
                key = block, int(b) & _ONES
                if many is None:
                    key = _of_cluster(machine, int(b), int(thread))

                def arrive(block: int = block, key: Any = key, box: Values = box,
                           at: Values = at) -> None:  # fmt: skip
                    machine.shared[block * machine.row + at] = box
                    machine.waits.complete(key, 0, box.size)

                machine.waits.bulk.append(arrive)

    return ask


def _box(machine: Machine, numbers: tuple[int, ...], x: int, y: int, line: str) -> Values:
    """uint8 [box_rows, box_bytes], zero outside of the matrix."""
    address, rows, row_bytes, stride, box_rows, box_bytes = numbers
    row, byte = np.arange(y, y + box_rows)[:, None], np.arange(x, x + box_bytes)[None, :]
    inside = (row >= 0) & (row < rows) & (byte >= 0) & (byte < row_bytes)
    box = np.zeros(inside.shape, np.uint8)
    if inside.any():
        at = (address + row * stride + byte)[inside].astype(np.uint64)
        box[inside] = machine.memory.load(at, 1, line)
    return box


def _swizzled(place: int, rows: int, row_bytes: int) -> Values:
    assert place % {32: 256, 64: 512, 128: 1024, 256: 128}[row_bytes] == 0 or row_bytes == 256
    at = place + np.arange(rows)[:, None] * row_bytes + np.arange(row_bytes)[None, :]
    if row_bytes == 256:
        return at
    return at ^ ((at >> 7 & (row_bytes // 16 - 1)) << 4)


def store_async(machine: Machine, i: Instruction) -> Step:
    into, source, barrier = i.operands
    size = BYTES[i.types[-1]]
    sources = source.items or (source,)
    to, done = machine.address(into), machine.address(barrier)
    getters = [machine.getter(o, size) for o in sources]

    def ask(lanes: Lanes) -> None:
        which = machine.indices(lanes)
        values = [np.broadcast_to(get(lanes), which.shape).copy() for get in getters]
        at, keys = to(lanes), done(lanes)

        def arrive() -> None:
            for k, value in enumerate(values):
                place = machine.shared_places(at + np.uint64(k * size), which, size, i.line)
                machine.shared.view(STORED[size])[place] = value
            for thread, b in zip(which, keys, strict=True):
                key = _of_cluster(machine, int(b), int(thread))
                machine.waits.complete(key, 0, size * len(values))

        machine.waits.bulk.append(arrive)

    return ask


def cluster_barrier(machine: Machine, i: Instruction) -> Step:
    arrives = i.modifiers[1] == "arrive"
    members = machine.cluster * machine.threads

    def step(lanes: Lanes) -> Any:
        waits, which = machine.waits, machine.indices(lanes)
        clusters = machine.block[which] // machine.cluster
        if arrives:
            np.add.at(waits.arrived, clusters, 1)
            for cluster in np.unique(clusters):
                if waits.arrived[cluster] % members == 0:
                    for some in waits.of_cluster.pop(int(cluster), []):
                        machine.blocked[some] = False
            return None
        machine.pc[which] = machine.here + 1
        for cluster in np.unique(clusters):
            if waits.arrived[cluster] % members:
                mine = which[clusters == cluster]
                machine.blocked[mine] = True
                waits.of_cluster.setdefault(int(cluster), []).append(mine)
        return True

    return step
