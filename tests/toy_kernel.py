"""A small kernel with headers, a Config and a struct parameter, for the tests of cuda/*.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest

from intlass_ops.cuda import source


@dataclasses.dataclass(frozen=True)
class AddConfig:
    source: ClassVar[str] = "add.cu"
    entry: ClassVar[str] = "add"
    x_type: str = "__nv_bfloat16"
    offset: int = 1
    negate: bool = False


ADD_CU = """
#include "outer.cuh"
#include "scale.cuh"
struct alignas(64) Descriptor { unsigned long long words[16]; };
extern "C" __global__ void add(const Config::x_type* x, float* y, long long n,
                               const __grid_constant__ Descriptor d) {
  for (long long i = threadIdx.x; i < n; i += blockDim.x)
    y[i] = scaled(float(x[i])) + Config::offset + d.words[0];
}
"""
SCALE_CUH = """#pragma once
__device__ inline float scaled(float x) { return Config::negate ? -x : x; }
"""


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ``tmp_path`` the home of the kernel sources, and of an empty cache."""
    folder = tmp_path / "package" / "cuda"
    folder.mkdir(parents=True)
    (folder / "add.cu").write_text(ADD_CU)
    (folder / "scale.cuh").write_text(SCALE_CUH)
    (folder / "outer.cuh").write_text('#pragma once\n#include "scale.cuh"\n#include "outer.cuh"\n')
    monkeypatch.setattr(source, "SOURCE_DIR", folder)
    monkeypatch.setenv("INTLASS_CACHE_DIR", str(tmp_path / "cache"))
    return folder
