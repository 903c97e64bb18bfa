"""AutoRound's checkpoints of integers, in the layouts of GPTQ and of AWQ (gptq.py, awq.py).

``packing_format`` says which, until 0.4.7 ``backend`` (quant_method "intel/auto-round"):

    auto_round:auto_gptq, auto_round:gptq, auto_gptq     GPTQ, zero points minus one (version 1)
    auto_round, auto_round:exllamav2                     GPTQ, zero points as they are (version 2)
    auto_round:gptqmodel                                 GPTQ, either: 1 in 0.5, 2 from 0.6 on
    auto_round:auto_awq, auto_round:awq                  AWQ's GEMM layout

GPTQ's layout has no g_idx here: inputs are in order. Which layers are quantised their tensors say
(`layer_rules.py`). Other packing formats hold floating-point codes or need AutoRound's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import FormatError
from .awq import Awq
from .checkpoint import Checkpoint
from .gptq import Gptq, version
from .layer_rules import of_auto_round

METHODS = ("auto-round", "intel/auto-round")
_AWQ, _EITHER = "awq", ""
_LAYOUTS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_gptq": "gptq",
    "auto_round:gptq:exllamav2": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:exllamav2": "gptq_v2",
    "auto_round:gptqmodel": _EITHER,
    "auto_round:auto_awq": _AWQ,
    "auto_round:awq": _AWQ,
}


def open_auto_round(
    checkpoint: Checkpoint, config: Mapping[str, Any], checkpoint_format: str | None = None
) -> Gptq | Awq:
    """The reader of a checkpoint; ``checkpoint_format`` overrides the version of a GPTQ layout."""
    where = f"{checkpoint.directory}: AutoRound config"
    packing = config.get("packing_format", config.get("backend"))
    layout = _LAYOUTS.get(packing) if isinstance(packing, str) else None
    if layout is None:
        raise FormatError(f"{where}: packing_format is {packing!r}; read are {', '.join(_LAYOUTS)}")
    rules = of_auto_round(config, where)
    if layout == _AWQ:
        if checkpoint_format is not None:
            raise FormatError(
                f"{where}: checkpoint_format={checkpoint_format!r} is for GPTQ, this checkpoint is "
                f"{packing!r}"
            )
        return Awq(checkpoint, {"bits": config["bits"]})
    if checkpoint_format is None and layout == _EITHER:
        raise FormatError(
            f"{where}: {packing!r} has zero points of either version, by AutoRound's own version; "
            "load it with checkpoint_format='gptq' (0.5) or 'gptq_v2' (0.6 and later)"
        )
    return Gptq(checkpoint, rules, version(checkpoint_format or layout, where))
