"""`intlass tune`: measure which configuration is fastest on this GPU, and keep it in a table.

Here: the command line, what is printed and written. Not here: the search (bench/tuning.py), what a
table is and which problem it serves (config/tuned.py).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import arguments, bench, config, provenance
from ..bench import tuning
from ..config import tuned
from ..cuda import jit, plans
from ..cuda.jit import availability
from ..errors import BackendUnavailableError

SHAPES = "4096x4096,6144x4096,28672x4096,4096x14336,8192x28672,57344x8192"
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
TUNE = """\
Time every legal kernel configuration of the given layers on this GPU, with cold weights in CUDA
graphs, and keep the fastest in a table that later processes choose by: numbers of tokens near a
measured one take its configuration, everything else is predicted as before.
Another configuration may sum in another order, so the last bits of results may change;
batch_invariant() ignores tables. Deleting the file undoes it.
"""
SCHEMES_HELP = (
    "w4a16z: with zero points; w4a8c: one scale a row; fp8a16g: groups of 128; nf4a16: of 64 "
    "(%(default)s)"
)
EPILOG = """\
examples:
  intlass tune                                      six layers of Llama models, minutes
  intlass tune --shapes 5120x5120 --schemes w4a16 --tokens 1,8,64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=SHAPES, help="layers as NxK,... (%(default)s)")
    parser.add_argument("--tokens", default=TOKENS, help="values of M (%(default)s)")
    parser.add_argument(
        "--schemes",
        default=",".join(tuning.SCHEMES),
        help=SCHEMES_HELP,
    )
    parser.add_argument(
        "--families",
        choices=("portable", "all"),
        default="all",
        help="portable: without the kernels of Hopper GPUs (%(default)s)",
    )
    parser.add_argument("--device", type=arguments.device, help="which GPU (the current one)")
    parser.add_argument(
        "--seconds",
        type=arguments.duration,
        default=0.01,
        help="for each of the fastest few (%(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=arguments.duration,
        help="begin no layer later than this (default: no limit)",
    )
    parser.add_argument(
        "--table", metavar="FILE", help="where to keep it (default: beside the compiled kernels)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the times of all candidates to FILE")


class Work(NamedTuple):
    """One layer in one scheme."""

    scheme: str
    n: int
    k: int


Timings = dict[config.Shape, list[tuning.Timed]]
# of one layer at all numbers of tokens
MeasureLayer = Callable[[Work, list[int]], Timings]


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 2 for arguments that make no sense."""
    try:
        work, tokens = list(work_of(options)), bench.parse_numbers(options.tokens)
        device = torch.device(options.device or "cuda")
        if device.type != "cuda":
            raise ValueError(f"--device {options.device} is no GPU")
    except ValueError as error:
        print(f"intlass tune: {error}", file=sys.stderr)
        return 2
    problem = availability().problem
    if problem is not None:
        raise BackendUnavailableError(f"{problem} (tuning measures kernels on an NVIDIA GPU)")
    deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    index = torch.cuda.current_device() if device.index is None else device.index
    gpu = plans.device_of(index)
    devices = _devices(gpu, options.families)
    with torch.cuda.device(index), torch.inference_mode():
        measure = _compiled(devices, work, tokens, options.seconds, torch.device("cuda", index))
        layers = tune(devices, work, tokens, measure, deadline)
    entries = [each for layer in layers for each in layer.entries]
    about = provenance.environment(torch.device("cuda", index))
    path = Path(options.table) if options.table else tuned.user_table(gpu.name)
    kept = keep(path, gpu.name, entries, about)
    gain = _mean_gain(entries)
    print(f"{len(entries)} problems, {gain:.1%} faster on average; {path}: {kept} entries")
    if options.json:
        problems = [row for layer in layers for row in layer.rows]
        provenance.write_json(options.json, about | {"problems": problems})
    return 0


def work_of(options: argparse.Namespace) -> Iterator[Work]:
    """Layers of ``--shapes``, each in all of ``--schemes``."""
    names = options.schemes.split(",")
    unknown = [name for name in names if name not in tuning.SCHEMES]
    if unknown:
        raise ValueError(f"--schemes {unknown[0]!r} is none of {', '.join(tuning.SCHEMES)}")
    largest = max(tuning.SCHEMES[name].group_size or 32 for name in names)
    for n, k in bench.parse_shapes(options.shapes, largest):
        yield from (Work(name, n, k) for name in names)


def _devices(gpu: config.Device, families: str) -> list[config.Device]:
    """Whose tables are filled: the GPU's own, and the same one's with portable kernels only."""
    portable = config.without_wgmma(gpu)
    return [portable] if families == "portable" else list(dict.fromkeys((gpu, portable)))


def _candidates(devices: list[config.Device], shape: config.Shape) -> list[config.Matmul]:
    """What is worth measuring, the predicted ones first."""
    found = [config.predicted(device, shape) for device in devices]
    for device in devices:
        for c in config.candidates(device, shape):
            if not (isinstance(c, config.Gemm) and config.is_idle(c, device, shape)):
                found.append(c)
    return list(dict.fromkeys(found))


def _compiled(
    devices: list[config.Device],
    work: list[Work],
    tokens: list[int],
    seconds: float,
    device: torch.device,
) -> MeasureLayer:
    """Compiles what is going to be measured, and returns what measures it."""
    shapes = [tuning.SCHEMES[w.scheme].shape(m, w.n, w.k) for w in work for m in tokens]
    configs = {c for shape in shapes for c in _candidates(devices, shape)}
    print(f"compiling {len(configs)} kernels for {len(shapes)} problems ...", flush=True)
    refused = tuning.compile_all(configs, jit.arch_of(device))
    for c, why in refused.items():
        print(f"left out: {c}: {why.splitlines()[0]}")

    def measure(w: Work, tokens: list[int]) -> Timings:
        layer = tuning.Layer(tuning.SCHEMES[w.scheme], w.n, w.k, device)
        found = {}
        for m in tokens:
            shape = layer.scheme.shape(m, w.n, w.k)
            predicted = {config.predicted(device, shape) for device in devices}
            usable = [c for c in _candidates(devices, shape) if c not in refused or c in predicted]
            found[shape] = tuning.search(usable, layer.measure(m), seconds)
        return found

    return measure


class Tuned(NamedTuple):
    """What came of one layer: entries for the table, and all times."""

    entries: list[tuned.Entry]
    rows: list[dict[str, Any]]


def tune(
    devices: list[config.Device],
    work: list[Work],
    tokens: list[int],
    measure: MeasureLayer,
    deadline: float,
) -> list[Tuned]:
    """Measure layer after layer and print what is found, until the clock reaches ``deadline``."""
    done: list[Tuned] = []
    for w in work:
        if time.monotonic() > deadline:
            print(f"{len(work) - len(done)} of {len(work)} layers are left out: time is up")
            break
        layer = Tuned([], [])
        for shape, timed in measure(w, tokens).items():
            found = [tuning.entry(device, shape, timed) for device in devices]
            layer.entries.extend(each for each in found if each is not None)
            rows = [{"us": round(t.us, 3), "kernel": str(t.config)} for t in timed]
            layer.rows.append({**w._asdict(), "m": shape.m, "candidates": rows})
            for device, each in zip(devices, found, strict=True):
                if each is not None:
                    print(
                        f"{w.scheme:7}{w.n:>6}x{w.k:<6}M={shape.m:<6}{device.arch:7}"
                        f"{each.predicted_us:9.1f} -> {each.us:9.1f} us  {_kernel(timed, each)}"
                    )
        sys.stdout.flush()
        done.append(layer)
    return done


def _kernel(timed: list[tuning.Timed], entry: tuned.Entry) -> str:
    of = (entry.kernel, entry.tile)
    return next(str(t.config) for t in timed if (t.config.entry, tuned.tile_of(t.config)) == of)


def keep(path: Path, name: str, entries: list[tuned.Entry], about: dict[str, Any]) -> int:
    """Write a table, with what it held of other problems. Returns the number of its entries."""
    before: list[tuned.Entry] = []
    if path.is_file():
        try:
            before = [each for each in tuned.read(path, name) if tuned.is_current(each)]
        except (OSError, ValueError) as error:
            print(f"{path} is replaced: {error}")
    together = {(e.of, e.m): e for e in (*before, *entries)}
    tuned.write(path, name, together.values(), about)
    tuned.forget()
    return len(together)


def _mean_gain(entries: list[tuned.Entry]) -> float:
    gains = [e.predicted_us / e.us - 1 for e in entries]
    return sum(gains) / len(gains) if gains else 0.0
