"""What a kernel executes, by unit of an SM: its main loop disassembled and counted.

For paper_model.py. The disassembler is the one of the tests (tests/sass.py), from Triton's wheel.
"""

from __future__ import annotations

import collections
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import sass

from intlass_ops import config
from intlass_ops.cuda import compiler, source

# Which unit executes an instruction, by the beginning of its name; the rest only takes a slot of
# the scheduler.
_UNITS = (
    (r"[HI]MMA", "mma"),
    (r"HFMA2|HADD2|HMUL2", "half2"),
    (r"FFMA|FADD|FMUL", "fp32"),
    (r"IMAD|IDP", "imad"),
    (r"I2F|F2I|F2F|MUFU|I2I", "convert"),
    (r"LDSM|LDS|STS|LDGSTS|LDG|STG|ATOM|LDC", "memory"),
    (
        r"LOP3|SHF|PRMT|IADD3|LEA|ISETP|FSETP|SEL|IMNMX|FMNMX|MOV|VABSDIFF|IABS|PLOP3|SGXT|BMSK",
        "alu",
    ),
)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", re.M)
_MMA_K = {"HMMA.16816": 16, "IMMA.16832": 32, "IMMA.16864": 64}


@dataclass(frozen=True)
class Kernel:
    """What one compiled configuration executes in its main loop for each MMA, and occupies."""

    mma_k: int
    counts: dict[str, float]  # by unit; "issue": all, "bytes": of shared memory
    registers: int


def count(c: config.Matmul, arch: str) -> Kernel:
    image = compiler.compile_cubin(c, arch)
    loop = main_loop(sass.disassemble(image))
    names = [name for name, _ in loop]
    mmas = [name for name in names if re.match("[HI]MMA", name)]
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        counts["issue"] += 1
        unit = next((unit for pattern, unit in _UNITS if re.match(pattern, name)), None)
        if unit == "memory":
            counts["bytes"] += _bytes(name)
        elif unit is not None:
            counts[unit] += 1
    each = {unit: number / len(mmas) for unit, number in sorted(counts.items())}
    mma_k = next(k for name, k in _MMA_K.items() if mmas[0].startswith(name))
    return Kernel(mma_k, each, sass.usage(image, c.entry, arch).registers)


def main_loop(code: str) -> list[tuple[str, str]]:
    """The instructions between a label and a branch back to it: the least with most of the MMAs."""
    at: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    loops: list[list[tuple[str, str]]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            at[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in at:
                loops.append(instructions[at[target[1]] :])
    if not loops:
        return instructions

    def mmas(loop: list[tuple[str, str]]) -> int:
        return sum(bool(re.match("[HI]MMA", name)) for name, _ in loop)

    most = max(map(mmas, loops))
    return min((loop for loop in loops if mmas(loop) >= 0.9 * most), key=len)


def _bytes(name: str) -> int:
    """A warp's, through the path of shared memory and L1."""
    if name.startswith("LDSM"):
        return 128 * int(name[-1]) if name[-1] in "24" else 128
    if name.startswith("LDC"):
        return 0
    return 512 if ".128" in name else 256 if ".64" in name else 128


class Kernels:
    """Counts by configuration and architecture, kept in the results: disassembling takes long."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept, self.used = kept, dict[str, Any]()

    def __call__(self, arch: str, c: config.Matmul) -> Kernel:
        if isinstance(c, config.Gemm):
            c = replace(c, split_k=1)  # the main loop is the same
        key = f"{arch} {source.digest(c.source)} {c!r}"
        if key not in self.used:
            self.used[key] = self.kept.get(key) or vars(count(c, arch))
        return Kernel(**self.used[key])
