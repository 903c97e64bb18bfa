"""Time against M, one panel a layer."""

from __future__ import annotations

from typing import Any

from ..errors import BackendUnavailableError


def plot(rows: list[dict[str, Any]], path: str, device: str) -> None:
    """Write a PNG of the rows of `intlass bench gemm` or `pipeline`."""
    try:
        import matplotlib
    except ImportError as error:
        raise BackendUnavailableError("--png needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure, panels = pyplot.subplots(1, len(layers), figsize=(5 * len(layers), 4), squeeze=False)
    for panel, (n, k) in zip(panels[0], layers, strict=True):
        here = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        for name in dict.fromkeys(row["contender"] for row in here):
            points = [(row["m"], row["microseconds"]) for row in here if row["contender"] == name]
            panel.loglog(*zip(*points, strict=True), marker=".", label=name, base=2)
        panel.set(title=f"N={n}, K={k}", xlabel="tokens M", ylabel="microseconds")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.suptitle(device)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
