"""The text of one PTX kernel, read into a Program."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)((?:\[\d*\])?)", re.M)
_CLUSTER = re.compile(r"\.reqnctapercluster\s+(\d+)")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)

BYTES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4,
    "u32": 4, "u16x2": 4, "s16x2": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8,
    "u64": 8, "s64": 8, "f64": 8, "bf16": 2,
}  # fmt: skip
STORED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
STORED[8] = np.dtype(np.uint64)


@dataclass(frozen=True)
class Operand:
    """kind: "register", "number" (text), "vector" (items), "memory" (items: base, coordinates),
    "not" (a predicate's opposite)."""

    kind: str
    text: str = ""
    items: tuple[Operand, ...] = ()
    offset: int = 0


@dataclass
class Instruction:
    name: str  # the opcode
    modifiers: tuple[str, ...]  # what follows it, dot by dot
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    line: str

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(m for m in self.modifiers if m in BYTES)


@dataclass
class Program:
    entry: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, np.dtype] = field(default_factory=dict)  # of registers
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # place, bytes
    shared: dict[str, int] = field(default_factory=dict)  # where variables lie
    static_bytes: int = 0
    cluster: int = 1  # blocks


def parse(text: str) -> Program:
    text = _COMMENT.sub("", text)
    match = _ENTRY.search(text)
    assert match is not None, "no kernel"
    program = Program(match[1])
    end = text.index(")", match.end())
    place = 0
    for kind, name, count in _PARAM.findall(text[match.end() : end]):
        size = BYTES[kind] * int(count or 1)
        program.parameters[name] = place, size
        place += (size + 7) // 8 * 8  # as kernel.py lays them out
    start = text.index("{", end)
    if cluster := _CLUSTER.search(text, end):
        program.cluster = int(cluster[1])
    _shared(program, text[: match.start()] + text[start:])
    _Reader(program, text, start + 1).read()
    return program


def _shared(program: Program, text: str) -> None:
    dynamic = []
    for align, kind, name, count in _SHARED.findall(text):
        if count == "[]":
            dynamic.append((name, int(align)))
            continue
        at = -(-program.static_bytes // int(align)) * int(align)
        program.shared[name] = at
        program.static_bytes = at + BYTES[kind] * int(count[1:-1] or 1 if count else 1)
    for name, align in dynamic:
        program.static_bytes = -(-program.static_bytes // align) * align
        program.shared[name] = program.static_bytes


class _Reader:
    """Statement by statement; names of registers and labels belong to the braces they are in."""

    def __init__(self, program: Program, text: str, at: int) -> None:
        self.program, self.text, self.at = program, text, at
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        self.count = 0
        self.jumps: list[tuple[Instruction, list[int]]] = []

    def read(self) -> None:
        text = self.text
        while self.scopes:
            while text[self.at].isspace() or text[self.at] == ";":
                self.at += 1
            if text[self.at] == "{":
                self.count += 1
                self.scopes.append((self.count, {}))
                self.at += 1
            elif text[self.at] == "}":
                self.scopes.pop()
                self.at += 1
            elif label := _LABEL.match(text, self.at):
                self.program.labels[self._label(label[1])] = len(self.program.code)
                self.at = label.end()
            else:
                end = text.index(";", self.at)
                self._statement(" ".join(text[self.at : end].split()))
                self.at = end + 1
        for instruction, scopes in self.jumps:
            name = instruction.operands[0].text
            known = (f"{name}@{scope}" for scope in reversed(scopes))
            target = next(label for label in known if label in self.program.labels)
            instruction.operands = (Operand("label", target),)

    def _label(self, name: str) -> str:
        return f"{name}@{self.scopes[-1][0]}"

    def _statement(self, line: str) -> None:
        if reg := _REG.match(line):
            kind, names = reg.groups()
            for name in names.split(","):
                self._declare(kind, name.strip())
            return
        if line.startswith("."):
            return  # .pragma, .shared, .loc
        match = _INSTRUCTION.fullmatch(line)
        assert match is not None, line
        negated, predicate, opcode, rest = match.groups()
        name, *modifiers = re.split(r"\.", opcode)
        operands = tuple(self._operand(part) for part in _split(rest))
        instruction = Instruction(
            name,
            tuple(modifiers),
            operands,
            None if predicate is None else self._known(predicate),
            bool(negated),
            line,
        )
        if name == "bra":
            self.jumps.append((instruction, [number for number, _ in self.scopes]))
        self.program.code.append(instruction)

    def _declare(self, kind: str, name: str) -> None:
        dtype = np.dtype(bool) if kind == "pred" else STORED[BYTES[kind]]
        ranged = re.fullmatch(r"(.*)<(\d+)>", name)
        number, known = self.scopes[-1]
        for one in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
            known[one] = one if number <= 0 else f"{one}@{number}"
            self.program.dtypes[known[one]] = dtype

    def _known(self, name: str) -> str:
        for _, known in reversed(self.scopes):
            if name in known:
                return known[name]
        return name  # a special register, or a symbol

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Operand("vector", items=tuple(map(self._operand, _split(text[1:-1]))))
        if text.startswith("["):
            base, *more = _split(text[1:-1])
            match = re.fullmatch(r"([%\w$]+)\s*(?:([+-])\s*(-?\d+))?", base)
            assert match is not None, text
            offset = int(match[3] or 0) * (-1 if match[2] == "-" else 1)
            items = (self._operand(match[1]), *map(self._operand, more))
            return Operand("memory", text, items, offset)
        if text.startswith("!"):
            return Operand("not", items=(self._operand(text[1:]),))
        if re.match(r"-?\d", text):
            return Operand("number", text.rstrip("U"))
        known = self._known(text)
        return Operand("register" if known in self.program.dtypes or text[0] == "%" else "symbol",
                       known)  # fmt: skip


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    # the two results of shfl and setp: d|p
    return [each for part in parts if part for each in part.split("|")]
