"""What is said about a machine where CuPy, NVRTC, the headers, the driver or the GPU is missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toy_kernel
from toy_kernel import AddConfig

from intlass_ops import errors
from intlass_ops.cuda import jit, toolkit


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_kernel.install(tmp_path, monkeypatch)


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_needs_neither_cupy_nor_cuda() -> None:
    code = (
        "import sys, torch, intlass_ops, intlass_ops.cuda.jit;"
        "print('cupy' in sys.modules, 'cupy_backends' in sys.modules, torch.cuda.is_initialized())"
    )
    assert run_python(code) == "False False False"


@pytest.fixture
def fresh_toolkit() -> Iterator[None]:
    # An import of CuPy that fails half way cannot be repeated in the process: not under the fakes.
    importlib.import_module("cupy")
    toolkit.compiler.cache_clear()
    yield
    toolkit.compiler.cache_clear()


def test_availability_here() -> None:
    found = jit.availability()
    assert found.cupy
    assert found.nvrtc
    if not torch.cuda.is_available():
        assert found.devices == ()
        assert found.problem
        with pytest.raises(errors.BackendUnavailableError, match=r"NVIDIA|CUDA"):
            jit.get(AddConfig(), 0)


@pytest.mark.usefixtures("fresh_toolkit")
@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("cupy", "need CuPy .*pip install cupy-cuda1"),
        ("nvrtc", "cannot load NVRTC.*libnvrtc.so.12.*pip install cupy-cuda1"),
        ("headers", "no CUDA 1[0-9] headers .*pip install cupy-cuda1.*CUDA_PATH"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, missing: str, said: str
) -> None:
    def unloadable() -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    if missing == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", None)
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", None)
    elif missing == "nvrtc":
        nvrtc = types.SimpleNamespace(getVersion=unloadable)
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", nvrtc)
    else:
        monkeypatch.setattr(toolkit, "_header_folders", lambda _: iter(()))
    with pytest.raises(errors.BackendUnavailableError, match=said):
        jit.compile_cubin(AddConfig(), "sm_80")
    found = jit.availability()
    assert found.nvrtc is None
    assert str(found.problem)


def test_availability_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("driver on fire")

    monkeypatch.setattr(toolkit, "_driver_version", fail)
    assert "driver on fire" in str(jit.availability().problem)


def test_headers_belong_to_the_same_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(name: str, version: int) -> Path:
        made = tmp_path / name
        made.mkdir()
        for header in toolkit._HEADERS:
            (made / header).touch()
        (made / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
        return made

    folders = [tmp_path / "absent", folder("cuda12", 12090), folder("cuda13", 13000)]
    monkeypatch.setattr(toolkit, "_header_folders", lambda _: iter(folders))
    assert toolkit.find_headers(13) == (folders[2], 13000)
    assert toolkit.find_headers(14) is None


def test_install_command_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, package in [("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x"), (None, "cuda12x")]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert package in toolkit.install_command()
