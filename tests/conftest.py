"""What all tests share: the gpu marker, devices, the hypothesis profiles, an empty kernel cache.

Not here: hypothesis strategies (strategies.py).
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor

from intlass_ops import cpu_integers
from intlass_ops.config import Device
from intlass_ops.cuda import jit
from intlass_ops.cuda.plans import device_of

# The first example of a property test may compile a kernel: no deadlines. CI draws the same
# examples at every run, so a red run is the change's doing; locally each run explores anew.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


# Without VNNI oneDNN adds INT8 products in 16 bits, and PyTorch's _int_mm is wrong. Our ops do not
# call it there; the models of other libraries, which the tests compare with, do.
if not cpu_integers.is_exact():
    _aten = torch.library.Library("aten", "IMPL")

    def _int_mm(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double()).to(torch.int32)

    _aten.impl("_int_mm", _int_mm, "CPU")
    _aten.impl("_int_mm.out", lambda a, b, *, out: out.copy_(_int_mm(a, b)), "CPU")


# Test processes fill the machine's cores: more threads in each would fight for them.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _processes > 1:
    torch.set_num_threads(1)
    _compilers = max(1, 2 * len(os.sched_getaffinity(0)) // _processes)
    jit._MOST_COMPILERS = min(jit._MOST_COMPILERS, _compilers)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="every shipped CUDA kernel for every architecture, more damaged files",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # The millions of objects of the libraries stay: no garbage collection has to walk them again,
    # which was a fifth of the tests of torch.compile's time.
    gc.freeze()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Runs a test on the CPU and, where there is one, on the GPU with the common kernels warm."""
    if request.param == "cuda":
        import warm_kernels

        warm_kernels.compile_common_kernels()
    return str(request.param)


@pytest.fixture
def hopper() -> Device:
    """The GPU of a `gpu` test that needs wgmma."""
    gpu = device_of(0)
    if gpu.arch != "sm_90a":
        pytest.skip(f"{gpu.arch} has no wgmma")
    return gpu


@pytest.fixture
def empty_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel cache of the test's own; child processes that inherit the environment share it."""
    cache = tmp_path / "kernel-cache"
    monkeypatch.setenv("INTLASS_CACHE_DIR", str(cache))
    return cache
