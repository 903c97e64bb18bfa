"""`intlass warmup`: compile the kernels of given layers, so that no later process waits for them.

Here: the command line, and which kernels the calls of a layer run. Not here: how they are compiled
(cuda/jit.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import bench, config
from ..bench import tuning
from ..cuda import jit, plans
from ..cuda.jit import availability
from ..errors import BackendUnavailableError, KernelCompileError
from . import tune

WARMUP = """\
Compile the CUDA kernels of given layers into the kernel cache, so that no later process has to:
bf16 activations and output, weights in groups of 128 with scales in bf16 or, INT8 and w4a8c, with
one scale a row in float32. Takes a few seconds a kernel; needs a GPU unless --arch names what to
compile for. Whatever else a model calls is compiled when it first does, once on a machine.
"""
EPILOG = """\
examples:
  intlass warmup                                    six layers of Llama models, minutes
  intlass warmup --shapes 5120x5120 --schemes w4a16z --tokens 1,8,64
  intlass warmup --arch sm_90a --gpu "NVIDIA H200"  where there is none, as in building an image
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=tune.SHAPES, help="layers as NxK,... (%(default)s)")
    parser.add_argument("--tokens", default=tune.TOKENS, help="values of M (%(default)s)")
    parser.add_argument("--schemes", default=",".join(tuning.SCHEMES), help=tune.SCHEMES_HELP)
    parser.add_argument("--arch", help=f"{', '.join(config.ARCHS)} (this GPU's)")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="with --arch: as the driver names it, for GPUs with a table of measured kernels",
    )


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 2 for arguments that make no sense."""
    try:
        work, tokens = list(tune.work_of(options)), bench.parse_numbers(options.tokens)
    except ValueError as error:
        print(f"intlass warmup: {error}", file=sys.stderr)
        return 2
    gpu = _gpu(options.arch, options.gpu)
    found = {c for w in work for m in tokens for c in kernels(gpu, w, m)}
    done = jit.warmup(found, arch=gpu.arch)
    print(f"{gpu.arch}: {done.compiled} kernels compiled, {done.cached} were there before")
    return 0


def _gpu(arch: str | None, name: str | None) -> config.Device:
    if arch is not None:
        if arch not in config.ARCHS:
            raise KernelCompileError(f"no kernels are shipped for {arch!r}")
        return replace(config.device_of(arch), name=name or "")
    problem = availability().problem
    if problem is not None:
        raise BackendUnavailableError(
            f"{problem} (to compile without a GPU, name what for: --arch sm_90a)"
        )
    return plans.device_of(torch.cuda.current_device())


def kernels(gpu: config.Device, layer: tune.Work, m: int) -> Iterator[config.Config]:
    """What one call of ``layer`` with m tokens runs, its dynamic quantiser included."""
    shape = tuning.SCHEMES[layer.scheme].shape(m, layer.n, layer.k)
    c = config.pick(gpu, shape)
    bits, lanes = config.BITS[shape.x_kind], config.takes_lanes(gpu, shape)
    if bits < 16:
        rows = "__nv_bfloat16", bits, True, False, 8, m, layer.k
        yield config.pick_quantize(gpu, *rows, lanes=lanes)
    if lanes:
        c = config.in_lane_order(c, layer.k, True)
    if config.widens(gpu, shape.x_kind):
        packed = config.of_int4(c, layer.k)
        if packed is None:
            c = config.in_lane_order(c, layer.k, True)
            lane_order = isinstance(c, config.Hopper) and c.lane_order
            yield config.pick_widen(gpu, shape.x_kind, True, m, layer.k // 2, lane_order)
        c = packed or c
    if isinstance(c, config.Hopper) and c.needs_token_sums:
        yield config.TokenSums(c.x_kind, c.block_k // c.groups_per_tile)
    yield c
