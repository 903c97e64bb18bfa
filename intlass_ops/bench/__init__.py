"""`intlass bench`: our kernels beside what else multiplies the same layers on this machine.

Lives here: the command line. Not here: who takes part (contenders.py, models.py), how a time is
taken (timing.py), what is printed and written (report.py).
"""

from __future__ import annotations

import argparse

from .. import arguments

SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336"
TOKENS = "1,16,64,256,1024,4096"
CPU_SHAPES = "1536x512,2048x2048"
CPU_TOKENS = "1,16,64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("gemm", "pipeline", "model"),
        help="gemm: one product, operands quantised before; pipeline: from 16-bit activations on; "
        "model: a Llama with random weights writes and reads tokens under torch.compile",
    )
    parser.add_argument("--shapes", help=f"layers as NxK,... ({SHAPES}; on a CPU {CPU_SHAPES})")
    parser.add_argument("--tokens", help=f"values of M ({TOKENS}; on a CPU {CPU_TOKENS})")
    parser.add_argument("--only", help="contenders, by parts of their names: w4a16,dense")
    parser.add_argument(
        "--layers", type=arguments.positive, default=4, help="model: its layers (%(default)s)"
    )
    parser.add_argument(
        "--hidden", type=arguments.positive, help="model: its width (4096; on a CPU 512)"
    )
    parser.add_argument(
        "--device",
        type=arguments.device,
        help="cpu, cuda, cuda:1 (default: a GPU, if there is one)",
    )
    parser.add_argument(
        "--seconds",
        type=arguments.duration,
        default=0.2,
        help="at least so long for each figure (%(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--png", metavar="FILE", help="plot time against M (needs matplotlib)")


def parse_shapes(text: str, multiple: int) -> list[tuple[int, int]]:
    """Layers of ``--shapes``, K a multiple of what their groups need."""
    shapes = []
    for each in text.split(","):
        n, x, k = each.partition("x")
        if not (x and n.isdigit() and k.isdigit()):
            raise ValueError(f"--shapes takes NxK,NxK,...; {each!r} is none")
        if int(k) % multiple or not int(n) * int(k):
            raise ValueError(f"--shapes {each}: K={k} is not a multiple of {multiple}")
        shapes.append((int(n), int(k)))
    return shapes


def parse_numbers(text: str) -> list[int]:
    """Numbers of ``--tokens``."""
    if not all(each.isdigit() and int(each) for each in text.split(",")):
        raise ValueError(f"--tokens takes positive numbers: 1,16,256; not {text!r}")
    return [int(each) for each in text.split(",")]


def run(options: argparse.Namespace) -> int:
    """Returns 0, 1 if a contender computed something wrong, 2 if it could not start."""
    try:
        from .report import run as compare
    except ImportError as error:
        print(f"intlass bench needs {error.name}: pip install 'intlass-ops[demo]'")
        return 2
    return compare(options)
