"""Compiled kernels on a GPU: load, remember, warm up.

    get(config, device_index)    the loaded Kernel, remembered; kernel.py launches it
    arch_of(device)              what to compile for
    warmup(configs)              compile and load ahead

With kernel.py the only file that calls CUDA's driver, through CuPy (cupy_backends and
cupy.cuda.function, checked on CuPy 14.2 for CUDA 12 and 13). What compiles is compiler.py, what
decides the launch launch.py.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch

from ..errors import BackendUnavailableError, KernelLaunchError, KernelNotReadyError
from . import compiler, kernel, toolkit
from .compiler import compile_cubin as compile_cubin
from .kernel import Kernel as Kernel
from .source import KernelConfig
from .toolkit import Availability as Availability
from .toolkit import availability as availability
from .toolkit import cupy_module

_kernels: dict[tuple[KernelConfig, int], Kernel] = {}
_load_lock = threading.Lock()


def get(config: KernelConfig, device_index: int) -> Kernel:
    """The kernel of ``config`` on a device: at once if it is loaded there, else made ready."""
    loaded = _kernels.get((config, device_index))
    return loaded if loaded is not None else _load(config, device_index)


def _load(config: KernelConfig, device_index: int) -> Kernel:
    if kernel.is_child_of_cuda_process:
        raise KernelLaunchError(kernel.FORKED)
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
    driver = cupy_module("cupy_backends.cuda.api.driver")
    runtime = cupy_module("cupy_backends.cuda.api.runtime")
    with _load_lock:
        loaded = _kernels.get((config, device_index))
        if loaded is None:
            # Back by the context: cudaSetDevice on the way back would start the default device up
            # on a thread that had none current.
            context = driver.ctxGetCurrent()
            runtime.setDevice(device_index)
            try:
                runtime.memGetInfo()  # any call that needs a context makes the device's current
                module = cupy_module("cupy.cuda.function").Module()
                starts_early = getattr(config, "starts_early", False) and (
                    torch.cuda.get_device_capability(device_index) >= (9, 0)
                )
                loaded = Kernel(
                    config, device_index, image, driver, module, starts_early=starts_early
                )
                _kernels[config, device_index] = loaded
            finally:
                driver.ctxSetCurrent(context)
    return loaded


def allocate_zeroed(device_index: int, num_bytes: int) -> int:
    """Address of zeroed memory that is never freed and belongs to no pool of PyTorch's.

    For what outlives a call: a tensor made while CUDA graphs are warmed up or captured would lie in
    the graph's pool. Not during a capture, which allocation would break.
    """
    driver = cupy_module("cupy_backends.cuda.api.driver")
    runtime = cupy_module("cupy_backends.cuda.api.runtime")
    context = driver.ctxGetCurrent()
    runtime.setDevice(device_index)
    try:
        address: int = runtime.malloc(num_bytes)
        runtime.memset(address, 0, num_bytes)
        runtime.deviceSynchronize()
    finally:
        driver.ctxSetCurrent(context)
    return address


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

_was_cuda_in_use = False


def _before_fork() -> None:
    global _was_cuda_in_use
    _was_cuda_in_use = bool(_kernels) or bool(torch.cuda.is_initialized())


def _after_fork_in_child() -> None:
    global _load_lock
    kernel.is_child_of_cuda_process |= _was_cuda_in_use
    _load_lock = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


# --------------------------------------------------------------------------------------- warm up


class WarmedUp(NamedTuple):
    compiled: int
    cached: int


_Built = Future[tuple[bytes, bool]]
_MOST_COMPILERS = 16


def warmup(
    configs: Iterable[KernelConfig],
    *,
    device: torch.device | int | str | None = None,
    arch: str | None = None,
    progress: bool = True,
) -> WarmedUp:
    """Compile ``configs`` in parallel and load them on ``device`` (the current one by default).

    They are configurations as `intlass_ops.config` makes and picks them; the command `intlass
    warmup` compiles `config.shipped_configs()`, and the first call of a model compiles its own.
    With ``arch`` ("sm_90a") in place of a device they are only compiled, which needs no GPU. Shows
    a progress bar on a terminal if `rich` is installed. Returns how many NVRTC compiled, and how
    many it had compiled before.

    >>> from intlass_ops import config
    >>> picked = config.pick_widen(config.device_of('sm_120'), 's4', True, 16, 2048, False)
    >>> warmup([picked], arch='sm_80').compiled in (0, 1)  # 0: it was in the cache
    True
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
    # NVRTC drops the GIL, and runs beside itself; 64 threads in each of 12 processes crashed in it.
    num_threads = max(1, min(len(unique), len(os.sched_getaffinity(0)), _MOST_COMPILERS))
    with ThreadPoolExecutor(num_threads) as pool:
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
