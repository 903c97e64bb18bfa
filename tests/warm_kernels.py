"""Compiles the kernels of the common GPU tests in parallel, before the first of them runs.

Each kernel costs NVRTC up to seconds on one core. The calls themselves say which kernels they need:
they are made once with a stand-in that notes the configuration in place of launching it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import strategies
import torch
from gemm_case import build

from intlass_ops import quantize_, quantize_int4, quantize_int8
from intlass_ops.cuda import jit, launch, launch_quantize, launch_widen


@functools.cache
def compile_common_kernels() -> None:
    cases = (
        strategies.cover,
        strategies.dtype_cases,
        strategies.table_cases,
        strategies.identity_cases,
        strategies.long_cases,
        strategies.nf4_cases,
        strategies.special_cases,
        strategies.random_gpu_cases,
        strategies.gpu_cases,
        strategies.epilogue_cases,
    )
    calls = [build(case, "cuda").run for make in cases for case in make()]
    for shape, granularity, group_size in strategies.QUANTIZED_SHAPES:
        for dtype, symmetric in itertools.product(strategies.FLOATS, (True, False)):
            x = torch.zeros(shape, dtype=dtype, device="cuda")
            options = {"granularity": granularity, "group_size": group_size, "symmetric": symmetric}
            calls += [functools.partial(q, x, **options) for q in (quantize_int8, quantize_int4)]
    for scheme, dtype in itertools.product(strategies.SCHEMES.values(), strategies.FLOATS):
        layer = torch.nn.Sequential(torch.nn.Linear(64, 96)).to("cuda", dtype)
        quantize_(layer, scheme)
        calls += [functools.partial(layer, layer[0].bias.new_zeros(m, 64)) for m in (8, 15, 300)]
    noted: dict[Any, None] = {}

    class Note:
        def launch(self, *_: object) -> None:
            pass

        def bind(self, *_: object) -> Callable[..., None]:
            return self.launch

    def note(config: Any, _device_index: int) -> Note:
        noted[config] = None
        return Note()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "get", note)
        for module in (launch, launch_quantize, launch_widen):
            patch.setattr(module, "_plans", {})  # they hold launches that do nothing
        for call in calls:
            call()
    jit.warmup(list(noted), progress=False)
