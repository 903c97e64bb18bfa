"""Times of the quantisers, FP4 products and training steps against their bars: one command.

    python benchmarks/quantisers.py --out benchmarks/results/quantisers-h200

Every row is a ratio of two times on this machine in this run, with the bar that it should reach.
Device times are medians of two CUDA graphs of calls over cold copies that take turns; searches,
GPTQ and training steps are timed from outside. On a CPU, and with --quick, shapes are tiny: that
shows that everything runs, not how fast.

Rows do not depend on each other: one that fails is noted and the others go on. --out.json and
--out.md are written after each. Each section has its share of --seconds; started again with the
same --out, rows that are there, or failed, are not measured again. Exit code 1 if rows failed or
are left, 3 if a kernel took the device with it: the same command then goes on after that row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from quantisers_cases import SECTIONS, Case
from quantisers_timing import Bench, Row

from intlass_ops import provenance


class Report:
    """What is measured, written to files after each row."""

    def __init__(self, out: str, device: torch.device) -> None:
        self.out = out
        self.content: dict[str, Any] = {
            "environment": provenance.environment(device),
            "rows": [],
            "failed": {},
            "left": [],
        }
        if Path(f"{out}.json").exists():
            before = json.loads(Path(f"{out}.json").read_text())
            self.content |= {key: before[key] for key in ("rows", "failed")}
        rows = (f"{row['what']}: {row['case']}" for row in self.content["rows"])
        self.done = {*rows, *self.content["failed"]}

    def measure(self, row: Row) -> None:
        try:
            ours, other = row.medians()
        except Exception as problem:  # the other rows still count
            self.fail(row.name, problem)
            return
        ratio = other / ours
        figures = {"ours": ours, "other": other, "ratio": ratio, "bar": row.bar}
        self.content["rows"].append({"what": row.what, "case": row.case, **figures})
        verdict = "  " if ratio >= row.bar else "<<"
        print(f"{ratio:8.2f} {verdict} {row.bar:4.2f}  {row.name}", flush=True)
        self.write()

    def fail(self, name: str, problem: Exception) -> None:
        traceback.print_exception(problem)
        self.content["failed"][name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
        self.write()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except Exception:  # nothing runs on the device in this process any more
                print(f"the device is lost: {name}", flush=True)
                os._exit(3)

    def leave(self, name: str) -> None:
        self.content["left"].append(name)
        self.write()

    def write(self) -> None:
        provenance.write_json(f"{self.out}.json", self.content)
        Path(f"{self.out}.md").write_text(self._table())

    def _table(self) -> str:
        where = self.content["environment"]
        lines = [
            f"{where['device']}, torch {where['torch']}, triton {where['triton']}, commit "
            f"{where['commit']}: `{where['command']}`",
            "",
            "| what | case | ours | other | ratio | bar |",
            "|---|---|---|---|---|---|",
        ]
        for r in self.content["rows"]:
            times = f"{r['ours']:.4g} | {r['other']:.4g}"
            lines.append(f"| {r['what']} | {r['case']} | {times} | {r['ratio']:.2f} | {r['bar']} |")
        lines += [f"\n{name} failed: {error}" for name, error in self.content["failed"].items()]
        lines += [f"\n{name}: no time was left" for name in self.content["left"]]
        return "\n".join(lines) + "\n"


def run_section(section: Callable[[Bench], Iterator[Case]], b: Bench, report: Report) -> list[Row]:
    """The section's rows that are not there yet, their kernels compiled."""
    rows: list[Row] = []
    try:
        for case in section(b):
            try:
                rows += case()
            except Exception as problem:  # the other cases still count
                report.fail(f"{section.__name__} {getattr(case, 'args', '')}", problem)
    except Exception as problem:
        report.fail(section.__name__, problem)
    rows = [row for row in rows if row.name not in report.done]
    warm_up(rows, b, report)
    return [row for row in rows if row.name not in report.content["failed"]]


def warm_up(rows: list[Row], b: Bench, report: Report) -> None:
    """Compile the rows' kernels side by side: NVRTC needs seconds for each."""
    if not b.cuda:
        return
    with ThreadPoolExecutor(8, initializer=lambda: torch.cuda.set_device(0)) as pool:
        begun = [(row, pool.submit(row.warm)) for row in rows if row.warm]
    for row, run in begun:
        problem = run.exception()
        if isinstance(problem, Exception):
            report.fail(row.name, problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--only", nargs="*", choices=[s.__name__ for s in SECTIONS])
    parser.add_argument("--seconds", type=float, default=230, help="begin no row after so long")
    parser.add_argument("--out", default="quantisers", help="path without .json and .md")
    args = parser.parse_args()
    began = time.perf_counter()
    device = torch.device(args.device)
    torch.manual_seed(0)
    bench = Bench(device, args.quick or device.type != "cuda")
    report = Report(args.out, device)
    sections = {s: x for s, x in SECTIONS.items() if not args.only or s.__name__ in args.only}
    for section, share in sections.items():
        start = time.perf_counter()
        shares = list(sections.values())[list(sections).index(section) :]
        until = start + (args.seconds - (start - began)) * share / sum(shares)
        for row in run_section(section, bench, report):
            if time.perf_counter() > until:
                report.leave(row.name)
            else:
                report.measure(row)
        print(f"{section.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
    failed, left = report.content["failed"], report.content["left"]
    print(f"{len(report.content['rows'])} rows, {len(failed)} failed, {len(left)} left", flush=True)
    report.write()
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
