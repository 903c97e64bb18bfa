"""`torch.compile(model, backend="intlass")`, `enable()` for plain Inductor, and their reports.

Lives here: the two ways in. Not here: the pass (graph_pass.py), what it recognises (weights.py,
activations.py, linears.py, rules.py) or what the rewritten graph calls (runtime.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import graph_pass, runtime
from .records import Decision, clear_report, counters, report

__all__ = [
    "Decision",
    "backend",
    "clear_report",
    "counters",
    "disable",
    "enable",
    "invalidate",
    "refresh",
    "report",
]


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor after swapping quantised linears for `torch.ops.intlass` GEMMs.

    `mode` and `options` mean what they mean for `backend="inductor"`, except that with CUDA graphs
    `triton.enable_pdl` is on unless it is given: Inductor's kernels too start early on a GPU that
    can. A pass that is already installed on the hook we use still runs, before ours.
    """
    return graph_pass.compile_with_pass(gm, example_inputs, mode=mode, options=options)


def enable() -> None:
    """Make every plain `torch.compile(model)` of this process swap quantised linears too.

    Idempotent; chains with a pass that is already installed.

    >>> enable()  # from here on torch.compile(model) is enough
    >>> disable()
    """
    graph_pass.install()


def disable() -> None:
    """Undo `enable()`; leaves other passes on the hook alone. Compiled graphs stay as they are.

    >>> enable()
    >>> disable()  # what is compiled from here on is left alone
    """
    graph_pass.uninstall()


def refresh() -> None:
    """Repack what changed in place before replaying a CUDA graph you captured yourself.

    Graphs that torch.compile captures (mode="reduce-overhead") are refreshed at each call.

    >>> refresh()  # before graph.replay(), after an optimiser changed weights
    """
    runtime.refresh_captured()


def invalidate() -> None:
    """Forget every repacked weight.

    Needed only after writing in place where PyTorch counts no versions: through `tensor.data`, or
    to a tensor made under `torch.inference_mode()`. In-place ops on any other tensor,
    `load_state_dict`, assigning a new parameter and `tensor.data = other` are noticed without it.
    """
    runtime.invalidate()
