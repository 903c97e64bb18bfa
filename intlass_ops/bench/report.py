"""`intlass bench`: every contender checked and timed, then a table, a JSON file, a plot."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import provenance
from ..demo.show import Show
from ..explain import explain
from . import (
    CPU_SHAPES,
    CPU_TOKENS,
    SHAPES,
    TOKENS,
    contenders,
    parse_numbers,
    parse_shapes,
    timing,
)
from .contenders import Contender, Layer, Tokens

_CHECKED = 16  # tokens


@dataclass(frozen=True)
class Row:
    """One time. ``error`` is the largest, in units of what is allowed; ``kernel`` is ours."""

    contender: str
    n: int
    k: int
    m: int
    microseconds: float
    tera_ops: float
    weight_gb_per_second: float
    error: float | None
    kernel: str | None


def run(options: argparse.Namespace) -> int:
    """See bench.run."""
    show = Show()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = torch.device(device).type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    show.title("intlass bench", f"{provenance.device_name(torch.device(device))} · {dtype}")
    figures: dict[str, Any] = provenance.environment(torch.device(device))
    if options.what == "model":
        rows = _models(show, options, device, dtype)
        code = 0
    else:
        try:
            shapes = parse_shapes(
                options.shapes or (CPU_SHAPES if on_cpu else SHAPES), contenders.GROUP
            )
            tokens = parse_numbers(options.tokens or (CPU_TOKENS if on_cpu else TOKENS))
        except ValueError as error:
            show.problem(f"intlass bench: {error}")
            return 2
        figures["copy_gb_per_second"] = timing.copy_bandwidth(device) / 1e9
        show.say(f"copy bandwidth {figures['copy_gb_per_second']:.0f} GB/s\n", "dim")
        with torch.inference_mode():
            rows, code = _products(show, options, shapes, tokens, device, dtype)
    figures["rows"] = rows
    if options.json:
        provenance.write_json(options.json, figures)
    if options.png and options.what != "model":
        from .plot import plot

        plot(rows, options.png, figures["device"])
    return code


def _chosen(names: list[str], only: str | None) -> list[str]:
    return [n for n in names if only is None or any(part in n for part in only.split(","))]


def _products(
    show: Show,
    options: argparse.Namespace,
    shapes: list[tuple[int, int]],
    tokens: list[int],
    device: str,
    dtype: torch.dtype,
) -> tuple[list[dict[str, Any]], int]:
    everyone = list(contenders.gemms() if options.what == "gemm" else contenders.pipelines())
    names = _chosen([c.name for c in everyone], options.only)
    taking_part = [c for c in everyone if c.name in names]
    rows: list[Row] = []
    for n, k in shapes:
        layer = Layer(n, k, device, dtype)
        inputs = {m: layer.tokens(m) for m in tokens}
        with show.bar(f"{n}x{k}") as advance:
            found: list[Row] = []
            for done, contender in enumerate(taking_part, 1):
                found += _one(contender, layer, inputs, options.seconds)
                advance(done, len(taking_part))
        _table(show, found, tokens)
        rows += found
        del layer, inputs
        gc.collect()
    wrong = [row for row in rows if row.error is not None and not row.error <= 1]
    for row in wrong:
        show.problem(
            f"{row.contender} is wrong at {row.n}x{row.k}, M={row.m}: error {row.error:.3g} times "
            f"what is allowed"
        )
    return [asdict(row) for row in rows], 1 if wrong else 0


def _one(
    contender: Contender, layer: Layer, inputs: dict[int, Tokens], seconds: float
) -> Iterator[Row]:
    inputs = {m: tokens for m, tokens in inputs.items() if contender.can(layer, m)}
    if not inputs:
        return
    first = contender.weights(layer)
    num_bytes = sum(t.numel() * t.element_size() for t in first)
    copies = timing.copies_of(num_bytes)
    weights = [first, *(tuple(t.clone() for t in first) for _ in range(copies - 1))]
    for m, tokens in inputs.items():
        error, kernel = _check(contender, layer, tokens, weights[0])

        def call(i: int, tokens: Tokens = tokens) -> Tensor:
            return contender.call(layer, tokens, weights[i])

        us = timing.microseconds(call, copies, layer.device, seconds)
        yield Row(
            contender.name,
            layer.n,
            layer.k,
            m,
            us,
            2 * m * layer.n * layer.k / us / 1e6,
            num_bytes / us / 1e3,
            error,
            kernel,
        )


def _check(
    contender: Contender, layer: Layer, tokens: Tokens, weights: tuple[Tensor, ...]
) -> tuple[float | None, str | None]:
    """The largest error as a share of what is allowed, and the kernel that ran."""
    explanation = explain(lambda: contender.call(layer, tokens, weights))
    kernel = "; ".join(str(d.kernel) for d in explanation.dispatches) or None
    if contender.tolerance is None:
        return None, kernel
    y = contender.call(layer, tokens, weights)[:_CHECKED]
    exact, magnitude = contender.expected(layer, tokens)
    allowed = (4 * torch.finfo(y.dtype).eps + contender.tolerance) * magnitude
    return float(((y.double() - exact).abs() / allowed).max()), kernel


def _table(show: Show, rows: list[Row], tokens: list[int]) -> None:
    """Microseconds, and in brackets how many times as fast as the dense layer."""
    times = {(row.contender, row.m): row.microseconds for row in rows}
    names = list(dict.fromkeys(row.contender for row in rows))

    def cell(name: str, m: int) -> str:
        us, dense = times.get((name, m)), times.get(("dense", m))
        if us is None:
            return ""
        return f"{us:.1f}" if dense is None or name == "dense" else f"{us:.1f} ({dense / us:.2f}×)"

    lines = [[name, *(cell(name, m) for m in tokens)] for name in names]
    show.table(["µs", *(f"M={m}" for m in tokens)], lines)


def _models(
    show: Show, options: argparse.Namespace, device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    from . import models

    hidden = options.hidden or (512 if torch.device(device).type == "cpu" else 4096)
    names = _chosen(list(models.SCHEMES), options.only)
    lines, rows = [], []
    with show.bar(f"{options.layers} layers of {hidden}") as advance, torch.inference_mode():
        measured = models.measure(names, options.layers, hidden, device, dtype, options.seconds)
        for done, (name, speed, num_bytes) in enumerate(measured, 1):
            rows.append(
                {"scheme": name, "layers": options.layers, "hidden": hidden, "bytes": num_bytes}
                | asdict(speed)
            )
            lines.append(
                [name, f"{speed.decode:.1f}", f"{speed.prefill:.0f}", f"{num_bytes / 1e6:.0f}"]
            )
            advance(done, len(names))
    show.table(["scheme", "decode, tokens/s", "prefill, tokens/s", "weights, MB"], lines)
    return rows
