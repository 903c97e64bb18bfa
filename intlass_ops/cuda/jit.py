"""Compiled kernels on a GPU: load, remember, launch, warm up.

    get(config, device_index)    the loaded Kernel, remembered
    Kernel.launch(...)           enqueue on a stream: some microseconds of Python
    arch_of(device)              what to compile for
    warmup(configs)              compile and load ahead

The only file that calls CUDA's driver, through CuPy (cupy_backends and cupy.cuda.function, checked
on CuPy 14.2 for CUDA 12 and 13). What compiles is compiler.py, what decides the launch launch.py.

A kernel's parameters travel as one flat image of 64-bit words: a pointer or `long long` is a word,
a struct is its words one after the other. CuPy's own Function makes several objects for each
parameter; Kernel has the table that the driver reads ready and only fills the words in.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch

from ..errors import BackendUnavailableError, KernelLaunchError, KernelNotReadyError
from . import compiler, cubin, toolkit
from .compiler import compile_cubin as compile_cubin
from .source import KernelConfig
from .toolkit import Availability as Availability
from .toolkit import availability as availability

Dim3 = tuple[int, int, int]

_kernels: dict[tuple[KernelConfig, int], Kernel] = {}
_load_lock = threading.Lock()


def get(config: KernelConfig, device_index: int) -> Kernel:
    """The kernel of ``config`` on a device: at once if it is loaded there, else made ready."""
    kernel = _kernels.get((config, device_index))
    return kernel if kernel is not None else _load(config, device_index)


class Kernel:
    """A kernel loaded on one device; ``get`` makes them."""

    def __init__(self, config: KernelConfig, device_index: int, image: bytes) -> None:
        """Loads ``image`` on the device that is current."""
        self.config = config
        self.device_index = device_index
        self._parameter_sizes = cubin.parameter_sizes(image, config.entry)
        self._driver = _cupy("cupy_backends.cuda.api.driver")
        self._module = _cupy("cupy.cuda.function").Module()
        self._module.load(image)
        self._function: int = self._module.get_function(config.entry).ptr
        self._context: int = self._driver.ctxGetCurrent()
        self._current_context: Callable[[], int] = self._driver.ctxGetCurrent
        self._launch_kernel: Callable[..., None] = self._driver.launchKernel
        self._smem_limit = 0
        self._free_arguments: list[_Arguments] = []
        # The driver may put off loading a function until it first runs, and cannot do it while a
        # graph is being captured: asking for an attribute loads it now.
        self.num_registers: int = self._driver.funcGetAttribute(
            self._driver.CU_FUNC_ATTRIBUTE_NUM_REGS, self._function
        )

    def launch(
        self, grid: Dim3, block: Dim3, smem_bytes: int, args: bytes | Sequence[int], stream_ptr: int
    ) -> None:
        """Enqueue on a stream of this kernel's device; another device may be current."""
        if _is_child_of_cuda_process:
            raise KernelLaunchError(_FORKED)
        context = self._current_context()
        if context == self._context:
            self._launch(grid, block, smem_bytes, args, stream_ptr)
            return
        # Another device's context, or none: autograd's threads start without.
        self._driver.ctxSetCurrent(self._context)
        try:
            self._launch(grid, block, smem_bytes, args, stream_ptr)
        finally:
            self._driver.ctxSetCurrent(context)

    def _launch(
        self, grid: Dim3, block: Dim3, smem_bytes: int, args: bytes | Sequence[int], stream_ptr: int
    ) -> None:
        # The driver copies the arguments before it returns, but other threads may run until then:
        # every launch under way has its own. list.pop and list.append are atomic.
        try:
            arguments = self._free_arguments.pop()
        except IndexError:
            arguments = _Arguments(self._parameter_sizes)
        try:
            arguments.fill(args)
            if smem_bytes > self._smem_limit:
                self._raise_smem_limit(smem_bytes)
            self._launch_kernel(
                self._function, *grid, *block, smem_bytes, stream_ptr, arguments.table, 0
            )
        except Exception as error:
            raise KernelLaunchError(
                f"{self.config!r} did not launch on cuda:{self.device_index} with grid={grid}, "
                f"block={block}, smem_bytes={smem_bytes}: {error}"
            ) from error
        finally:
            self._free_arguments.append(arguments)

    def _raise_smem_limit(self, smem_bytes: int) -> None:
        """Dynamic shared memory beyond 48 KiB must be asked for, once."""
        with _load_lock:
            if smem_bytes > self._smem_limit:
                attribute = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._driver.funcSetAttribute(self._function, attribute, smem_bytes)
                self._smem_limit = smem_bytes


class _Arguments:
    """Room for the parameters of one launch, and the table of their addresses the driver reads."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        words = [(size + 7) // 8 for size in sizes]
        self._num_words = sum(words)
        self._num_bytes = 8 * self._num_words
        self._image = bytearray(self._num_bytes or 8)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._image))
        addresses = [start + 8 * sum(words[:i]) for i in range(len(words))]
        self._table = (ctypes.c_void_p * (len(words) or 1))(*addresses)
        self.table = ctypes.addressof(self._table)
        pack = struct.Struct(f"={self._num_words}q").pack_into
        self._pack: Callable[..., None] = functools.partial(pack, self._image, 0)

    def fill(self, args: bytes | Sequence[int]) -> None:
        """Raises for another number of words than the kernel takes, and for what is no integer."""
        if isinstance(args, bytes):
            if len(args) != self._num_bytes:
                raise ValueError(f"{len(args)} bytes of arguments for {self._num_bytes}")
            self._image[: self._num_bytes] = args
        else:
            if len(args) != self._num_words:
                raise ValueError(f"{len(args)} argument words for {self._num_words}")
            self._pack(*args)


def _load(config: KernelConfig, device_index: int) -> Kernel:
    if _is_child_of_cuda_process:
        raise KernelLaunchError(_FORKED)
    problem = availability().problem
    if problem is not None:
        raise BackendUnavailableError(problem)
    with torch.cuda.device(device_index):
        if torch.cuda.is_current_stream_capturing():
            raise KernelNotReadyError(
                f"{config!r} is not loaded on cuda:{device_index}, and cannot be while a CUDA "
                f"graph is being captured: run the model once before the capture, or call "
                f"intlass_ops.warmup([config], device={device_index})"
            )
    image = compiler.compile_cubin(config, arch_of(device_index))
    driver = _cupy("cupy_backends.cuda.api.driver")
    runtime = _cupy("cupy_backends.cuda.api.runtime")
    with _load_lock:
        kernel = _kernels.get((config, device_index))
        if kernel is None:
            # Back by the context: cudaSetDevice on the way back would start the default device up
            # on a thread that had none current.
            context = driver.ctxGetCurrent()
            runtime.setDevice(device_index)
            try:
                runtime.memGetInfo()  # any call that needs a context makes the device's current
                kernel = _kernels[config, device_index] = Kernel(config, device_index, image)
            finally:
                driver.ctxSetCurrent(context)
    return kernel


def allocate_zeroed(device_index: int, num_bytes: int) -> int:
    """Address of zeroed memory that is never freed and belongs to no pool of PyTorch's.

    For what outlives a call: a tensor made while CUDA graphs are warmed up or captured would lie in
    the graph's pool. Not during a capture, which allocation would break.
    """
    driver = _cupy("cupy_backends.cuda.api.driver")
    runtime = _cupy("cupy_backends.cuda.api.runtime")
    context = driver.ctxGetCurrent()
    runtime.setDevice(device_index)
    try:
        address: int = runtime.malloc(num_bytes)
        runtime.memset(address, 0, num_bytes)
        runtime.deviceSynchronize()
    finally:
        driver.ctxSetCurrent(context)
    return address


def _cupy(module: str) -> Any:
    """A module of CuPy, which has no type stubs and is first imported when a GPU is used."""
    return importlib.import_module(module)


# ------------------------------------------------------------------------------------- devices


def arch_of(device: torch.device | int | str) -> str:
    """What to compile for: "sm_80", "sm_90a", "sm_120"; "compute_XX" for GPUs unknown to NVRTC."""
    return _arch_of(_index_of(device))


@functools.cache
def _arch_of(index: int) -> str:
    problem = toolkit.unsupported(index)
    if problem is not None:
        raise BackendUnavailableError(problem)
    return compiler.arch_of_capability(*torch.cuda.get_device_capability(index))


def _index_of(device: torch.device | int | str) -> int:
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r} is not a CUDA device")
    return torch.cuda.current_device() if device.index is None else device.index


# ------------------------------------------------------------------------------------------ fork

_FORKED = (
    "CUDA was in use in the parent process when this one was forked, and does not work here: start "
    'workers with the "spawn" or "forkserver" method of multiprocessing'
)
_was_cuda_in_use = False
_is_child_of_cuda_process = False


def _before_fork() -> None:
    global _was_cuda_in_use
    _was_cuda_in_use = bool(_kernels) or bool(torch.cuda.is_initialized())


def _after_fork_in_child() -> None:
    global _is_child_of_cuda_process, _load_lock
    _is_child_of_cuda_process |= _was_cuda_in_use
    _load_lock = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


# --------------------------------------------------------------------------------------- warm up


class WarmedUp(NamedTuple):
    compiled: int
    cached: int


_Built = Future[tuple[bytes, bool]]


def warmup(
    configs: Iterable[KernelConfig],
    *,
    device: torch.device | int | str | None = None,
    arch: str | None = None,
    progress: bool = True,
) -> WarmedUp:
    """Compile ``configs`` in parallel and load them on ``device`` (the current one by default).

    With ``arch`` ("sm_90a") in place of a device they are only compiled, which needs no GPU. Shows
    a progress bar on a terminal if `rich` is installed. Returns how many NVRTC compiled, and how
    many it had compiled before.
    """
    if device is not None and arch is not None:
        raise ValueError(f"warmup: device={device} and arch={arch!r} exclude each other")
    index = None
    if arch is None:
        problem = availability().problem
        if problem is not None:
            raise BackendUnavailableError(
                f"warmup: {problem} (to compile without a GPU, name what for: arch='sm_90a')"
            )
        index = _index_of("cuda" if device is None else device)
        arch = arch_of(index)
    unique = list(dict.fromkeys(configs))
    num_threads = max(1, min(len(unique), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(num_threads) as pool:  # NVRTC drops the GIL, and runs beside itself
        futures = [pool.submit(compiler.compile_or_load, config, arch) for config in unique]
        try:
            done = _with_progress_bar(as_completed(futures), len(futures), progress)
            compiled = sum(future.result()[1] for future in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if index is not None:
        for config in unique:
            get(config, index)
    return WarmedUp(compiled, len(unique) - compiled)


def _with_progress_bar(done: Iterator[_Built], total: int, progress: bool) -> Iterable[_Built]:
    if progress and total and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            return done
        return track(done, "Compiling CUDA kernels", total, console=Console(stderr=True))
    return done
