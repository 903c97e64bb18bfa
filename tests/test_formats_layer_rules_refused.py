"""Configs and tensors of GPTQ's relatives, AutoRound and LLM.int8 that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tiny_checkpoints import FORMS, change, change_config, write
from torch import Tensor

from intlass_ops.formats import FormatError
from intlass_ops.integrations.load_pretrained import load_pretrained

DOWN = "model.layers.0.mlp.down_proj"
Tensors = dict[str, Tensor]


def rule(**overrides: Any) -> dict[str, Any]:
    return {"dynamic": {"+:.*up_proj": overrides}}


def extra(**overrides: Any) -> dict[str, Any]:
    return {"extra_config": {".*up_proj": overrides}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq v1", {"dynamic": ["x"]}, r"dynamic is \['x'\]; expected an object"),
        ("gptq v1", {"dynamic": {"x": 8}}, "dynamic rule 'x' is 8; expected an object"),
        ("gptq v1", rule(bits=6), r"rule '\+:.\*up_proj': bits is 6; expected one of 2, 3, 4, 8"),
        ("gptq v1", rule(group_size=0), r"rule '\+:.*': group_size is 0; expected -1 or more"),
        ("gptq v1", rule(sym="yes"), "sym is 'yes'; expected true or false"),
        ("gptq v1", rule(pack_dtype="int64"), "rule .* pack_dtype is 'int64'; expected int32"),
        ("gptq v1", rule(adapter={"rank": 8}), r"rule '.*up_proj': 'adapter' is not supported"),
        ("gptq v1", rule(format="marlin"), r"'format' is not supported \(it is 'marlin'\)"),
        ("gptq v1", {"group_size": "x"}, "group_size is 'x'; expected an integer"),
        ("gptq v1", {"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ("gptq v1", {"checkpoint_format": None, "format": "gptq_p"}, "is 'gptq_p'; expected gptq"),
        ("gptq v1", {"rotation": "hadamard"}, "rotation='hadamard' is not supported"),
        ("gptq v1 dynamic", {"dynamic": {}}, "fields of 4 bits"),
        ("gptq v1 dynamic", {"dynamic": {"x": {"bits": 8}}}, "N=.* fields of 4 or 8 bits"),
        (
            "auto-round gptq",
            {"packing_format": "auto_round:llm_compressor"},
            "llm_compressor'; read",
        ),
        (
            "auto-round gptq",
            {"packing_format": None},
            "packing_format is None; read are auto_round",
        ),
        ("auto-round gptq", {"packing_format": ["x"]}, r"packing_format is \['x'\]; read are"),
        ("auto-round gptq", {"data_type": "mx_fp"}, "data_type is 'mx_fp'; expected 'int'"),
        ("auto-round gptq", {"act_bits": 8}, "act_bits is 8: these activations are not supported"),
        ("auto-round gptq", {"rotation_config": {"x": 1}}, "'rotation_config' is not supported"),
        ("auto-round gptq", extra(act_bits=8), r"rule '\.\*up_proj': act_bits is 8"),
        ("auto-round gptq", extra(bits=8, data_type="fp"), "rule .* data_type is 'fp'"),
        ("auto-round gptq", extra(super_bits=6), r"'super_bits' is not supported \(it is 6\)"),
        ("auto-round gptq", extra(in_blocks=True), "rule '.*': 'in_blocks' is not supported"),
        ("auto-round gptq", extra(bits=5), "rule .* bits is 5; expected one of 2, 3, 4, 8"),
        ("auto-round mixed", {"extra_config": {}}, "fields of 4 bits"),
        ("auto-round awq", {"bits": 8}, "bits is 8; expected one of 4"),
        ("bitsandbytes int8", {"load_in_8bit": False, "load_in_4bit": True}, "no quantised weight"),
        ("bitsandbytes int8", {"load_in_8bit": None}, "load_in_8bit is None; expected true"),
    ],
)
def test_configs_that_are_not_read_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, FORMS[name])
    change_config(tmp_path, lambda c: c.update(changes))
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)


def put(part: str, value: Any) -> Callable[[Tensors], None]:
    """Replaces a tensor of a layer; None: takes it out."""

    def edit(tensors: Tensors) -> None:
        if value is None:
            del tensors[f"{DOWN}.{part}"]
        else:
            old = tensors[f"{DOWN}.{part}"]
            tensors[f"{DOWN}.{part}"] = value(old).contiguous()

    return edit


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("gptq v1 3 bits", "qweight", lambda t: t[:-1], "qweight has 5 rows, not a multiple of 3"),
        ("gptq v1 3 bits", "qzeros", lambda t: t[:, :-1], "qzeros has 2 words a row, which are"),
        ("auto-round gptq", "qzeros", None, "qzeros is missing"),
        ("bitsandbytes int8", "SCB", None, "SCB is missing"),
        ("bitsandbytes int8", "SCB", lambda t: t[:-1], r"SCB has shape \[31\]; expected \[32\]"),
        ("bitsandbytes int8", "SCB", lambda t: t.half(), "SCB is F16; expected float32"),
        ("bitsandbytes int8", "SCB", lambda t: t / 0, "SCB holds an infinity"),
        ("bitsandbytes int8", "weight", lambda t: t.half(), "weight is F16; expected int8"),
        ("bitsandbytes int8", "weight_format", lambda t: t + 2, "weight_format is 2; expected 0"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, part: str, value: Any, message: str
) -> None:
    write(tmp_path, FORMS[name])
    change(tmp_path, put(part, value))
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)
