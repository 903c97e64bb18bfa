"""Predicted times on GPUs that nobody here has: A100, RTX A6000, RTX 4090, from the machine code.

The kernels that `config.pick` gives such a GPU are compiled for it and disassembled; instructions
of the main loop are counted by the unit that executes them. For the busiest SM that gives the
cycles of each unit; beside them stand the bytes out of L2 and out of memory. Units overlap in part:

    time = launch + (sum over units of t_unit^p)^(1/p) + turn * turns
    t_unit = cycles * (1 + idle / warps of the SM)

where turns is how often an SM fills with blocks one after another.

p (one for few tokens, one for many), idle, launch and turn are fitted to H200 measurements of the
portable kernels, and nothing else is; the error is that of the fit. Rates are NVIDIA's (CUDA C++
Programming Guide, "Arithmetic Instructions"; architecture white papers), for the H200 what its
register loops reached. Not modelled: clocks that power lowers, and how well a smaller L2 serves.

    python benchmarks/paper_model.py        needs no GPU; compiles ~200 kernels the first time
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from sass_counts import Kernel, Kernels
from scipy.optimize import least_squares

from intlass_ops import config
from intlass_ops.bench.tuning import SCHEMES

RESULTS = Path(__file__).parent / "results"
SHAPES = ((4096, 4096), (28672, 4096))
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROWS = {
    "intlass_w4a16_sm80": "w4a16",
    "intlass_w8a16_sm80": "w8a16",
    "intlass_w8a8_sm80": "w8a8",
    "intlass_w4a8_g128_sm80": "w4a8",
    "intlass_w4a8_chn_sm80": "w4a8c",
    "intlass_w4a4_sm80": "w4a4",
}
# A neighbour's figures (triton_mixed_mm's own, RTX A6000, 4096x4096, g = 128, bf16): microseconds
A6000_TOKENS = (16, 32, 128, 512, 1024)
A6000 = {
    "dequantise, then bf16": (267.5, 266.9, 268.9, 362.8, 513.3),
    "triton_mixed_mm": (63.3, 70.4, 96.0, 236.9, 475.3),
    "tinygemm": (38.2, 64.9, 252.3, 1089.0, 2200.0),
}


@dataclass(frozen=True)
class Gpu:
    """Rates for each SM and cycle, but for memory."""

    arch: str
    sm_count: int
    ghz: float  # boost
    memory_gb: float  # GB/s that a reader gets
    macs: tuple[int, int, int]  # 16-bit with fp32 sums, int8, int4
    fp32: int  # results
    half2: int
    registers: int = 65536
    warps: int = 48

    @property
    def device(self) -> config.Device:
        return config.without_wgmma(config.device_of(self.arch, self.sm_count))


_READER = 0.93  # of the nominal bandwidth, as a reader reached on the H200
GPUS = {
    "H200": Gpu("sm_90a", 132, 1.83, 4500, (1298, 2575, 2575), 128, 128, warps=64),
    "A100 40 GB": Gpu("sm_80", 108, 1.41, 1555 * _READER, (1024, 2048, 4096), 64, 128, warps=64),
    "RTX A6000": Gpu("sm_86", 84, 1.80, 768 * _READER, (512, 1024, 2048), 128, 64),
    "RTX 4090": Gpu("sm_89", 128, 2.52, 1008 * _READER, (256, 1024, 2048), 128, 64),
}
_L2_BYTES = 64  # for each SM and cycle
_SMEM_BYTES = 128


class Hiding(NamedTuple):
    """What the busiest SM has to hide latencies with."""

    few: bool  # a kernel for few tokens
    turns: int  # how often it fills with blocks
    warps: int


# Microseconds of each unit of the busiest SM; of L2 or memory, whichever takes longer
Problem = tuple[dict[str, float], tuple[str, float], Hiding]


def problem_of(gpu: Gpu, c: config.Matmul, kernel: Kernel, m: int, n: int, k: int) -> Problem:
    bits_x, bits_w = config.BITS[c.x_kind], config.BITS[c.w_kind]
    split = c.split_k if isinstance(c, config.Gemm) else 1
    if isinstance(c, config.Gemm):
        block_m, block_n, blocks = c.block_m, c.block_n, c.tiles(m, n) * split
    elif isinstance(c, config.Skinny):
        block_m, block_n = 8 * c.tiles_m, 16 * c.tiles_n
        blocks = math.ceil(n / block_n)
    else:  # its blocks stay: the tiles of its groups count, two to eight at a time
        assert isinstance(c, config.SkinnyRing | config.SkinnyHeld)
        groups = c.groups if isinstance(c, config.SkinnyRing) else c.warps // c.k_warps
        block_m, block_n = 8 * math.ceil(c.tokens / 8), 16 * c.tiles_n * groups
        blocks = math.ceil(n / block_n)
    smem = c.smem_bytes if isinstance(c, config.Gemm | config.Skinny) else c.smem_of(n, k)
    warps = c.threads // 32
    resident = min(
        gpu.warps // warps,
        gpu.registers // (max(kernel.registers, 1) * c.threads),
        gpu.device.smem_per_sm // (smem + 1024),
    )
    on_busiest = math.ceil(blocks / gpu.sm_count)
    mmas = block_m / 8 * block_n / 16 * math.ceil(k / split / kernel.mma_k) * on_busiest
    kind = 0 if kernel.mma_k == 16 else 1 if kernel.mma_k == 32 else 2
    lanes = {"half2": gpu.half2, "fp32": gpu.fp32, "imad": 64, "convert": 16, "alu": 64}
    cycles = {unit: kernel.counts.get(unit, 0) * 32 / rate for unit, rate in lanes.items()}
    cycles["fp32"] += cycles.pop("half2") + cycles.pop("imad")  # one pipe
    cycles |= {
        "mma": 16 * 8 * kernel.mma_k / gpu.macs[kind],
        "issue": kernel.counts["issue"] / 4,
        "shared memory": kernel.counts.get("bytes", 0) / _SMEM_BYTES,
    }
    found = {unit: each * mmas / gpu.ghz / 1e3 for unit, each in cycles.items()}
    tile_bytes = (min(block_m, m) * bits_x + block_n * bits_w) * k / split / 8
    l2 = blocks * tile_bytes / (_L2_BYTES * gpu.sm_count * gpu.ghz * 1e3)
    memory = (n * k * bits_w + m * k * bits_x + 16 * m * n) / 8 / gpu.memory_gb / 1e3
    hiding = Hiding(
        few=not isinstance(c, config.Gemm),
        turns=math.ceil(on_busiest / max(resident, 1)),
        warps=warps * min(max(resident, 1), on_busiest),
    )
    # the same bytes pass through both
    return found, ("L2", l2) if l2 > memory else ("memory", memory), hiding


def predict(parameters: Any, problem: Problem) -> tuple[float, str]:
    """Microseconds, and the unit that is busy for the longest."""
    units, (level, moving), hiding = problem
    few, many, idle, launch, turn = parameters
    p = few if hiding.few else many
    busy = {unit: us * (1 + idle / hiding.warps) for unit, us in units.items()} | {level: moving}
    together = sum(us**p for us in busy.values()) ** (1 / p)
    return float(launch + together + turn * hiding.turns), max(busy, key=lambda unit: busy[unit])


def measured(path: Path) -> Iterator[tuple[str, int, int, int, float]]:
    """(scheme, M, N, K, microseconds) of the portable kernels, without what a table changes."""
    figures = json.loads(path.read_text())
    for e in figures.get("entries", ()):  # a table of `intlass tune`
        kinds = e["x_kind"], e["w_kind"], e["has_zeros"], e["group_size"]
        for scheme in ROWS.values():
            shape = SCHEMES[scheme].shape(e["m"], e["n"], e["k"])
            same = (shape.x_kind, shape.w_kind, shape.has_zeros, shape.group_size) == kinds
            if same and e["arch"] == GPUS["H200"].device.arch:
                yield scheme, e["m"], e["n"], e["k"], e["predicted_us"]
    for row in figures.get("rows", ()):  # of the harness that runs peer_rows.py
        if row["peer"] in ROWS and row.get("us"):
            yield ROWS[row["peer"]], row["M"], row["N"], row["K"], row["us"]


# First guess and bounds: two exponents; how many times its cycles longer one warp alone takes;
# microseconds
PARAMETERS = {
    "p, few tokens": (2.0, 1, 20),
    "p": (2.0, 1, 20),
    "idle": (1.0, 0, 30),
    "launch": (1.5, 0, 5),
    "turn": (0.5, 0, 10),
}


def fit(problems: list[Problem], times: list[float]) -> tuple[list[float], list[float]]:
    """The parameters, and the relative errors with them."""
    logs = numpy.log(times)

    def residuals(parameters: Any) -> Any:
        return numpy.log([predict(parameters, each)[0] for each in problems]) - logs

    first, low, high = zip(*PARAMETERS.values(), strict=True)
    found = least_squares(residuals, first, bounds=(low, high), loss="soft_l1")
    errors = numpy.exp(residuals(found.x)) - 1
    return [round(float(v), 3) for v in found.x], [round(float(e), 4) for e in errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--measured",
        type=Path,
        default=RESULTS / "h200-sm80.json",
        help="rows of benchmarks/peer_rows.py, or a table of intlass tune (%(default)s)",
    )
    parser.add_argument("--note", default="", help="what to say on the page about the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper-model")
    options = parser.parse_args()
    json_path = options.out.with_suffix(".json")
    kept = json.loads(json_path.read_text())["kernels"] if json_path.is_file() else {}
    kernels = Kernels(kept)
    rows = [row for row in measured(options.measured) if row[2:4] in SHAPES]

    def problem(gpu: Gpu, scheme: str, m: int, n: int, k: int) -> tuple[Problem, str]:
        c = config.pick(gpu.device, SCHEMES[scheme].shape(m, n, k))
        return problem_of(gpu, c, kernels(gpu.arch, c), m, n, k), str(c)

    known = [problem(GPUS["H200"], *row[:4])[0] for row in rows]
    parameters, errors = fit(known, [row[4] for row in rows])
    figures: dict[str, Any] = {
        "measured": options.measured.name,
        "note": options.note,
        "parameters": dict(zip(PARAMETERS, parameters, strict=True)),
        "median error": round(float(statistics.median(map(abs, errors))), 3),
        "nine of ten below": round(float(numpy.quantile(numpy.abs(errors), 0.9)), 3),
        "rows": [],
    }
    for name, gpu in GPUS.items():
        for scheme, (n, k), m in itertools.product(ROWS.values(), SHAPES, TOKENS):
            each, kernel = problem(gpu, scheme, m, n, k)
            us, bound = predict(parameters, each)
            row = {"gpu": name, "scheme": scheme, "n": n, "k": k, "m": m, "us": round(us, 1)}
            figures["rows"].append(row | {"bound": bound, "kernel": kernel})
    figures["kernels"] = kernels.used
    json_path.write_text(one_a_line(figures))
    options.out.with_suffix(".md").write_text(page(figures, rows, errors))


def one_a_line(figures: dict[str, Any]) -> str:
    """JSON, a row or a kernel a line."""
    rows = ",\n".join(json.dumps(row) for row in figures["rows"])
    kernels = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(counts)}" for name, counts in figures["kernels"].items()
    )
    head = json.dumps({k: v for k, v in figures.items() if k not in ("rows", "kernels")}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ],\n "kernels": {{\n{kernels}\n }}\n}}\n'


def page(figures: dict[str, Any], rows: list[Any], errors: Any) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in figures["parameters"].items())
    lines = [
        "# Predicted times on GPUs that were not measured",
        "",
        "Made by `python benchmarks/paper_model.py`, which says how. Nothing here ran on the GPU",
        f"it is about. Fitted to {len(rows)} rows of `{figures['measured']}` ({parameters}).",
        f"There the model is off by {figures['median error']:.0%} in the median and by less than",
        f"{figures['nine of ten below']:.0%} in nine of ten rows; on other GPUs expect more.",
        figures["note"],
        "",
        "Median error on the H200, by scheme and number of tokens (positive: predicted too slow)",
        "",
    ]
    tokens = sorted({row[1] for row in rows})
    lines += _table_head(["scheme", *(f"M={m}" for m in tokens)])
    for scheme in ROWS.values():
        cells = [
            [e for row, e in zip(rows, errors, strict=True) if row[:2] == (scheme, m)]
            for m in tokens
        ]
        texts = [f"{statistics.median(cell):+.0%}" if cell else "" for cell in cells]
        lines.append(f"| {scheme} | {' | '.join(texts)} |")
    for gpu in list(GPUS)[1:]:
        lines += ["", f"## {gpu}, microseconds and what bounds them", ""]
        lines += _table_head(["N x K", "scheme", *(f"M={m}" for m in TOKENS)])
        for n, k in SHAPES:
            for scheme in ROWS.values():
                at = (gpu, scheme, n, k)
                here = [r for r in figures["rows"] if (r["gpu"], r["scheme"], r["n"], r["k"]) == at]
                texts = [f"{r['us']:.3g} {r['bound']}" for r in here]
                lines.append(f"| {n}x{k} | {scheme} | {' | '.join(texts)} |")
    lines += ["", "## RTX A6000, 4096x4096, W4A16, beside a neighbour's own figures there", ""]
    lines += _table_head(["microseconds", *(f"M={m}" for m in A6000_TOKENS)])
    of = {
        r["m"]: r["us"]
        for r in figures["rows"]
        if (r["gpu"], r["scheme"], r["n"], r["k"]) == ("RTX A6000", "w4a16", 4096, 4096)
    }
    lines.append(f"| ours, predicted | {' | '.join(f'{of[m]:.1f}' for m in A6000_TOKENS)} |")
    for name, values in A6000.items():
        lines.append(f"| {name}, measured | {' | '.join(f'{v:.1f}' for v in values)} |")
    return "\n".join(lines) + "\n"


def _table_head(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


if __name__ == "__main__":
    main()
