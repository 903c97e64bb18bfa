"""What this machine offers for compiling and running CUDA kernels, and what to install for more.

CuPy brings the bindings of NVRTC and of the driver; the headers come from the CUDA runtime's wheel
or a CUDA toolkit. Nothing is imported or searched before it is asked for. Checked on CuPy 14.2 for
CUDA 12 (NVRTC 12.9) and for CUDA 13 (NVRTC 13.0).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendUnavailableError

OLDEST_ARCH = 80  # the kernels are built on Ampere's mma.sync and cp.async

_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "vector_types.h")
_VERSION = re.compile(r"^#define\s+CUDART_VERSION\s+(\d+)", re.MULTILINE)
_importing = threading.Lock()


@dataclass(frozen=True)
class Compiler:
    """NVRTC as CuPy finds it, and the headers that belong to it."""

    nvrtc: Any  # the module cupy_backends.cuda.libs.nvrtc; CuPy has no type stubs
    version: tuple[int, int]
    archs: tuple[int, ...]  # 80 stands for sm_80
    headers: Path
    headers_version: int  # 12090 is CUDA 12.9


def cupy_module(name: str) -> Any:
    """A module of CuPy, which has no type stubs, imported after all of CuPy and by one thread.

    Its modules import each other in circles, some only at their first call: a second thread, or a
    first call amid another import, would meet modules that are half initialised.
    """
    with _importing:
        importlib.import_module("cupy")
        return importlib.import_module(name)


@functools.cache
def compiler() -> Compiler:
    """Raises BackendUnavailableError, which says what to install."""
    try:
        nvrtc = cupy_module("cupy_backends.cuda.libs.nvrtc")
    except ImportError as error:
        raise BackendUnavailableError(
            f"the CUDA kernels need CuPy ({error}): {install_command()}"
        ) from error
    try:
        version = nvrtc.getVersion()
        archs = nvrtc.getSupportedArchs()
    except Exception as error:
        raise BackendUnavailableError(
            f"CuPy cannot load NVRTC, the CUDA run-time compiler ({error}): {install_command()}"
        ) from error
    headers = find_headers(version[0])
    if headers is None:
        raise BackendUnavailableError(
            f"no CUDA {version[0]} headers (cuda_bf16.h) for NVRTC {version[0]}.{version[1]}: "
            f"{install_command(version[0])}, or set CUDA_PATH to a CUDA {version[0]} toolkit"
        )
    return Compiler(nvrtc, version, archs, *headers)


def find_headers(cuda_major: int) -> tuple[Path, int] | None:
    """The first include folder of CUDA ``cuda_major``, and its CUDART_VERSION."""
    for folder in _header_folders(cuda_major):
        if all((folder / name).is_file() for name in _HEADERS):
            version = _headers_version(folder)
            if version is not None and version // 1000 == cuda_major:
                return folder, version
    return None


def _header_folders(cuda_major: int) -> Iterator[Path]:
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels.submodule_search_locations if wheels else None) or ():
        yield Path(root) / f"cu{cuda_major}" / "include"
        yield Path(root) / "cuda_runtime" / "include"
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.pathfinder"):
        # A dependency of CuPy that knows conda's folders.
        pathfinder = importlib.import_module("cuda.pathfinder")
        found = pathfinder.find_nvidia_header_directory("cudart")
        if found:
            yield Path(found)
    yield Path("/usr/local/cuda/include")
    yield from sorted(Path("/usr/local").glob(f"cuda-{cuda_major}*/include"), reverse=True)


def _headers_version(folder: Path) -> int | None:
    try:
        text = (folder / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = _VERSION.search(text)
    return int(match[1]) if match else None


def install_command(cuda_major: int | None = None) -> str:
    """The pip line that brings CuPy with its compiler, for torch's CUDA unless told otherwise."""
    if cuda_major is None:
        cuda_major = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else 12
    if cuda_major <= 12:
        return "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
    wheels = (f'"nvidia-cuda-{part}=={cuda_major}.*"' for part in ("nvrtc", "runtime"))
    return f"pip install cupy-cuda{cuda_major}x {' '.join(wheels)}"


@dataclass(frozen=True)
class Availability:
    """What the CUDA kernels find here. ``problem`` says what to do about it, None if all is well.

    Where ``nvrtc`` is set, kernels can be compiled, whatever the problem.
    """

    cupy: str | None
    nvrtc: str | None
    driver: str | None
    devices: tuple[str, ...]
    problem: str | None


def availability() -> Availability:
    """Never raises. Does not start CUDA where there is no driver.

    >>> found = availability()
    >>> found.problem is None or isinstance(found.problem, str)
    True
    """
    cupy = nvrtc = driver = problem = None
    devices: tuple[str, ...] = ()
    try:
        cupy = _cupy_version()
        nvrtc = "{}.{}".format(*compiler().version)
        driver = _driver_version()
        if torch.cuda.is_available():
            devices = tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
        problem = _gpu_problem(driver)
    except BackendUnavailableError as error:
        problem = str(error)
    except Exception as error:
        problem = f"CUDA does not work here: {type(error).__name__}: {error}"
    return Availability(cupy, nvrtc, driver, devices, problem)


def _cupy_version() -> str | None:
    try:
        return str(cupy_module("cupy").__version__)
    except ImportError:  # compiler() says it better
        return None


def _driver_version() -> str | None:
    """The CUDA version the driver supports; None without a driver."""
    runtime = cupy_module("cupy_backends.cuda.api.runtime")
    version = runtime.driverGetVersion()
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if version else None


def _gpu_problem(driver: str | None) -> str | None:
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the kernels need an NVIDIA GPU and a CUDA build"
    if driver is None:
        return "no NVIDIA driver found: the CUDA kernels need an NVIDIA GPU and its driver"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU it can use (driver: {driver})"
    all_problems = [unsupported(i) for i in range(torch.cuda.device_count())]
    return None if None in all_problems else all_problems[0]


def unsupported(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor >= OLDEST_ARCH:
        return None
    return (
        f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability "
        f"{major}.{minor}; the kernels need 8.0 (Ampere) or newer"
    )
