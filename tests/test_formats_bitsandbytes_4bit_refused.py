"""NF4 checkpoints that are refused, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from nf4_case import STATE, draw_nf4, state_of, text_of
from tiny_checkpoints import BLOCKS_OF_64, FORMS, change, change_config, write, write_experts
from torch import Tensor

from intlass_ops.formats import FormatError
from intlass_ops.integrations.load_pretrained import load_pretrained

UP = "model.layers.0.mlp.up_proj"
N, K = 128, 64  # of it
SINGLE, DOUBLE = "bitsandbytes nf4", "bitsandbytes nf4 double"
MAP, NESTED = "weight.nested_quant_map", "weight.nested_absmax"
Tensors = dict[str, Tensor]


def put(part: str, value: Any) -> Callable[[Tensors], None]:
    """Replaces a tensor by another, or by what a function makes of it; None: takes it out."""

    def edit(tensors: Tensors) -> None:
        name = f"{UP}.{part}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]).contiguous() if callable(value) else value

    return edit


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        (SINGLE, "weight", None, "weight is missing"),
        (SINGLE, "weight", lambda t: t[:-1], r"\[4095, 1\]; expected 4096 bytes"),
        (SINGLE, "weight", lambda t: t.view(1, -1), r"\[1, 4096\]; expected 4096 bytes"),
        (SINGLE, "weight", lambda t: t.view(N, -1), r"\[128, 32\]; expected 4096 bytes"),
        (SINGLE, "weight", lambda t: t.flatten(), "weight has shape .* expected 2 sizes"),
        (SINGLE, "weight", lambda t: t.int(), "weight is I32; expected uint8, int8"),
        (SINGLE, "weight.absmax", None, "absmax is missing"),
        (SINGLE, "weight.absmax", lambda t: t[:-1], r"absmax has shape \[127\]; expected \[128\]"),
        (SINGLE, "weight.absmax", lambda t: t.double(), "absmax is F64; expected float32"),
        (SINGLE, "weight.absmax", lambda t: t.fill_(torch.nan), "an infinity or a NaN"),
        (
            SINGLE,
            "weight.absmax",
            lambda t: t.to(torch.uint8),
            "nested_blocksize is None; expected",
        ),
        (SINGLE, "weight.quant_map", None, "quant_map is missing"),
        (SINGLE, "weight.quant_map", lambda t: t.flip(0), "quant_map has other numbers than NF4"),
        (SINGLE, "weight.quant_map", lambda t: t + 1e-4, "quant_map has other numbers than NF4"),
        (SINGLE, "weight.quant_map", lambda t: t * torch.nan, "quant_map has other numbers than"),
        (SINGLE, "weight.quant_map", torch.zeros(256), r"\[256\]; expected \[16\]"),
        (SINGLE, STATE, None, "quant_state.bitsandbytes__nf4 is missing"),
        (SINGLE, STATE, torch.zeros(1 << 17, dtype=torch.uint8), "131072 bytes, too many"),
        (SINGLE, STATE, lambda t: t[:-1], "quant_state.bitsandbytes__nf4 is not JSON"),
        (SINGLE, STATE, lambda t: t.fill_(ord("[")), "quant_state.bitsandbytes__nf4 is not JSON"),
        (SINGLE, STATE, lambda t: t.int(), "bitsandbytes__nf4 is I32; expected uint8"),
        (SINGLE, STATE, text_of([1]), r"quant_type is \[1\]; expected 'nf4'"),
        (SINGLE, NESTED, torch.ones(1), "weight.nested_absmax of an NF4 layer: this is not read"),
        (SINGLE, "scales", torch.ones(1), "scales of an NF4 layer: this is not read"),
        (SINGLE, "weight.quant_state.x", torch.ones(1), "weight.quant_state.x of an NF4 layer"),
        (
            SINGLE,
            "weight.quant_state.bitsandbytes__fp4",
            torch.ones(1),
            "weight.quant_state.bitsandbytes__fp4 of an NF4 layer: this is not read",
        ),
        (SINGLE, "bias", torch.zeros(47), r"bias is F32 \[47\]; expected"),
        (DOUBLE, "weight.absmax", lambda t: t[:-1], r"absmax has shape \[127\]; expected \[128\]"),
        (DOUBLE, "weight.absmax", lambda t: t.float(), "weight.nested_absmax, .* of an NF4 layer"),
        (DOUBLE, NESTED, None, "nested_absmax is missing"),
        (DOUBLE, NESTED, lambda t: t[:-1], r"nested_absmax has shape \[7\]; expected \[8\]"),
        (DOUBLE, NESTED, lambda t: t.half(), "nested_absmax is F16; expected float32"),
        (DOUBLE, NESTED, lambda t: t.fill_(torch.inf), "an infinity or a NaN"),
        (DOUBLE, NESTED, lambda t: t.fill_(3e38), "an infinity; the file is damaged"),
        (DOUBLE, MAP, None, "nested_quant_map is missing"),
        (DOUBLE, MAP, lambda t: t[:16], r"nested_quant_map has shape \[16\]; expected \[256\]"),
        (DOUBLE, MAP, lambda t: t.fill_(torch.nan), "an infinity or a NaN"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, name: str, part: str, value: Any, message: str
) -> None:
    write(tmp_path, FORMS[name])

    def edit(tensors: Tensors) -> None:
        if name == DOUBLE and message.endswith("infinity; the file is damaged"):
            tensors[f"{UP}.{MAP}"].fill_(2)
        put(part, value)(tensors)

    change(tmp_path, edit)
    with pytest.raises(FormatError, match=rf"up_proj.*{message}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type is 'fp4'; expected 'nf4'"),
        ({"quant_type": None}, "quant_type is None; expected 'nf4'"),
        ({"shape": None}, "shape is None; expected two positive integers"),
        ({"shape": [K]}, r"shape is \[64\]; expected two positive integers: \[N, K\]"),
        ({"shape": [N, K, 1]}, r"shape is \[128, 64, 1\]"),
        ({"shape": [N, -K]}, r"shape is \[128, -64\]"),
        ({"shape": [N, 64.0]}, r"shape is \[128, 64\.0\]"),
        ({"shape": [True, K]}, r"shape is \[True, 64\]"),
        ({"shape": [2**62, 2**62]}, "shape is .* expected two positive integers"),
        ({"shape": [2**30, 2**30]}, r"\[2048, 1\]; expected 576460752303423488 bytes"),
        ({"shape": [K, N]}, r"up_proj is \(64, 128\) in the checkpoint and \(128, 64\) in the"),
        ({"blocksize": 0}, "blocksize is 0; expected a positive integer"),
        ({"blocksize": "64"}, "blocksize is '64'; expected a positive integer"),
        ({"blocksize": True}, "blocksize is True; expected a positive integer"),
        ({"blocksize": 128}, "K=64 is not a multiple of blocksize=128: blocks that run on"),
        ({"blocksize": 8}, "blocksize=8 is not a multiple of 16"),
        ({"blocksize": 32}, r"absmax has shape \[128\]; expected \[256\]"),
        ({"nested_blocksize": -1}, "nested_blocksize is -1; expected a positive integer"),
        ({"nested_blocksize": 2**63}, "nested_blocksize is .* expected a positive integer"),
        ({"nested_blocksize": 1 << 30}, r"nested_absmax has shape \[8\]; expected \[1\]"),
        ({"nested_dtype": "bfloat16"}, "nested_dtype is 'bfloat16'; expected 'float32'"),
        ({"nested_offset": None}, "nested_offset is None; expected a finite number"),
        ({"nested_offset": "1"}, "nested_offset is '1'; expected a finite number"),
        ({"nested_offset": float("nan")}, "nested_offset is nan; expected a finite number"),
        ({"nested_offset": float("inf")}, "nested_offset is inf; expected a finite number"),
        ({"nested_offset": 10**400}, "nested_offset is 1000.* expected a finite number"),
    ],
)
def test_what_the_json_says_is_not_trusted(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, FORMS[DOUBLE])
    state = state_of(draw_nf4(N, K, 0, double=True)) | changes
    change(tmp_path, put(STATE, text_of(state)))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert isinstance(error.value, FormatError) or changes == {"shape": [K, N]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "nf5"}, "quant_type is 'nf5'; expected 'nf4' or 'fp4'"),
        ({"load_in_4bit": False}, "load_in_8bit is False; expected true, or load_in_4bit"),
        ({"load_in_4bit": "yes"}, "load_in_8bit is False; expected true, or load_in_4bit"),
    ],
)
def test_configs_that_say_otherwise(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, FORMS[SINGLE])
    change_config(tmp_path, lambda config: config.update(changes))
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)


def test_a_weight_whose_parts_are_lost(tmp_path: Path) -> None:
    write(tmp_path, FORMS[SINGLE])

    def lose(tensors: Tensors) -> None:
        for name in [each for each in tensors if each.startswith(f"{UP}.weight.")]:
            del tensors[name]

    change(tmp_path, lose)
    with pytest.raises(FormatError, match=r"up_proj: .*bitsandbytes__nf4 is missing"):
        load_pretrained(tmp_path)


def test_parts_of_a_weight_that_is_not_quantised(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS[SINGLE])
    change(tmp_path, put("weight", expected.get_submodule(UP).weight.data))
    with pytest.raises(FormatError, match=r"up_proj: weight is torch\.float32 .*; expected 4096"):
        load_pretrained(tmp_path)


def test_blocks_that_run_on_into_the_next_row(tmp_path: Path) -> None:
    write(tmp_path, FORMS[SINGLE])
    state = {**state_of(draw_nf4(N, K, 0)), "shape": [N * K // 32, 32]}
    change(tmp_path, put(STATE, text_of(state)))
    with pytest.raises(FormatError, match="K=32 is not a multiple of blocksize=64: blocks that"):
        load_pretrained(tmp_path)


def test_experts(tmp_path: Path) -> None:
    form = FORMS[SINGLE]
    form = type(form)({**form.draw, "group": 16}, form.store, form.config, make=form.make)
    write_experts(tmp_path, form)
    with pytest.raises(FormatError, match="experts in nf4 are not read"):
        load_pretrained(tmp_path)


def test_experts_in_our_own_layout(tmp_path: Path) -> None:
    write(tmp_path / "theirs", FORMS[SINGLE])
    load_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")

    def more(config: dict[str, Any]) -> None:
        config["layers"][0]["tensors"] = {
            "weight": ["uint8", [4, N, K // 2]], "scales": ["float32", [4, N, 1]],
        }  # fmt: skip

    change_config(tmp_path / "ours", more)
    with pytest.raises(FormatError, match=r"not a layer .*expected uint8"):
        load_pretrained(tmp_path / "ours")


def test_sizes_of_the_model_are_those_of_these_tests() -> None:
    assert (BLOCKS_OF_64["intermediate_size"], BLOCKS_OF_64["hidden_size"]) == (N, K)
