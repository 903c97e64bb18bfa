"""Warming up, loading and launching, against a driver made of Python.

The same on a real GPU is in test_cuda_launch.py.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_kernel
from toy_kernel import AddConfig

from intlass_ops import errors
from intlass_ops.cuda import early_launch, jit


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_kernel.install(tmp_path, monkeypatch)


def test_warmup_counts_what_it_compiled() -> None:
    configs = [AddConfig(offset=i) for i in range(3)]
    assert jit.warmup([*configs[:2], configs[0]], arch="sm_80") == (2, 0)
    assert jit.warmup(configs, arch="sm_80", progress=False) == jit.WarmedUp(compiled=1, cached=2)
    assert jit.warmup([], arch="sm_80") == (0, 0)


def test_warmup_shows_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert jit.warmup([AddConfig()], arch="sm_80") == (1, 0)
    assert "Compiling CUDA kernels" in capfd.readouterr().err


def test_warmup_passes_on_a_compiler_error() -> None:
    configs = [AddConfig(x_type="no_such_type"), *(AddConfig(offset=i) for i in range(3))]
    with pytest.raises(errors.KernelCompileError, match="no_such_type"):
        jit.warmup(configs, arch="sm_80")


def test_warmup_needs_a_device_or_an_arch() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        jit.warmup([AddConfig()], device="cuda:0", arch="sm_80")
    if not torch.cuda.is_available():
        with pytest.raises(errors.BackendUnavailableError, match="arch='sm_90a'"):
            jit.warmup([AddConfig()])


class FakeGpu:
    """CUDA's driver and CuPy's Module, as far as jit.py uses them, for two devices."""

    CU_FUNC_ATTRIBUTE_NUM_REGS = 4
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.context = 0
        self.loads: list[int] = []  # contexts
        self.launches: list[tuple[Any, ...]] = []
        self.smem_limits: list[int] = []
        self.is_capturing = False
        self.ptr = 77
        self.on_launch: Callable[[], None] = lambda: None

    def module(self, name: str) -> Any:
        if name == "cupy.cuda.function":
            return types.SimpleNamespace(Module=lambda: self)
        return self  # cupy_backends.cuda.api.driver and .runtime

    def load(self, image: bytes) -> None:
        assert image.startswith(b"\x7fELF")
        self.loads.append(self.context)

    def get_function(self, entry: str) -> FakeGpu:
        assert entry == "add"
        return self

    def ctxGetCurrent(self) -> int:
        return self.context

    def ctxSetCurrent(self, context: int) -> None:
        self.context = context

    def setDevice(self, index: int) -> None:
        self.context = 1000 + index

    def memGetInfo(self) -> None:
        assert self.context

    def funcGetAttribute(self, attribute: int, function: int) -> int:
        return 40

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        if value > 99 * 1024:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.smem_limits.append(value)

    def launchKernel(self, function: int, *args: int) -> None:
        *dims, smem_bytes, stream, table, extra = args
        assert (function, extra) == (self.ptr, 0)
        before = self.parameters(table)
        self.on_launch()
        assert self.parameters(table) == before
        self.launches.append((self.context, dims, smem_bytes, stream, before))

    def parameters(self, table: int) -> bytes:
        addresses = (ctypes.c_void_p * 4).from_address(table)
        return b"".join(map(ctypes.string_at, addresses, (8, 8, 8, 128)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(jit, "cupy_module", fake.module)
    monkeypatch.setattr(jit, "_kernels", {})
    monkeypatch.setattr(jit, "_arch_of", lambda index: "sm_80")
    monkeypatch.setattr(
        jit, "availability", lambda: jit.Availability("14", "12.9", "13.0", ("A", "B"), None)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda index: threading.Lock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.is_capturing)
    return fake


WORDS = (1 << 40, 2, -3, *range(100, 116))
IMAGE = struct.pack("=19q", *WORDS)


@pytest.mark.parametrize("args", [WORDS, list(WORDS), IMAGE])
def test_launch_hands_over_dims_stream_and_words(gpu: FakeGpu, args: Any) -> None:
    gpu.context = 1001
    jit.get(AddConfig(), 1).launch((5, 4, 3), (128, 1, 1), 0, args, 0xABC)
    assert gpu.launches == [(1001, [5, 4, 3, 128, 1, 1], 0, 0xABC, IMAGE)]
    assert gpu.smem_limits == []


def test_kernels_are_loaded_once_a_device(gpu: FakeGpu) -> None:
    kernels = [jit.get(AddConfig(), 0), jit.get(AddConfig(), 1), jit.get(AddConfig(), 0)]
    assert gpu.loads == [1000, 1001]
    assert kernels[0] is kernels[2]
    assert [kernel.device_index for kernel in kernels] == [0, 1, 0]


@pytest.mark.parametrize("current", [0, 1000, 1001])
def test_load_and_launch_leave_the_current_context(gpu: FakeGpu, current: int) -> None:
    gpu.context = current
    kernel = jit.get(AddConfig(), 1)
    assert gpu.context == current
    kernel.launch((1, 1, 1), (1, 1, 1), 0, IMAGE, 0)
    assert gpu.context == current
    with pytest.raises(errors.KernelLaunchError):
        kernel.launch((1, 1, 1), (1, 1, 1), 0, b"", 0)
    assert gpu.context == current
    assert [launch[0] for launch in gpu.launches] == [1001]


def test_shared_memory_is_asked_for_when_it_grows(gpu: FakeGpu) -> None:
    kernel = jit.get(AddConfig(), 0)
    for smem_bytes in (50_000, 60_000, 55_000, 60_000):
        kernel.launch((1, 1, 1), (1, 1, 1), smem_bytes, IMAGE, 0)
    assert gpu.smem_limits == [50_000, 60_000]
    with pytest.raises(errors.KernelLaunchError, match="smem_bytes=200000: CUDA_ERROR_INVALID"):
        kernel.launch((1, 1, 1), (1, 1, 1), 200_000, IMAGE, 0)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (WORDS[:-1], "18 argument words for 19"),
        (IMAGE + b"\0", "153 bytes of arguments for 152"),
        ((0.5, *WORDS[1:]), "not an integer"),
        ((1 << 63, *WORDS[1:]), "19 argument|range|too large|format requires"),
    ],
)
def test_wrong_arguments_do_not_reach_the_gpu(gpu: FakeGpu, args: Any, said: str) -> None:
    kernel = jit.get(AddConfig(), 0)
    with pytest.raises(errors.KernelLaunchError, match=rf"AddConfig\(.*cuda:0.*({said})"):
        kernel.launch((1, 1, 1), (32, 1, 1), 0, args, 0)
    assert gpu.launches == []


def test_threads_do_not_share_arguments(gpu: FakeGpu) -> None:
    kernel = jit.get(AddConfig(), 0)
    gpu.context = 1000
    gpu.on_launch = lambda: time.sleep(0.01)  # lets go of the GIL, as the driver does

    def launch(i: int) -> None:
        kernel.launch((1, 1, 1), (1, 1, 1), 0, (i, *WORDS[1:]), 0)

    threads = [threading.Thread(target=launch, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first_words = [struct.unpack_from("=q", launch[-1])[0] for launch in gpu.launches]
    assert sorted(first_words) == list(range(8))


def test_threads_share_a_bound_launch(gpu: FakeGpu) -> None:
    """Its first words and its last bytes change call by call, the rest stays."""
    launch = jit.get(AddConfig(), 0).bind((2, 1, 1), (32, 1, 1), 0, IMAGE, 2)
    gpu.on_launch = lambda: time.sleep(0.01)
    calls = [lambda i=i: launch((i, -i), 7, bytes([i]) * 16) for i in range(1, 9)]
    threads = [threading.Thread(target=call) for call in calls * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    images = sorted(launched[-1] for launched in gpu.launches)
    expected = [
        struct.pack("=2q", i, -i) + IMAGE[16:-16] + bytes([i]) * 16 for i in (*range(1, 9),) * 2
    ]
    assert images == sorted(expected)
    with pytest.raises(errors.KernelLaunchError, match="AddConfig"):
        launch((1,), 7)


def test_a_cold_kernel_is_refused_during_capture(gpu: FakeGpu) -> None:
    gpu.is_capturing = True
    with pytest.raises(
        errors.KernelNotReadyError, match=r"AddConfig\(.*intlass_ops\.warmup\(\[config\], device=1"
    ):
        jit.get(AddConfig(), 1)
    gpu.is_capturing = False
    kernel = jit.get(AddConfig(), 1)
    gpu.is_capturing = True
    assert jit.get(AddConfig(), 1) is kernel


def test_warmup_loads_on_the_device(gpu: FakeGpu) -> None:
    assert jit.warmup([AddConfig()], device="cuda:1") == (1, 0)
    assert gpu.loads == [1001]
    gpu.is_capturing = True
    jit.get(AddConfig(), 1)


def test_a_forked_child_is_told_why_it_cannot_launch(gpu: FakeGpu) -> None:
    kernel = jit.get(AddConfig(), 0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for attempt in (
            lambda: kernel.launch((1, 1, 1), (1, 1, 1), 0, IMAGE, 0),
            lambda: jit.get(AddConfig(offset=9), 0),
        ):
            try:
                attempt()
            except errors.KernelLaunchError as error:
                said.append(str(error))
        os.write(write, " | ".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 4096).decode().split(" | ")
    assert len(said) == 2
    assert all('"spawn" or "forkserver"' in text for text in said)
    kernel.launch((1, 1, 1), (1, 1, 1), 0, IMAGE, 0)  # the parent goes on


def test_a_child_forked_before_cuda_was_used_may_use_it(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    child = os.fork()
    if child == 0:
        try:
            jit.get(AddConfig(), 0).launch((1, 1, 1), (1, 1, 1), 0, IMAGE, 0)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("device", ["cpu", torch.device("meta")])
def test_arch_of_another_kind_of_device(device: Any) -> None:
    with pytest.raises(ValueError, match="is not a CUDA device"):
        jit.arch_of(device)


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(errors.BackendUnavailableError, match=r"Tesla T4.* 7\.5; .* 8\.0"):
        jit.arch_of(6)


def test_codes_of_the_last_quantiser_of_a_stream_may_be_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(early_launch, "_under_way", {})
    codes = torch.zeros(4, 32, dtype=torch.int8)
    start = codes.data_ptr()
    early_launch.quantised(0, 7, codes)
    assert early_launch.may_be_under_way(0, 7, start)
    assert early_launch.may_be_under_way(0, 7, codes[1:].data_ptr())
    assert not early_launch.may_be_under_way(0, 7, start + codes.numel())
    assert not early_launch.may_be_under_way(0, 8, start)
    assert not early_launch.may_be_under_way(1, 7, start)
    early_launch.quantised(0, 7, torch.zeros(4, 32, dtype=torch.int8))
    assert not early_launch.may_be_under_way(0, 7, start)  # it waited for those before it
