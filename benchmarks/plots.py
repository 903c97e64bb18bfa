"""Figures and tables of the documentation, from benchmarks/results: python benchmarks/plots.py

Writes docs/figures/*.svg and, in docs/*.md and README.md, what stands between
`<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written and the exit code says
whether a table is stale.
Only what lies in benchmarks/results is shown: no number of the pages' tables is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
SHAPES = ((4096, 4096), (28672, 4096), (8192, 28672))
# Rows of the harness: what they are called here, ours by the scheme they belong to.
NAMES = {
    "bf16_mm": "bf16, `torch.mm`",
    "fp8_scaled_mm": "FP8, `torch._scaled_mm`",
    "tinygemm": "W4A16, `_weight_int4pack_mm`",
    "humming_a16w4": "W4A16, humming",
    "intlass_w4a16": "**W4A16**",
    "intlass_w4a16_sm80": "W4A16, portable kernels",
    "humming_a8w4_gemm": "W4A8, humming",
    "intlass_w4a8_g128": "**W4A8**",
    "intlass_w4a8_g128_sm80": "W4A8, portable kernels",
    "intlass_w4a8_chn": "**W4A8**, one scale a row",
    "intlass_w4a4": "**W4A4**",
    "intlass_w8a16": "**W8A16**",
    "int_mm": "W8A8, `torch._int_mm`, no scales",
    "sgl_int8_scaled_mm": "W8A8, CUTLASS (sglang-kernel)",
    "intlass_w8a8": "**W8A8**",
    "intlass_w8a8_sm80": "W8A8, portable kernels",
}
FEW, SOME, MANY = (1, 4, 8, 16), (32, 64, 128, 256), (512, 1024, 2048, 4096, 8192)
RATIOS = (
    ("intlass_w4a16", ("bf16_mm", "humming_a16w4", "tinygemm")),
    ("intlass_w4a8_g128", ("bf16_mm", "humming_a8w4_gemm")),
    ("intlass_w8a8", ("bf16_mm", "fp8_scaled_mm", "sgl_int8_scaled_mm", "int_mm")),
    ("intlass_w8a8_pipe", ("sgl_int8_pipe",)),
)
PIPES = {
    "intlass_w8a8_pipe": "**W8A8**, from bf16",
    "sgl_int8_pipe": "W8A8, CUTLASS and humming's quantiser",
}


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def times() -> dict[tuple[str, int, int, int], float]:
    """Microseconds by (name, N, K, M): ours and their peers, in one run."""
    rows = read("h200-sm90.json")["rows"]
    return {(r["peer"], r["N"], r["K"], r["M"]): r["us"] for r in rows if r["ok"]}


def gemm_table() -> str:
    found = times()
    tokens = (1, 16, 128, 2048)
    rows = []
    for n, k in SHAPES:
        for peer, name in NAMES.items():
            cells = [found.get((peer, n, k, m)) for m in tokens]
            rows.append([f"{n}x{k}", name, *("-" if t is None else us(t) for t in cells)])
    return table(["N x K", "", *(f"M = {m}" for m in tokens)], rows)


def short_table() -> str:
    found = times()
    columns = (
        (4096, 4096, 1),
        (28672, 4096, 1),
        (8192, 28672, 1),
        *((28672, 4096, m) for m in (128, 2048)),
    )
    names = ("bf16_mm", "tinygemm", "humming_a16w4", "intlass_w4a16", "humming_a8w4_gemm")
    names += ("intlass_w4a8_g128", "sgl_int8_scaled_mm", "intlass_w8a8")
    rows = [
        [NAMES[name], *(us(found[(name, *c)]) if (name, *c) in found else "-" for c in columns)]
        for name in names
    ]
    return table(["microseconds", *(f"{n}x{k}, M = {m}" for n, k, m in columns)], rows)


def reader_table() -> str:
    """W4A16 as a multiple of what reading as many bytes takes, in the same run."""
    found, ceilings = times(), read("h200-sm90.json")["ceil"]
    megabytes = {(4096, 4096): "8.65", (28672, 4096): "60.6", (8192, 28672): "117.4"}
    megabytes[57344, 8192] = "242.0"
    tokens = (1, 4, 8, 16)
    rows = []
    for (n, k), size in megabytes.items():
        reader = ceilings[f"read_{size}MB_us"]
        cells = [found.get(("intlass_w4a16", n, k, m)) for m in tokens]
        shown = ["-" if t is None else f"{t / reader:.2f}" for t in cells]
        rows.append([f"{n}x{k}", f"{size} MB, {us(reader)} us", *shown])
    return table(["N x K", "a pure reader", *(f"M = {m}" for m in tokens)], rows)


def ratios_table() -> str:
    """How many times as fast as others: geometric mean, and the least."""
    found = times()
    rows = []
    for ours, others in RATIOS:
        for other in others:
            cells = []
            for tokens in (FEW, SOME, MANY):
                of = [
                    found[other, n, k, m] / t
                    for (name, n, k, m), t in found.items()
                    if name == ours and m in tokens and (other, n, k, m) in found
                ]
                cells.append(f"{geometric_mean(of):.2f} ({min(of):.2f})" if of else "-")
            names = NAMES | PIPES
            rows.append([names[ours], names[other], *cells])
    return table(["ours", "against", "M = 1..16", "32..256", "512 and more"], rows)


def model_table() -> str:
    rows = read("h200-llama.json")["rows"]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    speeds = {(r["variant"], r["case"]): r["tokens_per_s"] for r in rows}
    names = {"bf16": "bf16", "intlass_w4a16": "W4A16", "intlass_w4a8": "W4A8"}
    names["intlass_w8a8"] = "W8A8"
    lines = []
    for variant, name in names.items():
        cells = [speeds.get((variant, case)) for case in cases]
        lines.append([name, *("-" if v is None else f"{v:.0f}" for v in cells)])
    words = {"decode_b1": "decode, 1 sequence", "decode_b64": "decode, 64 sequences"}
    words["prefill_4096"] = "prefill, 4096 tokens"
    return table(["tokens/s", *(words[case] for case in cases)], lines)


def demo_table() -> str:
    figures = read("demo-h200.json")
    both = [figures["intlass"], figures["dense"]]
    rows = [
        ["weights, MB", *(f"{c['weight_bytes'] / 1e6:.0f}" for c in both)],
        ["perplexity, 8176 tokens", *(f"{c['perplexity']:.3f}" for c in both)],
        ["decode, tokens/s", *(f"{c['tokens_per_second']['decode']:.0f}" for c in both)],
        ["prefill, tokens/s", *(f"{c['tokens_per_second']['prefill']:.0f}" for c in both)],
    ]
    return table(["SmolLM2-135M", "INT4/INT8", "dense bf16"], rows)


def lowering_table() -> str:
    """How many linears of each library's models are swapped, by device."""
    devices = {"CPU": "lowering-cpu.json", "H200": "lowering-cuda.json"}
    seen = {device: _swapped(read(file)) for device, file in devices.items()}
    names = dict.fromkeys(name for each in seen.values() for name in each)
    rows = [
        [name, *(each.get(name, "-") for each in seen.values())]
        for name in names
        if not name.startswith("hand-written")
    ]
    return table(["model", *devices], rows)


def _swapped(figures: Any) -> dict[str, str]:
    return {
        row["name"]: f"{row['swapped']} of {row['products']}" if "swapped" in row else "not run"
        for row in figures["rows"]
    }


def accuracy_table() -> str:
    figures = _accuracy()
    rows = [
        [
            row["name"],
            f"{row['perplexity']:.3f}",
            *(f"{row[key]:.3f}" if key in row else "" for key in ("weight_error", "output_error")),
        ]
        for row in figures["rows"]
    ]
    return table(["weights, activations", "perplexity", "error of weights", "of outputs"], rows)


def accuracy_kinds_table() -> str:
    """Errors of outputs by kind of linear, of the rows at groups of 64 that have them."""
    rows = {
        row["name"].removeprefix("W4 g64 ").removesuffix(", A16"): row
        for row in _accuracy()["rows"]
        if row["name"].startswith("W4 g64") and row["name"].endswith("A16")
    }
    shown = [rows[name] for name in ("rtn", "mse", "mse of outputs", "gptq") if name in rows]
    shown = [row for row in shown if "output_errors" in row]
    kinds = list(shown[0]["output_errors"]) if shown else []
    cells = [[row["name"], *(f"{row['output_errors'][k]:.3f}" for k in kinds)] for row in shown]
    return table(["error of outputs", *(kind.removesuffix("_proj") for kind in kinds)], cells)


def four_bit_activations_table() -> str:
    """Perplexities of W4A4: each way to choose codes, by the frame they are chosen in."""
    frames = ["not rotated", "rotated by 64", "rows rotated"]
    found: dict[str, dict[str, str]] = {}
    for row in read("accuracy-cpu.json")["rows"]:
        weights, activations, *frame = row["name"].split(", ")
        if activations in ("A4", "A4 quest"):
            method = weights.removeprefix("W4 g64 ") + activations.removeprefix("A4")
            cells = found.setdefault(method, dict.fromkeys(frames, ""))
            cells[(frame or frames)[0]] = f"{row['perplexity']:.1f}"
    rows = [[method, *cells.values()] for method, cells in sorted(found.items(), reverse=True)]
    return table(["weights and activations, groups of 64", *frames], rows)


def _accuracy() -> Any:
    """The figures of a GPU, which has time for all rows, or else those of a CPU."""
    on_gpu = (RESULTS / "accuracy-h200.json").exists()
    return read("accuracy-h200.json" if on_gpu else "accuracy-cpu.json")


def qat_table() -> str:
    """What training wins back of W4A4's loss."""
    figures = read("qat-cpu.json")
    rows = [
        [
            row["name"],
            f"{figures['float_trained_on']:.3f}",
            f"{row['untrained']:.3f}",
            f"{row['trained']:.3f}",
            f"{row['won_back']:.0%}",
        ]
        for row in figures["rows"]
    ]
    return table(["W4A4, scales", "floating point", "not trained", "trained", "won back"], rows)


def stored_table() -> str:
    """Linears as checkpoints store them: how many times as fast as bf16 of the same run."""
    rows = read("stored-weights-h200.json")["rows"]
    found = {(r["form"], r["n"], r["k"], r["m"]): r["us"] for r in rows}
    layers = list(dict.fromkeys((n, k) for _, n, k, _ in found))
    tokens = sorted({key[3] for key in found})
    lines = []
    for form in dict.fromkeys(key[0] for key in found if key[0] != "bf16"):
        of = [[found["bf16", n, k, m] / found[form, n, k, m] for n, k in layers] for m in tokens]
        lines.append([form, *(f"{geometric_mean(each):.2f} ({min(each):.2f})" for each in of)])
    return table(["under bf16", *(f"M = {m}" for m in tokens)], lines)


def experts_table() -> str:
    """Grouped products beside PyTorch's of bf16, of the same run."""
    rows = read("experts-h200.json")["rows"]
    us = {(r["model"], r["scheme"], r["m"]): r["us"] for r in rows}
    models = list(dict.fromkeys(r["model"] for r in rows))
    tokens = sorted({r["m"] for r in rows})
    lines = []
    for scheme in dict.fromkeys(r["scheme"] for r in rows if r["scheme"] != "bf16"):
        of = [[us[x, "bf16", m] / us[x, scheme, m] for x in models] for m in tokens]
        name, *rest = scheme.split(", ")
        lines.append(
            [
                ", ".join((name.upper(), *rest)),
                *(f"{geometric_mean(each):.2f} ({min(each):.2f})" for each in of),
            ]
        )
    return table(["", *(f"{m} tokens" if m > 1 else "1 token" for m in tokens)], lines)


def mixture_table() -> str:
    """A mixture of experts under torch.compile."""
    rows = read("h200-mixture.json")["rows"]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    ms = {(r["model"], r["case"]): r["ms"] for r in rows}
    lines = []
    for name in dict.fromkeys(r["model"] for r in rows):
        cells = (f"{ms[name, case]:.3f}" if (name, case) in ms else "-" for case in cases)
        model, scheme = name.split(", ", 1)
        lines.append([model, scheme if scheme.startswith("bf16") else scheme.upper(), *cells])
    return table(["model", "milliseconds", *cases], lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_table,
    "accuracy_kinds": accuracy_kinds_table,
    "demo": demo_table,
    "experts": experts_table,
    "four_bit_activations": four_bit_activations_table,
    "gemm": gemm_table,
    "lowering": lowering_table,
    "mixture": mixture_table,
    "model": model_table,
    "qat": qat_table,
    "ratios": ratios_table,
    "reader": reader_table,
    "short": short_table,
    "stored": stored_table,
}


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "intlass"  # the same file from the same numbers
    (DOCS / "figures").mkdir(exist_ok=True)
    found = times()
    panels = {
        "W4A16": ("intlass_w4a16", "intlass_w4a16_sm80", "humming_a16w4", "tinygemm"),
        "W4A8": ("intlass_w4a8_g128", "intlass_w4a8_g128_sm80", "humming_a8w4_gemm"),
        "W8A8": ("intlass_w8a8", "intlass_w8a8_sm80", "sgl_int8_scaled_mm", "fp8_scaled_mm"),
    }
    for n, k in SHAPES[:2]:
        figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.4), sharey=True)
        for panel, (scheme, names) in zip(axes, panels.items(), strict=True):
            for name in ("bf16_mm", *names):
                points = sorted((key[3], t) for key, t in found.items() if key[:3] == (name, n, k))
                ours = name == f"intlass_{scheme.lower()}" or name == "intlass_w4a8_g128"
                style = {"linewidth": 2.5} if ours else {"linewidth": 1.0, "alpha": 0.8}
                label = NAMES[name].replace("`", "").replace("*", "")
                panel.loglog(*zip(*points, strict=True), marker=".", label=label, base=2, **style)
            panel.set(title=scheme, xlabel="tokens M")
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
        axes[0].set_ylabel("microseconds")
        figure.suptitle(f"One H200, {n}x{k}, cold weights, groups of 128 for INT4")
        figure.tight_layout()
        figure.savefig(DOCS / "figures" / f"gemm-{n}x{k}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether a table is stale")
    options = parser.parse_args()
    stale = []
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        before = page.read_text()
        after = filled(before)
        if after != before:
            stale.append(page.name)
            if not options.check:
                page.write_text(after)
    if options.check:
        print(f"stale: {', '.join(stale)}" if stale else "all tables are those of the results")
        return 1 if stale else 0
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
