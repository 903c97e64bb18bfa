"""The ops on CPU tensors as on a GPU: the kernel that a GPU would be given, run by a Machine.

Checks, picks, plans and parameters are those of a call on a GPU. The driver is not, nor its tensor
maps, and tensors lie in a CPU's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from intlass_ops import config, cuda
from intlass_ops.cuda import arrivals, jit, kernel, tensor_map
from intlass_ops.cuda.compiler import compile_cubin
from intlass_ops.cuda.source import KernelConfig

from . import copies, text
from .machine import Machine
from .memory import Memory

# What an op calls on a CPU, and on a GPU: it takes the other's place.
_KERNELS = (
    ("matmul_kernels", "run_on_cpu", "run_on_cuda"),
    ("block_scaled_kernels", "_cpu", "_cuda"),
    ("fused_quantize", "_cpu", "_cuda"),
    ("mixed_mm", "_cpu", "_cuda"),
    ("quantize", "_dynamic_cpu", "_dynamic_cuda"),
    ("quantize_after", "_norm_cpu", "_norm_cuda"),
    ("quantize_after", "_silu_cpu", "_silu_cuda"),
)


@functools.lru_cache(maxsize=256)
def _program(c: KernelConfig, arch: str) -> text.Program:
    return text.parse(compile_cubin(c, arch.replace("sm_", "compute_")).decode())


class _Kernel:
    """In place of a jit.Kernel."""

    image_of = kernel.Kernel._image

    def __init__(self, c: KernelConfig, arch: str, ran: list[KernelConfig]) -> None:
        self.config, self.ran = c, ran
        self.program = _program(c, arch)
        self.parameter_sizes = tuple(size for _, size in self.program.parameters.values())

    def bind(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        smem_bytes: int,
        args: bytes | Sequence[int],
        num_words: int = 0,
    ) -> Any:
        image = kernel.Kernel._image(self, args)  # type: ignore[arg-type]

        def launch(words: Sequence[int], stream: int, tail: bytes = b"", codes: int = 0) -> None:
            parameters = bytearray(image or bytes(8))
            parameters[: 8 * len(words)] = np.array(
                [w & (1 << 64) - 1 for w in words], np.uint64
            ).tobytes()
            if tail:
                parameters[-len(tail) :] = tail
            assert len(words) == num_words
            self.ran.append(self.config)
            threads = block[0] * block[1] * block[2]
            assert threads == block[0]
            Machine(self.program, grid, threads, smem_bytes, bytes(parameters), _tensors()).run()

        return launch

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        smem_bytes: int,
        args: bytes | Sequence[int],
        stream: int,
    ) -> None:
        self.bind(grid, block, smem_bytes, args)((), stream)


def _tensors() -> Memory:
    """Whatever tensors there are."""
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage
    arrays = []
    for address, storage in storages.items():
        if address:
            room = (ctypes.c_uint8 * storage.nbytes()).from_address(address)
            arrays.append(np.frombuffer(room, np.uint8))
    return Memory(arrays)


@contextlib.contextmanager
def emulated(arch: str = "sm_80", **of_device: Any) -> Iterator[list[KernelConfig]]:
    """Ops on CPU tensors run the kernels that a GPU of ``arch`` would, here.

    Yields the configurations that were launched, in order. ``of_device``: fields of config.Device.
    """
    device = replace(config.device_of(arch), **of_device)
    ran: list[KernelConfig] = []
    modules = [
        importlib.import_module(f"{cuda.__name__}.{each.name}")
        for each in pkgutil.iter_modules(cuda.__path__)
    ]
    kept: list[Any] = []

    def counters(a: torch.Tensor, stream: int, count: int) -> tuple[int, torch.Tensor]:
        zeros = torch.zeros(count, dtype=torch.int32)
        kept.append(zeros)
        return zeros.data_ptr(), zeros

    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if name == "device_of":
                    stack.enter_context(mock.patch.object(module, name, return_value=device))
                elif name == "arrival_counters":
                    stack.enter_context(mock.patch.object(module, name, counters))
                elif name in ("_plans", "_made", "_decoders"):
                    stack.enter_context(mock.patch.object(module, name, {}))
                elif hasattr(value, "cache_clear"):
                    value.cache_clear()
                    stack.callback(value.cache_clear)
        stack.enter_context(
            mock.patch.object(jit, "get", lambda c, index: _Kernel(c, device.arch, ran))
        )
        stack.enter_context(mock.patch.object(arrivals, "arrival_counters", counters))
        stack.enter_context(mock.patch.object(tensor_map, "of_rows", copies.pack_map))
        stack.enter_context(
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0)
        )
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True, create=True))
        for module_name, on_cpu, on_cuda in _KERNELS:
            module = importlib.import_module(f"intlass_ops.ops.{module_name}")
            # The dispatcher has the functions themselves: they are given other code.
            old, new = getattr(module, on_cpu), getattr(module, on_cuda)
            stack.callback(setattr, old, "__code__", old.__code__)
            old.__code__ = new.__code__
        yield ran
        for zeros in kept:
            assert not zeros.any(), "arrival counters are left as they were"
