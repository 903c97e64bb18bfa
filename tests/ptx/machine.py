"""All threads of a grid, in step as far as they go the same way.

The threads furthest behind go first, together with all that are at the same instruction, until they
meet others, branch or have to wait. A value of a register is an array with an element a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import arithmetic, copies, matrices, memory, threads
from .memory import Memory, OutOfBounds
from .text import BYTES, STORED, Instruction, Operand, Program
from .threads import WARP

Lanes = Any  # indices of threads, or None for all of them
Values = Any
Step = Callable[[Lanes], Any]  # True: it has set the program counters itself

_NOTHING = (
    "membar", "fence", "prefetch", "griddepcontrol", "setmaxnreg", "nanosleep", "applypriority",
)  # fmt: skip
# Wants all threads of a warp at once
_OF_WARPS = ("mma", "ldmatrix", "stmatrix", "shfl", "vote", "redux", "wgmma", "movmatrix")


class Machine:
    """One launch."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        threads: int,
        smem_bytes: int,
        parameters: bytes,
        memory: Memory,
    ) -> None:
        self.program, self.memory, self.cluster = program, memory, program.cluster
        self.threads, self.blocks = threads, int(np.prod(grid))
        self.count = count = self.blocks * threads
        assert threads % WARP == 0
        self.block = np.arange(count) // threads
        self.lane = (np.arange(count) % WARP).astype(np.uint32)
        self.warp = np.arange(count) // WARP
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.shared_bytes = program.static_bytes + smem_bytes
        self.row = -(-max(self.shared_bytes, 16) // 1024) * 1024
        self.shared = np.zeros(self.blocks * self.row, np.uint8)
        self.registers: dict[str, Values] = self._special(grid)
        self.pc = np.zeros(count, np.int64)
        self.done = np.zeros(count, bool)
        self.blocked = np.zeros(count, bool)
        self.yielded = np.zeros(count, bool)
        self.barriers: dict[tuple[int, int], list[Any]] = {}
        self.waits = copies.Waits(self)
        self.here = 0  # the instruction that runs
        self.code = [self._compiled(i) for i in program.code]
        self.of_warps = [
            i.name in _OF_WARPS or (i.name == "bar" and "warp" in i.modifiers) for i in program.code
        ]

    def _special(self, grid: Sequence[int]) -> dict[str, Values]:
        x, y = grid[0], grid[1]
        block = self.block
        dims = {"x": block % x, "y": block // x % y, "z": block // (x * y)}
        found: dict[str, Any] = {}
        for axis, size in zip("xyz", grid, strict=True):
            found[f"%ctaid.{axis}"], found[f"%nctaid.{axis}"] = dims[axis], size
            found[f"%tid.{axis}"] = np.arange(self.count) % self.threads if axis == "x" else 0
            found[f"%ntid.{axis}"] = self.threads if axis == "x" else 1
        found["%laneid"], found["%warpid"] = self.lane, self.warp % (self.threads // WARP)
        found["%cluster_ctarank"] = found["%cluster_ctaid.x"] = block % self.cluster
        found["%cluster_nctarank"] = found["%cluster_nctaid.x"] = self.cluster
        found["%clusterid.x"], found["%nclusterid.x"] = (
            block // self.cluster, self.blocks // self.cluster,
        )  # fmt: skip
        found["%smid"] = block
        return {
            name: np.broadcast_to(value, self.count).astype(np.uint32)
            for name, value in found.items()
        }

    # -------------------------------------------------------------------------------- running

    def run(self) -> None:
        end = len(self.code)
        with np.errstate(all="ignore"):
            while True:
                ready = ~(self.done | self.blocked | self.yielded)
                lanes, first = self._next(ready)
                if first < 0:
                    if self.yielded.any():
                        self.yielded[:] = False
                        continue
                    if self.waits.deliver():
                        continue
                    if self.done.all():
                        return
                    lines = [self._waiting_at(int(p)) for p in np.unique(self.pc[~self.done])]
                    raise RuntimeError(f"{self.program.entry}: all threads wait, at {lines}")
                later = self.pc[ready & (self.pc > first)]
                self._straight(lanes, first, int(later.min()) if later.size else end)

    def _waiting_at(self, pc: int) -> str:
        """Those at a barrier go on behind it, those at an mbarrier ask again."""
        before = self.program.code[pc - 1]
        return (before if before.name in ("bar", "barrier") else self.program.code[pc]).line

    def _next(self, ready: Values) -> tuple[Lanes, int]:
        """Threads that can go on together, and where they are; -1 if there are none."""
        where = self.pc[ready]
        if not where.size:
            return None, -1
        for first in np.unique(where):
            chosen = ready & (self.pc == first)
            if self.of_warps[first]:
                chosen &= self._whole(chosen)
            if chosen.any():
                return (None if chosen.all() else np.flatnonzero(chosen)), int(first)
        return None, -1

    def _whole(self, chosen: Values) -> Values:
        """Of those, the ones whose warp is complete, but for threads that have ended."""
        of_warps = (chosen | self.done).reshape(-1, WARP).all(1)
        return np.repeat(of_warps, WARP)

    def _straight(self, lanes: Lanes, at: int, stop: int) -> None:
        code, of_warps = self.code, self.of_warps
        checked = lanes is None or bool(self._is_whole(lanes))
        while True:
            self.here = at
            if code[at](lanes):
                return
            at += 1
            if at == stop or (not checked and of_warps[at]):
                break
        if lanes is None:
            self.pc[:] = at
        else:
            self.pc[lanes] = at

    def _is_whole(self, lanes: Values) -> bool:
        chosen = np.zeros(self.count, bool)
        chosen[lanes] = True
        return bool(self._whole(chosen)[lanes].all())

    def indices(self, lanes: Lanes) -> Values:
        return np.arange(self.count) if lanes is None else lanes

    # -------------------------------------------------------------------------------- operands

    def number(self, text: str, size: int) -> Values:
        dtype = STORED[size]
        if text[:2] in ("0f", "0d"):
            bits = int(text[2:], 16)
        elif text[:2] == "0x":
            bits = int(text, 16)
        else:
            bits = int(text)
        return dtype.type(bits & (1 << 8 * size) - 1)

    def getter(self, operand: Operand, size: int) -> Callable[[Lanes], Values]:
        """What reads a value, a constant's of ``size`` bytes."""
        if operand.kind == "number":
            constant = self.number(operand.text, size)
            return lambda lanes: constant
        if operand.kind == "not":
            opposite = self.getter(operand.items[0], size)
            return lambda lanes: ~opposite(lanes)
        if operand.kind == "symbol":
            place = self._symbol(operand.text, size)
            return lambda lanes: place
        assert operand.kind == "register", operand
        name, registers = operand.text, self.registers
        if name not in registers:
            registers[name] = np.zeros(self.count, self.program.dtypes[name])
        return lambda lanes: registers[name] if lanes is None else registers[name][lanes]

    def _symbol(self, name: str, size: int) -> Values:
        if name in self.program.shared:
            return STORED[size].type(self.program.shared[name])
        if name in self.program.parameters:
            return STORED[size].type(copies.PARAMETERS + self.program.parameters[name][0])
        return STORED[size].type(0)  # a constant's name, of which only the value is used

    def setter(self, operand: Operand) -> Callable[[Lanes, Values], None]:
        name, registers = operand.text, self.registers
        if name == "_":
            return lambda lanes, value: None
        dtype, count = self.program.dtypes[name], self.count
        if name not in registers:
            registers[name] = np.zeros(count, dtype)

        def write(lanes: Lanes, value: Values) -> None:
            if lanes is not None:
                registers[name][lanes] = value
                return
            value = np.asarray(value)
            if value.shape != (count,):
                value = np.full(count, value, dtype)
            elif value.dtype != dtype or value.base is not None:
                value = value.astype(dtype)
            registers[name] = value

        return write

    def address(self, operand: Operand) -> Callable[[Lanes], Values]:
        """uint64 [threads]"""
        base, offset = self.getter(operand.items[0], 8), np.int64(operand.offset)

        def read(lanes: Lanes) -> Values:
            value = np.asarray(base(lanes)).astype(np.int64) + offset
            many = self.count if lanes is None else len(lanes)
            return np.broadcast_to(value, many).astype(np.uint64)

        return read

    def shared_places(self, addresses: Values, lanes: Lanes, size: int, line: str) -> Values:
        """Where in `shared`, in elements, an address of shared memory lies: of the thread's own
        block, or of one of its cluster (`copies.RANK`)."""
        a = addresses.astype(np.int64)
        block = self.block if lanes is None else self.block[lanes]
        rank = a >> copies.RANK
        if rank.any():
            block = np.where(rank > 0, block // self.cluster * self.cluster + rank - 1, block)
            a = a & ((1 << copies.RANK) - 1)
        if np.any(a + size > self.shared_bytes):
            raise OutOfBounds(f"{int(a.max())} of {self.shared_bytes} shared bytes: {line}")
        if np.any(a % size):
            raise OutOfBounds(f"not aligned to {size} bytes: {line}")
        return (block * self.row + a) // size

    def shared_as(self, size: int) -> Any:
        return self.shared.view(STORED[size])

    # ---------------------------------------------------------------------------- instructions

    def _compiled(self, i: Instruction) -> Step:
        if i.name == "bra":
            return self._branch(i)
        step = self._step(i)
        if i.predicate is None:
            return step
        predicate = self.getter(Operand("register", i.predicate), 1)

        def guarded(lanes: Lanes) -> Any:
            taken = predicate(lanes) ^ i.negated
            if taken.all():
                return step(lanes)
            some = np.flatnonzero(taken) if lanes is None else lanes[taken]
            if not some.size:
                return None
            moved = step(some)
            if moved:  # the others go on
                rest = self.indices(lanes)[~taken]
                self.pc[rest] = self.here + 1
            return moved

        return guarded

    def _branch(self, i: Instruction) -> Step:
        target = self.program.labels[i.operands[0].text]
        if i.predicate is None:

            def jump(lanes: Lanes) -> bool:
                self.pc[self.indices(lanes)] = target
                return True

            return jump
        predicate = self.getter(Operand("register", i.predicate), 1)

        def branch(lanes: Lanes) -> bool:
            taken = predicate(lanes) ^ i.negated
            self.pc[self.indices(lanes)] = np.where(taken, target, self.here + 1)
            return True

        return branch

    def _step(self, i: Instruction) -> Step:
        if i.name in _NOTHING:
            return lambda lanes: None
        if i.name == "cp" and i.modifiers[-1] == "commit_group":
            return copies.commit(self)
        special = {
            "mov": self._mov, "selp": self._selp,
            "ret": self._return, "exit": self._return, "cvta": self._mov, "setp": self._setp,
            "trap": self._trap,
        }.get(i.name)  # fmt: skip
        if special is not None:
            return special(i)
        for of_kind in (memory.step, threads.step, matrices.step, copies.step):
            found = of_kind(self, i)
            if found is not None:
                return found
        operation = arithmetic.operation_of(i)
        if operation is None:
            raise NotImplementedError(i.line)
        return self._arithmetic(i, operation)

    def _arithmetic(self, i: Instruction, operation: Callable[..., Values]) -> Step:
        into, *rest = i.operands
        size = BYTES[i.types[-1]] if i.types else 4
        sizes = [size] * len(rest)
        if i.name in ("shl", "shr"):
            sizes[1] = 4
        elif i.name in ("bfi", "bfe"):
            sizes[-2:] = [4, 4]
        elif i.name == "mad" and "wide" in i.modifiers:
            sizes[2] = 2 * size
        getters = [self.getter(o, s) for o, s in zip(rest, sizes, strict=True)]
        write = self.setter(into)

        def step(lanes: Lanes) -> None:
            write(lanes, operation(i, *(get(lanes) for get in getters)))

        return step

    def _setp(self, i: Instruction) -> Step:
        joint = next((m for m in i.modifiers[1:] if m in ("and", "or", "xor")), None)
        given = len(i.operands) - (2 if joint is None else 3)
        size = BYTES[i.types[-1]]
        a, b = (self.getter(o, size) for o in i.operands[given : given + 2])
        also = self.getter(i.operands[-1], 1) if joint else None
        writes = [self.setter(o) for o in i.operands[:given]]

        def step(lanes: Lanes) -> None:
            result = arithmetic.compare(i, a(lanes), b(lanes))
            for write, value in zip(writes, (result, ~result), strict=False):
                if also is not None:
                    other = also(lanes)
                    value = {"and": value & other, "or": value | other, "xor": value ^ other}[joint]
                write(lanes, value)

        return step

    def _mov(self, i: Instruction) -> Step:
        into, source = i.operands
        size = BYTES[i.types[-1]]
        if into.kind == "vector" or source.kind == "vector":
            return self._pack(i)
        get, write = self.getter(source, size), self.setter(into)

        def step(lanes: Lanes) -> None:
            value = get(lanes)
            write(lanes, value.copy() if lanes is None else value)

        return step

    def _pack(self, i: Instruction) -> Step:
        into, source = i.operands
        whole = BYTES[i.types[-1]]
        if into.kind == "vector":
            size = whole // len(into.items)
            get, writes = self.getter(source, whole), [self.setter(o) for o in into.items]

            def unpack(lanes: Lanes) -> None:
                value = get(lanes)
                for k, write in enumerate(writes):
                    shift = value.dtype.type(8 * size * k)
                    write(lanes, (value >> shift).astype(STORED[size]))

            return unpack
        size = whole // len(source.items)
        getters, write = [self.getter(o, size) for o in source.items], self.setter(into)

        def pack(lanes: Lanes) -> None:
            dtype = STORED[whole]
            value = dtype.type(0)
            for k, get in enumerate(getters):
                value = value | get(lanes).astype(dtype) << dtype.type(8 * size * k)
            write(lanes, value)

        return pack

    def _selp(self, i: Instruction) -> Step:
        size = BYTES[i.types[-1]]
        a, b = (self.getter(o, size) for o in i.operands[1:3])
        predicate, write = self.getter(i.operands[3], 1), self.setter(i.operands[0])
        return lambda lanes: write(lanes, np.where(predicate(lanes), a(lanes), b(lanes)))

    def _return(self, i: Instruction) -> Step:
        def step(lanes: Lanes) -> bool:
            self.done[self.indices(lanes)] = True
            return True

        return step

    def _trap(self, i: Instruction) -> Step:
        def step(lanes: Lanes) -> None:
            raise RuntimeError(f"{self.program.entry}: trap")

        return step
