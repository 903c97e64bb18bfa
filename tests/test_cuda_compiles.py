"""Every shipped kernel config, without a GPU, for each architecture it is shipped for.

It compiles, keeps everything in registers, fits the shared memory, and uses the tensor-core
instructions it was written for. The cubins go through the kernel cache, so that a second run, and
the second test of an architecture, only read them.

Tile sizes do not decide which instruction multiplies: of the configs with the same operand kinds
and instructions, one is disassembled for each architecture. Everything is compiled under --thorough
alone (11 minutes on two cores), else enough to meet each pair of operands on each architecture.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sass

from intlass_ops import config
from intlass_ops.cuda import cubin, jit, source
from intlass_ops.cuda.source import KernelConfig

REGISTERS_OF_A_BLOCK = 65536

Chosen = dict[tuple[str, str], list[Any]]  # the configs of each (kernel source, architecture)


# NVRTC makes the same code for both.
TWIN = {"sm_89": "sm_86"}


def by_kernel_and_arch(thorough: bool = False) -> Chosen:
    """What is shipped, without repetition; without ``thorough`` the first of each operand kinds and
    a quarter of the others, which quarter depends on the architecture."""
    found: dict[tuple[str, str], dict[Any, None]] = defaultdict(dict)
    for c, archs in config.shipped_configs():
        for arch in archs:
            found[c.source, arch][c] = None
    if thorough:
        return {key: list(configs) for key, configs in found.items()}
    chosen: Chosen = {}
    for (name, arch), configs in found.items():
        of_kinds: dict[Any, list[Any]] = defaultdict(list)
        for c in configs:
            of_kinds[_kinds(c)].append(c)
        turn = config.ARCHS.index(arch) % 4
        chosen[name, arch] = [c for cs in of_kinds.values() for c in (cs[0], *cs[1 + turn :: 4])]
    return chosen


def _kinds(c: Any) -> tuple[Any, ...]:
    fields = dataclasses.fields(c)
    return tuple(getattr(c, field.name) for field in fields if field.name.endswith("_kind"))


def to_disassemble(compiled: Chosen) -> Chosen:
    """One config of each code path that names instructions."""
    found: Chosen = {}
    for (name, arch), configs in compiled.items():
        paths: dict[Any, Any] = {}
        for c in configs:
            expected = c.expected_sass(arch)
            if expected:
                paths.setdefault((*_kinds(c), expected), c)
        if paths:
            found[name, arch] = list(paths.values())
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" not in metafunc.fixturenames:
        return
    compiled = by_kernel_and_arch(metafunc.config.getoption("--thorough"))
    for names, chosen in (
        (("arch", "configs"), compiled),
        (("arch", "disassembled"), to_disassemble(compiled)),
    ):
        if set(names) <= set(metafunc.fixturenames):
            cases = [pytest.param(a, cs, id=f"{name}-{a}") for (name, a), cs in chosen.items()]
            metafunc.parametrize(names, cases)


def test_no_instruction_is_left_out() -> None:
    compiled = by_kernel_and_arch()
    chosen = to_disassemble(compiled)
    for (name, arch), configs in compiled.items():
        expected = {c.expected_sass(arch) for c in configs} - {()}
        assert {c.expected_sass(arch) for c in chosen.get((name, arch), [])} == expected
    assert {arch for _, arch in chosen} == set(config.ARCHS)


def test_compiles(arch: str, configs: list[Any]) -> None:
    compiled, cached = jit.warmup(configs, arch=arch, progress=False)
    assert compiled + cached == len(configs)
    for c in configs:
        assert cubin.parameter_sizes(jit.compile_cubin(c, arch), c.entry)


def test_twins_have_the_same_code() -> None:
    compiled = by_kernel_and_arch()
    shared = [
        (c, arch)
        for (name, arch), configs in compiled.items()
        for c in configs
        if c in compiled.get((name, TWIN.get(arch, "")), ())
    ]
    assert shared
    for c, arch in shared:
        codes = [cubin.code(jit.compile_cubin(c, each)) for each in (arch, TWIN[arch])]
        assert codes[0] == codes[1], c


def problems_of(c: KernelConfig, arch: str, image: bytes) -> list[str]:
    """Why a kernel would be slow, or could not be launched."""
    used = sass.usage(image, c.entry, arch)
    problems = []
    if used.local_bytes:
        problems.append(f"{used.local_bytes} bytes of local memory a thread")
    shared = used.shared_bytes + getattr(c, "smem_bytes", 0)
    limit = config.device_of(arch).smem_per_block
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory exceed {limit}")
    registers = used.registers * getattr(c, "threads", 1)
    if registers > REGISTERS_OF_A_BLOCK:
        problems.append(f"{registers} registers of a block exceed {REGISTERS_OF_A_BLOCK}")
    return [f"{c!r} for {arch}: {problem}" for problem in problems]


def test_stays_in_registers_and_shared_memory(arch: str, configs: list[Any]) -> None:
    jit.warmup(configs, arch=arch, progress=False)
    problems = [p for c in configs for p in problems_of(c, arch, jit.compile_cubin(c, arch))]
    assert not problems, "\n".join(problems)


def missing_instructions(configs: list[Any], arch: str) -> list[str]:
    """The expected instructions that kernels lack, and local memory where they have any."""
    problems = []
    codes = sass.disassemble_all([jit.compile_cubin(c, arch) for c in configs], arch)
    for c, code in zip(configs, codes, strict=True):
        missing = [p for p in c.expected_sass(arch) if not sass.has_instruction(code, p)]
        spilled = [p for p in (r"LDL\b", r"STL\b") if sass.has_instruction(code, p)]
        found = [f"no {p}" for p in missing] + [f"has {p}" for p in spilled]
        problems += [f"{c!r} for {arch}: {problem}" for problem in found]
    return problems


def test_uses_the_native_instructions(arch: str, disassembled: list[Any]) -> None:
    jit.warmup(disassembled, arch=arch, progress=False)
    problems = missing_instructions(disassembled, arch)
    assert not problems, "\n".join(problems)


@dataclasses.dataclass(frozen=True)
class BadConfig:
    """A kernel with every fault that the checks above look for."""

    source: ClassVar[str] = "bad.cu"
    entry: ClassVar[str] = "bad"
    threads: int = 4096
    smem_bytes: int = 226 * 1024

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return (r"IMMA\.16832", r"STG\.E")


BAD_CU = """
extern "C" __global__ void bad(const float* x, float* y, long long n) {
  __shared__ float shared[1024];
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i];
  for (long long i = 0; i < n; ++i) local[i * i % 64] += local[i * 7 % 64];
  shared[threadIdx.x] = local[n];
  __syncthreads();
  y[threadIdx.x] = shared[n];
}
"""


def test_a_bad_kernel_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.cu").write_text(BAD_CU)
    monkeypatch.setattr(source, "SOURCE_DIR", tmp_path)
    monkeypatch.setenv("INTLASS_CACHE_DIR", str(tmp_path / "cache"))
    for arch in ("sm_80", "sm_90a"):
        image = jit.compile_cubin(BadConfig(), arch)
        assert sass.usage(image, "bad", arch).shared_bytes == 4096
        assert cubin.stack_bytes(image) == 256
        text = "\n".join(problems_of(BadConfig(), arch, image))
        assert "256 bytes of local memory" in text
        assert f"{230 * 1024} bytes of shared memory exceed" in text
        assert "registers of a block exceed" in text
        missing = missing_instructions([BadConfig()], arch)
        assert [text.rsplit(": ", 1)[1] for text in missing] == [
            r"no IMMA\.16832",
            r"has LDL\b",
            r"has STL\b",
        ]
