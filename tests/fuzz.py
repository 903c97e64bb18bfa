"""Random calls of the GEMM ops against the float64 oracle, by the thousand, on a CPU or a GPU:

    python3 tests/fuzz.py --device cuda --workers 16 --json benchmarks/results/fuzz-h200.json
    python3 tests/fuzz.py --device sm_80 --workers 2   # the kernels of that GPU, emulated (ptx/)

Every second call has numbers of which float32 rounds none, and must be bit-equal; the others obey
the rule of tolerance.py. A case is decided by --seed and its index: `--first I --cases 1` repeats
one. Kernels cost NVRTC a second each, so types and sizes along K come from a pool of --problems,
and processes (--workers, each with a share of the cases) compile side by side.
Exit code 1 if a case was wrong. Not here: quantisers, whose results are compared in full by
test_quantize_ops.py.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gemm_case import CODES, LAYOUTS, Case, build, float32_is_exact
from gemm_checks import check_bounded, check_exact
from ptx import emulated
from strategies import ACTIVATIONS, FLOATS, PAIRS, ZERO_DTYPES, a_zero_of

import intlass_ops
from intlass_ops import provenance

M = (*range(1, 18), 24, 31, 33, 64, 65, 100, 129, 200)
N = (1, 7, 8, 16, 33, 48, 64, 65, 100, 128, 129, 256, 300)
K = (1, 7, 31, 32, 33, 64, 100, 127, 128, 256, 384, 511, 512, 1024, 2000, 4096)
GROUPS = (16, 32, 48, 64, 80, 128, 256)
FAILURES_KEPT = 20


def a_problem(draw: random.Random) -> Case:
    """What decides the kernel, but for M, N and layouts."""
    x, w = draw.choice(PAIRS)
    k, groups = draw.choice(K), 1
    if draw.random() < 0.6:
        groups = draw.choice((2, 3, 4, 8, 9))
        k = groups * draw.choice(GROUPS)
    a_zero = a_zero_of(x)
    if x == "s8" and draw.random() < 0.3:
        a_zero = draw.choice(ZERO_DTYPES)
    zero_groups = draw.choice((0, 0, 1)) if w == "u4" else 0
    scale, zero, out = draw.choice(FLOATS), draw.choice(ZERO_DTYPES), draw.choice((None, *FLOATS))
    return Case(
        x, w, k=k, groups=groups, zero_groups=zero_groups, scale=scale, zero=zero, out=out,
        a_zero=a_zero, activation=draw.choice((None,) * 4 + ACTIVATIONS),
        residual=draw.random() < 0.4,
    )  # fmt: skip


def a_case(problems: list[Case], seed: int, index: int) -> tuple[Case, str]:
    """Case `index`, and whether its numbers are "exact" or "random"."""
    draw = random.Random(f"{seed} {index}")
    case = draw.choice(problems)
    layouts = ("contiguous", "contiguous", *LAYOUTS)
    exact = index % 2 == 0 and case.activation in (None, "relu")
    case = replace(
        case,
        lead=draw.choice(((), (0,), (2, 3), *((m,) for m in M))),
        n=draw.choice(N),
        scale_shape=draw.choice(("table", "column", "scalar")),
        bias=draw.choice((None, *FLOATS)),
        alpha=draw.choice(("none", "float", "tensor")),
        a_scale=draw.choice(("none", "scalar", "token", "flat")) if case.x in CODES else "none",
        a_layout=draw.choice(layouts),
        w_layout=draw.choice(layouts),
        scale_layout=draw.choice(layouts),
        special=exact and case.activation is None and draw.random() < 0.2,
        seed=draw.randrange(1 << 30),
    )
    if exact and not float32_is_exact(build(case, "cpu")):
        exact, case = False, replace(case, special=False)
    return case, "exact" if exact else "random"


@dataclass
class Outcome:
    cases: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)  # the first ones

    def add(self, other: Outcome) -> None:
        self.cases += other.cases
        self.kinds.update(other.kinds)
        self.kernels.update(other.kernels)
        self.wrong += other.wrong
        self.failures = (self.failures + other.failures)[:FAILURES_KEPT]


def fuzz(
    device: str, seed: int, indices: range, num_problems: int, seconds: float, progress: bool
) -> Outcome:
    """Check cases until they or the time run out."""
    draw = random.Random(seed)
    problems = [a_problem(draw) for _ in range(num_problems)]
    done, start = Outcome(), time.monotonic()
    with contextlib.ExitStack() as stack:
        if device.startswith("sm_"):
            stack.enter_context(emulated(device))
            device = "cpu"
        _check_all(done, problems, device, seed, indices, start + seconds, progress)
    return done


def _check_all(
    done: Outcome,
    problems: list[Case],
    device: str,
    seed: int,
    indices: range,
    end: float,
    progress: bool,
) -> None:
    start = time.monotonic()
    for index in indices:
        if time.monotonic() > end:
            break
        case, numbers = a_case(problems, seed, index)
        check = check_exact if numbers == "exact" else check_bounded
        try:
            run = intlass_ops.explain(check, case, device)
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            done.wrong += 1
            if len(done.failures) < FAILURES_KEPT:
                done.failures.append(
                    {"index": index, "numbers": numbers, "case": repr(case), "error": str(error)}
                )
        else:
            done.kernels.update(d.kernel for d in run.dispatches)
        done.cases += 1
        done.kinds[f"{case.x}-{case.w} {numbers}"] += 1
        if progress and done.cases % 1000 == 0:
            rate = done.cases / (time.monotonic() - start)
            print(f"{done.cases} cases, {done.wrong} wrong, {rate:.0f} a second", flush=True)


def fuzz_side_by_side(
    workers: int, device: str, seed: int, indices: range, num_problems: int, seconds: float
) -> Outcome:
    """`fuzz` in so many processes, each with every workers-th case and one thread."""
    done = Outcome()
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        shares = (indices[first::workers] for first in range(workers))
        for outcome in [
            pool.submit(fuzz, device, seed, share, num_problems, seconds, False) for share in shares
        ]:
            done.add(outcome.result())
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=60, help="types and sizes along K")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--json", help="write a summary")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    indices = range(options.first, options.first + options.cases)
    how = options.device, options.seed, indices, options.problems, options.seconds
    if options.workers > 1:
        done = fuzz_side_by_side(options.workers, *how)
    else:
        done = fuzz(*how, progress=True)
    print(f"{done.cases} cases, {len(done.kernels)} kernels, {done.wrong} wrong")
    for failure in done.failures:
        print(f"--seed {options.seed} --first {failure['index']} --cases 1: {failure['error']}")
    if options.json:
        emulated = options.device.startswith("sm_")
        environment = provenance.environment(torch.device("cpu" if emulated else options.device))
        if emulated:
            environment["device"] = f"{options.device}, emulated on a CPU"
        summary = {
            "environment": environment,
            "seed": options.seed,
            "problems": options.problems,
            "seconds": round(time.monotonic() - start, 1),
            "cases": done.cases,
            "wrong": done.wrong,
            "kinds": dict(sorted(done.kinds.items())),
            "kernels": dict(sorted(done.kernels.items())),
            "failures": done.failures,
        }
        provenance.write_json(options.json, summary)
    return 1 if done.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
