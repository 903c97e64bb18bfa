"""Library x scheme: what torch.compile(backend="intlass") does with each, as JSON and markdown.

    python benchmarks/lowering_table.py [--device cpu|cuda] [--only TEXT] [--out FOLDER]

Each row is a model of two linears quantised by the library itself (tests/library_zoo.py) or a
hand-written idiom of one product (tests/graph_zoo.py), compiled with Inductor. `error` is the
largest difference from the library's own eager output over its largest value. Rows marked
`prepare_` are single modules whose weight no graph shows, converted in place. A library that is
not installed leaves its rows with that reason. The files go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import graph_zoo  # noqa: E402
import library_zoo  # noqa: E402
import module_zoo  # noqa: E402

from intlass_ops import lowering  # noqa: E402
from intlass_ops.prepare import prepare_  # noqa: E402


def cases() -> Iterator[tuple[str, Callable[[], library_zoo.Case]]]:
    for name, entry in library_zoo.LIBRARY.items():
        yield name, entry.make
    for name, idiom in {**graph_zoo.AFFINE, **graph_zoo.UNTOUCHED}.items():
        yield (
            f"hand-written: {name}",
            lambda idiom=idiom: (
                idiom(),
                torch.randn(2, 3, graph_zoo.K).bfloat16(),
            ),
        )


def measure(make: Callable[[], library_zoo.Case], device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    lowering.clear_report()
    compiles = 0

    def counted(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return lowering.backend(gm, inputs)

    model, x = make()
    model, x = model.to(device), x.to(device)
    # A cached graph is not passed over again: its decisions would be missing.
    uncached = torch._inductor.config.patch(force_disable_caches=True)
    with torch.no_grad(), uncached:
        expected = model(x)
        start = time.perf_counter()
        y = torch.compile(model, backend=counted)(x)
        seconds = time.perf_counter() - start
    decisions = lowering.report()
    swapped = [d for d in decisions if d.outcome == "swapped"]
    error = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
    counters = lowering.counters()
    return {
        "products": len(decisions),
        "swapped": len(swapped),
        "scheme": ", ".join(sorted({d.scheme for d in decisions})),
        "stored": ", ".join(
            sorted(key.removeprefix("run.packed.") for key in counters if "run.packed." in key)
        )
        or ("int8, read in place" if swapped else ""),
        "why": ", ".join(sorted({d.reason for d in decisions if d.outcome != "swapped"})),
        "error": float(error),
        "compiles": compiles,
        "seconds": round(seconds, 2),
    }


def measure_prepared(
    make: Callable[[], module_zoo.Case], device: str, *, same_codes: bool = True
) -> dict[str, Any]:
    lowering.clear_report()
    linear, x, expected = make()
    model, x = torch.nn.Sequential(linear).to(device), x.to(device)
    start = time.perf_counter()
    (decision,) = prepare_(model, same_codes=same_codes)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        y = model(x).cpu() if decision.outcome == "swapped" else expected
    error = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
    return {
        "products": 1,
        "swapped": int(decision.outcome == "swapped"),
        "scheme": decision.scheme,
        "stored": getattr(model[0], "kind", "") or type(model[0]).__name__,
        "why": "" if decision.outcome == "swapped" else decision.reason,
        "error": float(error),
        "compiles": 1,
        "seconds": round(seconds, 2),
    }


def markdown(rows: list[dict[str, Any]], title: str) -> str:
    lines = [
        f"# {title}",
        "",
        "| model | swapped | scheme | stored as | error | compiles | left alone because |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['name']} | | | | | | not run: {row['skipped']} |")
            continue
        lines.append(
            f"| {row['name']} | {row['swapped']} of {row['products']} | {row['scheme']} "
            f"| {row['stored']} | {row['error']:.1e} | {row['compiles']} | {row['why']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="run the rows whose name contains this text")
    parser.add_argument("--out", default=str(HERE / "results"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    library_zoo.DEVICE = args.device
    rows: list[dict[str, Any]] = []
    jobs: list[tuple[str, Any, Any]] = [(name, measure, make) for name, make in cases()]
    jobs += [
        (f"prepare_: {name}", measure_prepared, make)
        for name, (make, _) in module_zoo.MODULES.items()
    ]
    # It quantises its activations to FP8, in a kernel; `error` is from its weights alone.
    name, make = "prepare_: transformers: FP8Linear", module_zoo.fp8_linear_of_transformers
    jobs.append((name, measure_prepared, make))
    freely = functools.partial(measure_prepared, same_codes=False)
    jobs.append((f"{name}, same_codes=False", freely, make))
    for name, job, make in jobs:
        if args.only not in name:
            continue
        try:
            row = {"name": name, **job(make, args.device)}
        except Exception as problem:
            # A compiler's error says on its second line what the matter is.
            said = " ".join(f"{type(problem).__name__}: {problem}".splitlines()[:2])
            row = {"name": name, "skipped": said}
        rows.append(row)
        print(row, flush=True)
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    title = f"Lowering on {device}, torch {torch.__version__}"
    target = Path(args.out) / f"lowering-{args.device}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(
        json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )
    target.with_suffix(".md").write_text(markdown(rows, title))


if __name__ == "__main__":
    main()
