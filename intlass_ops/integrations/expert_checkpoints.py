"""Which modules of a model the quantised linears of a checkpoint are.

Checkpoints have a linear for each expert; transformers (version 5) joins them to 3-D parameters
while it loads, and has given other names to parts of some models than older files have. Its own
lists of both are asked here. Not here: how codes are joined (formats/experts.py).

Private API of transformers, checked on 5.23: `rename_source_key` of core_model_loading,
`_keys_to_ignore_on_load_unexpected` of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
    place, converters = _renaming(model)
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(paths, key=dot_natural_key):
        target, pattern = place(path)
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


def unused(model_class: Any, config: Any, paths: Sequence[str]) -> set[str]:
    """Those of ``paths`` that the model has no place for and says it does without.

    Such as the layers of DeepSeek-V3 that predict more tokens at once: transformers leaves them out
    of floating-point checkpoints too.
    """
    with torch.device("meta"):
        model = model_class(config)
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    found = {path for path in paths if any(re.search(each, f"{path}.weight") for each in patterns)}
    if not found:
        return found
    place, _ = _renaming(model)
    own = model.state_dict()
    return {path for path in found if place(path)[0] not in own}


def renamed(model_class: Any, config: Any, paths: Sequence[str]) -> dict[str, str]:
    """The paths in the model of those of ``paths`` that it knows by other names."""
    with torch.device("meta"):
        model = model_class(config)
    modules = {path for path, _ in model.named_modules()}
    if modules.issuperset(paths):
        return {}
    place, _ = _renaming(model)
    # Where a pattern matches, linears are joined: their codes stay apart, and are refused later.
    places = {path: place(path) for path in paths}
    return {
        path: target.removesuffix(".weight")
        for path, (target, pattern) in places.items()
        if pattern is None
    }


def _renaming(model: Any) -> tuple[Callable[[str], tuple[str, str | None]], list[WeightConverter]]:
    """What ``model`` calls a linear's weight, with the pattern of what joins it to others."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()

    def place(path: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(
            f"{path}.weight", renamings, converters, model.base_model_prefix, state
        )
        return found

    return place, converters


def _joins_rows(operations: Sequence[Any]) -> bool:
    """Whether experts are stacked and then pieces of N put one after the other."""
    known = [
        (type(each) is MergeModulelist and each.dim == 0)
        or (type(each) is Concatenate and each.dim == 1)
        for each in operations
    ]
    return all(known) and 1 <= len(known) <= 2 and type(operations[0]) is MergeModulelist
