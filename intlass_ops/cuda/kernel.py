"""A loaded kernel, and its launch: the hot end of every call. jit.py loads and remembers kernels.

    Kernel.bind(...)    a Launch: all but pointers and stream fixed, to be called often
    Kernel.launch(...)  enqueue once

A kernel's parameters travel as one flat image of 64-bit words: a pointer or `long long` is a word,
a struct is its words one after the other. CuPy's own Function makes several objects for each
parameter; a Launch has the table that the driver reads ready and fills in what has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import KernelLaunchError
from . import cubin, early_launch
from .source import KernelConfig

Dim3 = tuple[int, int, int]

FORKED = (
    "CUDA was in use in the parent process when this one was forked, and does not work here: start "
    'workers with the "spawn" or "forkserver" method of multiprocessing'
)
is_child_of_cuda_process = False  # jit.py's fork handler sets it


class Kernel:
    """A kernel loaded on one device; ``get`` makes them."""

    def __init__(
        self,
        config: KernelConfig,
        device_index: int,
        image: bytes,
        driver: Any,
        module: Any,
        *,
        starts_early: bool = False,
    ) -> None:
        """Loads ``image`` on the device that is current; CuPy's driver and an empty Module."""
        self.starts_early = starts_early
        self.config = config
        self.device_index = device_index
        self.parameter_sizes = cubin.parameter_sizes(image, config.entry)
        self.driver = driver
        self._module = module
        self._smem_lock = threading.Lock()
        self._module.load(image)
        self.function: int = self._module.get_function(config.entry).ptr
        self.context: int = self.driver.ctxGetCurrent()
        self._smem_limit = 0
        # The driver may put off loading a function until it first runs, and cannot do it while a
        # graph is being captured: asking for an attribute loads it now.
        self.num_registers: int = self.driver.funcGetAttribute(
            self.driver.CU_FUNC_ATTRIBUTE_NUM_REGS, self.function
        )

    def bind(
        self,
        grid: Dim3,
        block: Dim3,
        smem_bytes: int,
        args: bytes | Sequence[int],
        num_words: int = 0,
    ) -> Launch:
        """A launch with all of ``args`` fixed but for the first ``num_words`` words."""
        try:
            return Launch(self, grid, block, smem_bytes, self._image(args), num_words)
        except Exception as error:
            raise self.launch_error(grid, block, smem_bytes, error) from error

    def launch(
        self, grid: Dim3, block: Dim3, smem_bytes: int, args: bytes | Sequence[int], stream_ptr: int
    ) -> None:
        """Enqueue once on a stream of this kernel's device; another device may be current."""
        self.bind(grid, block, smem_bytes, args)((), stream_ptr)

    def _image(self, args: bytes | Sequence[int]) -> bytes:
        """Raises for another number of words than the kernel takes, and for what is no integer."""
        num_words = sum((size + 7) // 8 for size in self.parameter_sizes)
        if isinstance(args, bytes):
            if len(args) != 8 * num_words:
                raise ValueError(f"{len(args)} bytes of arguments for {8 * num_words}")
            return args
        if len(args) != num_words:
            raise ValueError(f"{len(args)} argument words for {num_words}")
        return struct.pack(f"={num_words}q", *args)

    def launch_error(
        self, grid: Dim3, block: Dim3, smem_bytes: int, error: Exception
    ) -> KernelLaunchError:
        return KernelLaunchError(
            f"{self.config!r} did not launch on cuda:{self.device_index} with grid={grid}, "
            f"block={block}, smem_bytes={smem_bytes}: {error}"
        )

    def allow_smem(self, smem_bytes: int) -> None:
        """Dynamic shared memory beyond 48 KiB must be asked for, once."""
        with self._smem_lock:
            if smem_bytes > self._smem_limit:
                attribute = self.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                with self.current():
                    self.driver.funcSetAttribute(self.function, attribute, smem_bytes)
                self._smem_limit = smem_bytes

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """This kernel's context, in place of another device's, or of none."""
        context = self.driver.ctxGetCurrent()
        self.driver.ctxSetCurrent(self.context)
        try:
            yield
        finally:
            self.driver.ctxSetCurrent(context)


class Launch:
    """A kernel with its grid and its arguments: what is left to a call is some words and a stream.

    Made by ``Kernel.bind`` once for each problem, called by any thread.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim3,
        block: Dim3,
        smem_bytes: int,
        image: bytes,
        num_words: int,
    ) -> None:
        self.kernel = kernel
        self._how = grid, block, smem_bytes
        self._image = image
        self._pack_into: Callable[..., None] = struct.Struct(f"={num_words}q").pack_into
        self._free: list[_Arguments] = []
        # What a call reads, next to it: an attribute of an attribute costs more than the copy.
        self._context = kernel.context
        self._device_index = kernel.device_index
        self._current_context: Callable[[], int] = kernel.driver.ctxGetCurrent
        self._in_order: Callable[[int, int, int], None] = functools.partial(
            kernel.driver.launchKernel, kernel.function, *grid, *block, smem_bytes
        )
        self._early: Callable[[int, int, int], None] = self._in_order
        if kernel.starts_early:
            self._early = early_launch.launcher(kernel.function, grid, block, smem_bytes)
        if smem_bytes:
            kernel.allow_smem(smem_bytes)

    def __call__(
        self, words: Sequence[int], stream_ptr: int, tail: bytes = b"", codes: int = 0
    ) -> None:
        """Enqueue on a stream of the kernel's device; another device may be current.

        ``words`` are the first words of the arguments, ``tail`` their last bytes (tensor maps).
        ``codes``: what a kernel that starts early reads before it waits for others, the address of
        a weight; if these are still being written, it starts after all before it have ended.
        """
        if is_child_of_cuda_process:
            raise KernelLaunchError(FORKED)
        # The driver copies the arguments before it returns, but other threads may run until then:
        # every launch under way has its own. list.pop and list.append are atomic.
        try:
            arguments = self._free.pop()
        except IndexError:
            arguments = _Arguments(self.kernel.parameter_sizes, self._image)
        try:
            self._pack_into(arguments.image, 0, *words)
            if tail:
                arguments.image[-len(tail) :] = tail
            launch = self._early
            if codes and early_launch.may_be_under_way(self._device_index, stream_ptr, codes):
                launch = self._in_order
            if self._current_context() == self._context:
                launch(stream_ptr, arguments.table, 0)
            else:  # another device's context, or none: autograd's threads start without
                with self.kernel.current():
                    launch(stream_ptr, arguments.table, 0)
        except Exception as error:
            raise self.kernel.launch_error(*self._how, error) from error
        finally:
            self._free.append(arguments)


class _Arguments:
    """Room for the parameters of one launch, and the table of their addresses the driver reads."""

    def __init__(self, sizes: tuple[int, ...], image: bytes) -> None:
        self.image = bytearray(image or bytes(8))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.image))
        addresses = []
        for size in sizes:
            addresses.append(address)
            address += (size + 7) // 8 * 8
        self._table = (ctypes.c_void_p * (len(sizes) or 1))(*addresses)
        self.table = ctypes.addressof(self._table)
