"""Every shipped kernel config, without a GPU: for each architecture (--thorough) or for some.

It compiles, keeps everything in registers, fits the shared memory, and uses the tensor-core
instructions it was written for. The cubins go through the kernel cache, so that a second run, and
the second test of an architecture, only read them.

Compiling takes a second a kernel, disassembling one most of a second. Hence a config that is
shipped for several architectures of a generation is compiled for one of them, in turn, and a code
path is disassembled on one of them; but each architecture compiles every code path that it has, and
disassembles every set of instructions that it should use.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sass

from intlass_ops import config
from intlass_ops.cuda import cubin, jit, source
from intlass_ops.cuda.source import KernelConfig

REGISTERS_OF_A_BLOCK = 65536
GENERATIONS = (("sm_80", "sm_86", "sm_89"), ("sm_90a", "sm_100", "sm_120"))

Chosen = dict[tuple[str, str], list[Any]]  # the configs of each (kernel source, architecture)


def in_turn(turn: int, archs: Iterable[str], *, thorough: bool) -> list[str]:
    """Of some architectures one of each generation, or all."""
    own = [[arch for arch in generation if arch in archs] for generation in GENERATIONS]
    return [
        arch for each in own if each for arch in (each if thorough else [each[turn % len(each)]])
    ]


def by_kernel_and_arch(*, thorough: bool) -> Chosen:
    """What is compiled, without repetition."""
    archs_of: dict[Any, dict[str, None]] = defaultdict(dict)
    for shipped, archs in config.shipped_configs():
        archs_of[shipped].update(dict.fromkeys(archs))
    found: Chosen = defaultdict(list)
    for turn, (c, archs) in enumerate(archs_of.items()):
        for arch in in_turn(turn, archs, thorough=thorough):
            found[c.source, arch].append(c)
    met = {(key, code_path(c, key[1])) for key, configs in found.items() for c in configs}
    for c, archs in archs_of.items():
        for arch in archs:
            key = c.source, arch
            if (key, code_path(c, arch)) not in met:
                met.add((key, code_path(c, arch)))
                found[key].append(c)
    return found


def code_path(c: Any, arch: str) -> tuple[Any, tuple[str, ...]]:
    """Operand kinds and expected instructions: tile sizes do not decide which one multiplies."""
    names = [field.name for field in dataclasses.fields(c) if field.name.endswith("_kind")]
    return tuple(getattr(c, name) for name in names), c.expected_sass(arch)


def to_disassemble(compiled: Chosen, *, thorough: bool) -> Chosen:
    """One config of each code path that names instructions."""
    paths: dict[tuple[str, str], dict[Any, Any]] = defaultdict(dict)
    archs_of: dict[Any, list[str]] = defaultdict(list)  # of (source, operand kinds)
    for (name, arch), configs in compiled.items():
        for c in configs:
            kinds, expected = code_path(c, arch)
            if expected:
                paths[name, arch].setdefault((kinds, expected), c)
                archs_of[name, kinds].append(arch)
    turns = {key: turn for turn, key in enumerate(archs_of)}
    found: Chosen = {}
    for (name, arch), configs in paths.items():
        seen: set[tuple[str, ...]] = set()
        found[name, arch] = []
        for (kinds, expected), c in configs.items():
            key = name, kinds
            its_turn = arch in in_turn(turns[key], archs_of[key], thorough=thorough)
            if its_turn or expected not in seen:
                seen.add(expected)
                found[name, arch].append(c)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" not in metafunc.fixturenames:
        return
    thorough = metafunc.config.getoption("--thorough")
    compiled = by_kernel_and_arch(thorough=thorough)
    for names, chosen in (
        (("arch", "configs"), compiled),
        (("arch", "disassembled"), to_disassemble(compiled, thorough=thorough)),
    ):
        if set(names) <= set(metafunc.fixturenames):
            cases = [pytest.param(a, cs, id=f"{name}-{a}") for (name, a), cs in chosen.items()]
            metafunc.parametrize(names, cases)


def test_nothing_shipped_is_left_out() -> None:
    some, everything = (by_kernel_and_arch(thorough=each) for each in (False, True))
    shipped = {(c.source, arch, c) for c, archs in config.shipped_configs() for arch in archs}
    assert {(*key, c) for key, configs in everything.items() for c in configs} == shipped
    assert {c for configs in some.values() for c in configs} == {c for *_, c in shipped}
    for (name, arch), configs in everything.items():
        paths = {code_path(c, arch) for c in configs}
        assert {code_path(c, arch) for c in some[name, arch]} == paths


def test_no_instruction_is_left_out() -> None:
    compiled = by_kernel_and_arch(thorough=False)
    chosen = to_disassemble(compiled, thorough=False)
    for (name, arch), configs in compiled.items():
        expected = {c.expected_sass(arch) for c in configs} - {()}
        assert {c.expected_sass(arch) for c in chosen.get((name, arch), [])} == expected
    assert kinds_of_generations(chosen) == kinds_of_generations(compiled)


def kinds_of_generations(chosen: Chosen) -> set[Any]:
    """(kernel, generation, operand kinds) of the configs that name instructions."""
    return {
        (name, generation, code_path(c, arch)[0])
        for generation in GENERATIONS
        for (name, arch), configs in chosen.items()
        for c in configs
        if arch in generation and c.expected_sass(arch)
    }


def test_compiles(arch: str, configs: list[Any]) -> None:
    compiled, cached = jit.warmup(configs, arch=arch, progress=False)
    assert compiled + cached == len(configs)
    for c in configs:
        assert cubin.parameter_sizes(jit.compile_cubin(c, arch), c.entry)


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


def missing_instructions(c: Any, arch: str) -> list[str]:
    """The expected instructions that the kernel lacks, and local memory where it has any."""
    code = sass.disassemble(jit.compile_cubin(c, arch))
    missing = [p for p in c.expected_sass(arch) if not sass.has_instruction(code, p)]
    spilled = [p for p in (r"LDL\b", r"STL\b") if sass.has_instruction(code, p)]
    problems = [f"no {p}" for p in missing] + [f"has {p}" for p in spilled]
    return [f"{c!r} for {arch}: {problem}" for problem in problems]


def test_uses_the_native_instructions(arch: str, disassembled: list[Any]) -> None:
    jit.warmup(disassembled, arch=arch, progress=False)
    problems = [p for c in disassembled for p in missing_instructions(c, arch)]
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
        missing = missing_instructions(BadConfig(), arch)
        assert [text.rsplit(": ", 1)[1] for text in missing] == [
            r"no IMMA\.16832",
            r"has LDL\b",
            r"has STL\b",
        ]
