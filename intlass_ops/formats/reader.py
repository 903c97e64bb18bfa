"""`open_reader`: which of the formats a checkpoint directory is in, by what its config says."""

from __future__ import annotations

from typing import Any, Protocol

from ..nn import Activation
from . import FormatError, hqq, modelopt
from .auto_round import METHODS as AUTO_ROUND_METHODS
from .auto_round import open_auto_round
from .awq import Awq
from .bitsandbytes import open_bitsandbytes
from .checkpoint import Checkpoint, read_json
from .compressed_tensors import CompressedTensors
from .finegrained_fp8 import METHODS as FP8_METHODS
from .finegrained_fp8 import FinegrainedFp8
from .gptq import Gptq
from .layers import AnyStored
from .mxfp4 import Mxfp4
from .torchao import Torchao


class Reader(Protocol):
    """What a format offers: the linears of a checkpoint, one by one."""

    checkpoint: Checkpoint
    paths: list[str]  # modules whose weights are quantised

    def stored(self, path: str) -> AnyStored: ...

    def activation(self, path: str) -> Activation: ...


FORMATS = (
    "gptq", "awq", "compressed-tensors", "modelopt", "hqq", "torchao", "mxfp4", *FP8_METHODS,
    *AUTO_ROUND_METHODS, "bitsandbytes",
)  # fmt: skip


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """quantization_config of config.json, or what older writers put into a file of its own."""
    config = checkpoint.config.get("quantization_config")
    if config is None:
        config = checkpoint.config.get("compression_config")
    file = checkpoint.directory / "quantize_config.json"
    if config is None and file.is_file():
        config = {"quant_method": "gptq", **read_json(file)}
    file = checkpoint.directory / modelopt.CONFIG
    if config is None and file.is_file():
        config = modelopt.settings(read_json(file), str(file))
    if config is None and checkpoint.layers(hqq.MARKER):
        # HQQ's own files have no config for it: their layers describe themselves.
        config = {"quant_method": "hqq"}
    if not isinstance(config, dict):
        raise FormatError(
            f"{checkpoint.directory}: config.json has no quantization_config: this is not a "
            "quantised checkpoint (to quantise one: intlass quantize)"
        )
    return config


def open_reader(checkpoint: Checkpoint, *, checkpoint_format: str | None = None) -> Reader | Mxfp4:
    """The reader of a checkpoint, of its linears or, of MXFP4, of its fused experts.

    ``checkpoint_format`` overrides the version of a GPTQ one, AutoRound's too.

    Raises FormatError for a method that is not read and a config that does not make sense.

    >>> reader = open_reader(Checkpoint("llama-awq"))                          # doctest: +SKIP
    >>> reader.stored("model.layers.0.mlp.up_proj").load().dequantize()        # doctest: +SKIP
    """
    config = quantization_config(checkpoint)
    method = config.get("quant_method")
    if checkpoint_format is not None and method not in ("gptq", *AUTO_ROUND_METHODS):
        raise FormatError(
            f"{checkpoint.directory}: checkpoint_format={checkpoint_format!r} is for GPTQ, this "
            f"checkpoint is {method!r}"
        )
    if method == "gptq":
        return Gptq.of_config(checkpoint, config, checkpoint_format)
    if method in AUTO_ROUND_METHODS:
        return open_auto_round(checkpoint, config, checkpoint_format)
    if method == "bitsandbytes":
        return open_bitsandbytes(checkpoint, config)
    if method == "awq":
        return Awq(checkpoint, config)
    if method == "compressed-tensors":
        return CompressedTensors(checkpoint, config)
    if method == "modelopt":
        return modelopt.Modelopt(checkpoint, config)
    if method == "hqq":
        return hqq.Hqq(checkpoint)
    if method == "torchao":
        return Torchao(checkpoint)
    if method == "mxfp4":
        return Mxfp4(checkpoint)
    if method in FP8_METHODS:
        return FinegrainedFp8(checkpoint, config)
    raise FormatError(
        f"{checkpoint.directory}: quant_method is {method!r}; read are {', '.join(FORMATS)}"
    )
