"""The command line: `python -m intlass_ops` (or `intlass`) with a subcommand.

Lives here: the list of subcommands and `info`. Not here: what they do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__, demo
from .cpu import compiler
from .cuda.cache import default_directory


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="intlass", description="INT4 and INT8 linear layers for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"intlass_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="a 4-bit language model writes text")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    command = commands.add_parser("info", help="what this machine offers to run on")
    command.set_defaults(run=info)

    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    return code


def info(_options: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    rows = [
        ("intlass_ops", __version__),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}"),
        ("triton", _version("triton")),
        ("cupy", _version("cupy-cuda12x", "cupy-cuda13x")),
        ("nvrtc", _version("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")),
        ("transformers", _version("transformers")),
        ("model", _version(demo.MODEL_PACKAGE)),
        ("C++ compiler", compiler() or "none (CPU: apt-get install g++)"),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("kernel cache", str(default_directory())),
    ]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        rows.append((f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    if not torch.cuda.is_available():
        rows.append(("cuda", "no usable GPU: everything runs on the CPU"))
    for name, value in rows:
        print(f"{name:<14}{value}")
    return 0


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{importlib.metadata.version(name)} ({name})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


if __name__ == "__main__":
    sys.exit(main())
