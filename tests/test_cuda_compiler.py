"""Source + Config to cubin through NVRTC and the disk cache, without a GPU."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import toy_kernel
from toy_kernel import ADD_CU, SCALE_CUH, AddConfig

from intlass_ops import errors
from intlass_ops.cuda import compiler, cubin, jit, source, toolkit


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_kernel.install(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------ source text


class Mode(enum.IntEnum):
    FAST = 3


def test_config_struct_holds_the_fields_by_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        source: ClassVar[str] = "x.cu"
        entry: ClassVar[str] = "x"
        block_m: int = 64
        offset: int = -(1 << 40)
        mode: Mode = Mode.FAST
        has_zeros: bool = True
        is_signed: bool = False
        x_type: str = "__nv_bfloat16"
        out_type: str = "unsigned char"
        w_kind: str = "s4"

    assert source.config_struct(Config()).splitlines() == [
        "#include <cuda_bf16.h>",
        "struct s4;",
        "struct Config {",
        "  static constexpr int block_m = 64;",
        "  static constexpr long long offset = -1099511627776;",
        "  static constexpr int mode = 3;",
        "  static constexpr bool has_zeros = true;",
        "  static constexpr bool is_signed = false;",
        "  using x_type = __nv_bfloat16;",
        "  using out_type = unsigned char;",
        "  using w_kind = s4;",
        "};",
    ]


@pytest.mark.parametrize("value", [1.5, None, "int; evil", ""])
def test_config_field_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="offset="):
        source.config_struct(AddConfig(offset=value))


def test_config_must_be_frozen() -> None:
    @dataclasses.dataclass
    class Config:
        source: ClassVar[str] = "x.cu"
        entry: ClassVar[str] = "x"

    with pytest.raises(TypeError, match="not a frozen dataclass"):
        source.config_struct(Config())


def test_program_holds_each_reachable_header_once() -> None:
    program = source.program(AddConfig())
    assert [name for name, _ in program.headers] == ["outer.cuh", "scale.cuh"]
    assert program.name == "package/cuda/add.cu"
    assert program.text.startswith("#include <cuda_bf16.h>\nstruct Config {")


# ---------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_compiles_for(arch: str) -> None:
    image = jit.compile_cubin(AddConfig(), arch)
    assert image.startswith(b"\x7fELF")
    assert cubin.parameter_sizes(image, "add") == (8, 8, 8, 128)


def test_compiles_to_ptx_for_gpus_newer_than_nvrtc() -> None:
    newest = max(toolkit.compiler().archs)
    assert compiler.arch_of_capability(99, 0) == f"compute_{newest}"
    image = jit.compile_cubin(AddConfig(), f"compute_{newest}")
    assert b".entry add(" in image
    assert cubin.parameter_sizes(image, "add") == (8, 8, 8, 128)


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90a")]
)
def test_arch_of_capability(capability: tuple[int, int], arch: str) -> None:
    assert compiler.arch_of_capability(*capability) == arch


@pytest.mark.parametrize("arch", ["sm_75", "sm_999", "sm90", "hopper", ""])
def test_unknown_arch_is_named_with_the_known_ones(arch: str) -> None:
    with pytest.raises(errors.KernelCompileError, match=rf"arch='{arch}' .* sm_80, sm_86,"):
        jit.compile_cubin(AddConfig(), arch)


def test_parameters_of_a_kernel_that_is_not_there() -> None:
    image = jit.compile_cubin(AddConfig(), "sm_80")
    with pytest.raises(ValueError, match="subtract"):
        cubin.parameter_sizes(image, "subtract")
    with pytest.raises(ValueError, match="add"):
        cubin.parameter_sizes(b"not an image", "add")


def test_error_in_the_source_names_file_line_config_and_arch(sources: Path) -> None:
    (sources / "add.cu").write_text(ADD_CU.replace("threadIdx.x;", "threadIdx.x"))
    with pytest.raises(errors.KernelCompileError) as caught:
        jit.compile_cubin(AddConfig(offset=41), "sm_86")
    message = str(caught.value)
    assert "package/cuda/add.cu(7): error: expected a" in message
    assert "offset=41" in message
    assert "sm_86" in message


def test_error_in_a_header_names_its_file_and_line(sources: Path) -> None:
    (sources / "scale.cuh").write_text(SCALE_CUH.replace("Config::negate", "Config::negated"))
    with pytest.raises(errors.KernelCompileError, match=r"package/cuda/scale.cuh\(2\): error: "):
        jit.compile_cubin(AddConfig(), "sm_80")


def test_missing_header_is_named(sources: Path) -> None:
    (sources / "scale.cuh").unlink()
    with pytest.raises(errors.KernelCompileError, match=r'cannot open source file "scale.cuh"'):
        jit.compile_cubin(AddConfig(), "sm_80")


def test_there_is_no_fast_math(sources: Path) -> None:
    (sources / "add.cu").write_text(
        'extern "C" __global__ void add(float* y) { y[0] = y[1] / y[2] * 1e-30f; }'
    )
    ptx = jit.compile_cubin(AddConfig(), "compute_80").decode()
    assert "div.rn.f32" in ptx
    assert "ftz" not in ptx


# ------------------------------------------------------------------------------------------ cache


def key_of(config: AddConfig, arch: str = "sm_80", **compiler_fields: Any) -> str:
    tools = dataclasses.replace(toolkit.compiler(), **compiler_fields)
    return compiler.cache_key(source.program(config), arch, tools)


def test_key_depends_on_everything_that_is_compiled(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(AddConfig())
    keys = [
        key,
        key_of(AddConfig(offset=2)),
        key_of(AddConfig(), "sm_86"),
        key_of(AddConfig(), version=(99, 1)),
        key_of(AddConfig(), headers_version=99010),
    ]
    (sources / "scale.cuh").write_text(SCALE_CUH + "// changed\n")
    keys.append(key_of(AddConfig()))
    (sources / "scale.cuh").write_text(SCALE_CUH)
    (sources / "add.cu").write_text(ADD_CU + "// changed\n")
    keys.append(key_of(AddConfig()))
    (sources / "add.cu").write_text(ADD_CU)
    monkeypatch.setattr(compiler, "_OPTIONS", (*compiler._OPTIONS, "--fmad=false"))
    keys.append(key_of(AddConfig()))
    assert len(set(keys)) == len(keys)


def test_key_depends_on_nothing_else(sources: Path) -> None:
    key = key_of(AddConfig())
    (sources / "unrelated.cuh").write_text("struct Unrelated {};")
    assert key_of(AddConfig(), headers=Path("/moved/include")) == key


def test_compiles_again_after_a_header_changed(sources: Path) -> None:
    assert compiler.compile_or_load(AddConfig(), "sm_80")[1]
    assert not compiler.compile_or_load(AddConfig(), "sm_80")[1]
    (sources / "scale.cuh").write_text(SCALE_CUH + "// changed\n")
    assert compiler.compile_or_load(AddConfig(), "sm_80")[1]


def _compile_and_count(
    number: int, folder: Path, counter: Path, cache: str, together: Any, report: Any
) -> None:
    """One of many processes: compiles three kernels, notes in ``counter`` when NVRTC runs."""
    source.SOURCE_DIR = folder
    os.environ["INTLASS_CACHE_DIR"] = cache
    run_nvrtc = compiler._run_nvrtc

    def counted(config: Any, program: Any, arch: Any, tools: Any) -> bytes:
        with open(counter, "a") as file:
            file.write(f"{config.offset}\n")
        return run_nvrtc(config, program, arch, tools)

    compiler._run_nvrtc = counted
    offsets = [(number + i) % 3 for i in range(3)]
    together.wait()
    images = {i: compiler.compile_cubin(AddConfig(offset=i), "sm_80") for i in offsets}
    report.put([hash_of(images[i]) for i in range(3)])


def hash_of(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


def test_twenty_processes_compile_each_kernel_once(sources: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    preload = ["intlass_ops.cuda.compiler", "pytest", "cupy_backends.cuda.libs.nvrtc"]
    context.set_forkserver_preload(preload)
    counter = tmp_path / "compilations"
    together, report = context.Barrier(20), context.SimpleQueue()
    arguments = (sources, counter, os.environ["INTLASS_CACHE_DIR"], together, report)
    processes = [
        context.Process(target=_compile_and_count, args=(number, *arguments))
        for number in range(20)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 20
    expected = [hash_of(jit.compile_cubin(AddConfig(offset=i), "sm_80")) for i in range(3)]
    assert [report.get() for _ in processes] == [expected] * 20
    assert sorted(counter.read_text().split()) == ["0", "1", "2"]
