"""Fused mixtures of experts, whose weights are 3-D parameters [experts, ...] and not linears.

No layer here holds them, so a quantiser would pass them by in silence: this finds them and says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# Position tables, class tokens and the like have a size below this in some dimension.
_SMALLEST = 16


def experts_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """3-D weights [experts, N, K] or [experts, K, N], by path."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Bilinear)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            sizes = parameter.shape
            if len(sizes) == 3 and sizes[0] > 1 and min(sizes[1:]) >= _SMALLEST:
                yield f"{path}.{name}" if path else name, parameter


def experts_left(model: nn.Module) -> str | None:
    """Which of them a quantised model still has, in words; None if there are none."""
    experts = list(experts_of(model))
    if not experts:
        return None
    left = sum(parameter.numel() for _, parameter in experts)
    share = 100 * left / sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{len(experts)} fused expert weights stay {experts[0][1].dtype} ({experts[0][0]}, …; "
        f"{share:.0f} % of the parameters not quantised): only 2-D linears are quantised"
    )
