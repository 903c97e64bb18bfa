"""What the threads of a block or a warp do together: barriers, votes, shuffles, reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic, copies
from .text import Instruction

if TYPE_CHECKING:
    from .machine import Lanes, Machine, Step, Values

WARP = 32


def step(machine: Machine, i: Instruction) -> Step | None:
    of_name = {
        "bar": _barrier, "barrier": _barrier, "shfl": _shuffle, "vote": _vote, "redux": _reduce,
    }.get(i.name)  # fmt: skip
    return None if of_name is None else of_name(machine, i)


def _barrier(machine: Machine, i: Instruction) -> Step:
    if i.modifiers[0] == "warp":
        return lambda lanes: None
    if i.modifiers[0] == "cluster":
        return copies.cluster_barrier(machine, i)
    if i.modifiers[0] == "red":
        return _barrier_vote(machine, i)
    number = machine.getter(i.operands[0], 4)
    wanted = machine.getter(i.operands[1], 4) if len(i.operands) > 1 else None
    waits = i.modifiers[0] == "sync"

    def step(lanes: Lanes) -> bool:
        which = machine.indices(lanes)
        machine.pc[which] = machine.here + 1
        numbers = np.broadcast_to(number(lanes), which.shape)
        counts = None if wanted is None else np.broadcast_to(wanted(lanes), which.shape)
        for block in np.unique(machine.block[which]):
            for name in np.unique(numbers[machine.block[which] == block]):
                mine = (machine.block[which] == block) & (numbers == name)
                _arrive(
                    machine,
                    (int(block), int(name)),
                    which[mine],
                    None if counts is None else int(counts[mine][0]),
                    waits,
                )
        return True

    return step


def _arrive(
    machine: Machine, key: tuple[int, int], which: Values, count: int | None, waits: bool
) -> None:
    state = machine.barriers.setdefault(key, [0, []])
    state[0] += len(which)
    if waits:
        machine.blocked[which] = True
        state[1].append(which)
    if count is None:
        of_block = slice(key[0] * machine.threads, (key[0] + 1) * machine.threads)
        count = int((~machine.done[of_block]).sum())
    assert state[0] <= count, f"{state[0]} threads at a barrier of {count}"
    if state[0] == count:
        for some in state[1]:
            machine.blocked[some] = False
        del machine.barriers[key]


def _barrier_vote(machine: Machine, i: Instruction) -> Step:
    """Of all threads of a block."""
    result, number, predicate = i.operands
    get, write = machine.getter(predicate, 1), machine.setter(result)
    name, every = int(number.text), "and" in i.modifiers
    votes: dict[int, list[Any]] = {}

    def step(lanes: Lanes) -> bool:
        which, values = machine.indices(lanes), get(lanes)
        machine.pc[which] = machine.here + 1
        for block in np.unique(machine.block[which]):
            mine = machine.block[which] == block
            votes.setdefault(int(block), []).append((which[mine], values[mine]))
            _arrive(machine, (int(block), name), which[mine], None, True)
            if (int(block), name) not in machine.barriers:
                cast = votes.pop(int(block))
                said = np.concatenate([v for _, v in cast])
                for some, _ in cast:
                    write(some, said.all() if every else said.any())
        return True

    return step


def _shuffle(machine: Machine, i: Instruction) -> Step:
    *outs, value, by, limits, _ = i.operands
    get, by_of, limits_of = (machine.getter(o, 4) for o in (value, by, limits))
    writes = [machine.setter(o) for o in outs]
    how = i.modifiers[1]

    def step(lanes: Lanes) -> None:
        which = machine.indices(lanes)
        lane = machine.lane[which].astype(np.int64)
        b = np.broadcast_to(by_of(lanes), which.shape).astype(np.int64) & 31
        c = np.broadcast_to(limits_of(lanes), which.shape).astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        most = lane & segment | clamp & ~segment
        source = {
            "bfly": lane ^ b, "down": lane + b, "up": lane - b,
            "idx": lane & segment | b & ~segment & 31,
        }[how]  # fmt: skip
        inside = source >= most if how == "up" else source <= most
        source = np.where(inside, source, lane)
        everyone = np.zeros(machine.count, np.uint32)
        everyone[which] = get(lanes)
        results = everyone[machine.warp[which] * WARP + source], inside
        for write, result in zip(writes, results, strict=False):
            write(lanes, result)

    return step


def _of_each_warp(machine: Machine, lanes: Lanes, values: Values, combine: Any) -> Values:
    which = machine.indices(lanes)
    rows = np.broadcast_to(values, which.shape).reshape(-1, WARP)
    return np.repeat(combine(rows), WARP)


def _vote(machine: Machine, i: Instruction) -> Step:
    get, write = machine.getter(i.operands[1], 1), machine.setter(i.operands[0])
    negated = False
    weights = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
    combine: Any = {
        "any": lambda rows: rows.any(1), "all": lambda rows: rows.all(1),
        "ballot": lambda rows: (rows * weights).sum(1).astype(np.uint32),
    }[i.modifiers[1]]  # fmt: skip
    return lambda lanes: write(lanes, _of_each_warp(machine, lanes, get(lanes) ^ negated, combine))


def _reduce(machine: Machine, i: Instruction) -> Step:
    kind = i.types[-1]
    get, write = machine.getter(i.operands[1], 4), machine.setter(i.operands[0])
    reduce: Any = {
        "max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce,
        "and": np.bitwise_and.reduce,
    }[i.modifiers[1]]  # fmt: skip

    def combine(rows: Values) -> Values:
        typed = np.ascontiguousarray(rows).view(arithmetic.NUMPY[kind])
        return reduce(typed, axis=1).astype(typed.dtype).view(np.uint32)

    return lambda lanes: write(lanes, _of_each_warp(machine, lanes, get(lanes), combine))
