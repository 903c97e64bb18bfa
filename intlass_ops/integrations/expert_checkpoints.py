"""Which quantised linears of a checkpoint are experts that the model holds fused.

Checkpoints have a linear for each expert; transformers (version 5) joins them to 3-D parameters
while it loads. Its own list of what is joined to what is asked here. Not here: how codes are joined
(formats/experts.py).

Private API of transformers, checked on 5.23: `rename_source_key` of core_model_loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..formats import FormatError
from . import experts

_MARK = ".experts."


def fused(model_class: Any, config: Any, paths: Sequence[str]) -> dict[str, list[list[str]]]:
    """For each layer of fused experts, the paths of its parts: for each piece of N, all experts.

    ``paths``: the quantised linears of a checkpoint. Empty where the model holds each by itself.
    Raises FormatError where transformers joins them in a way that codes cannot be.
    """
    if not any(_MARK in path for path in paths):
        return {}
    with torch.device("meta"):
        model = model_class(config)
    mixtures = {
        f"{path}.{name}": module
        for path, module in experts.mixtures_of(model)
        for name in experts.projections(module)
    }
    if not mixtures:
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    state = model.state_dict()
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(paths, key=dot_natural_key):
        target, pattern = rename_source_key(
            f"{path}.weight", renamings, converters, model.base_model_prefix, state
        )
        if pattern is None or target not in mixtures:
            continue
        if mixtures[target].is_transposed or not _joins_rows(by_pattern[pattern].operations):
            raise FormatError(f"{path}: experts of {type(model).__name__} are not read")
        found.setdefault(target, {}).setdefault(pattern, []).append(path)
    return {
        target + experts.SUFFIX: [
            parts[pattern]
            for pattern in by_pattern[next(iter(parts))].source_patterns
            if pattern in parts
        ]
        for target, parts in found.items()
    }


def _joins_rows(operations: Sequence[Any]) -> bool:
    """Whether experts are stacked and then pieces of N put one after the other."""
    known = [
        (type(each) is MergeModulelist and each.dim == 0)
        or (type(each) is Concatenate and each.dim == 1)
        for each in operations
    ]
    return all(known) and 1 <= len(known) <= 2 and type(operations[0]) is MergeModulelist
