"""FP8 checkpoints that are refused, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from fp8_case import E4M3
from tiny_checkpoints import FORMS, change, change_config, write
from torch import Tensor

from intlass_ops.formats import FormatError
from intlass_ops.integrations.load_pretrained import load_pretrained

UP = "model.layers.0.mlp.up_proj"
GROUPS = "config_groups"
Tensors = dict[str, Tensor]


def put(part: str, value: Any, path: str = UP) -> Callable[[Tensors], None]:
    """Replaces a tensor by another, or by what a function makes of it; None: takes it out."""

    def edit(tensors: Tensors) -> None:
        name = f"{path}.{part}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]).contiguous() if callable(value) else value

    return edit


def with_nan(octet: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        octets = t.clone().view(torch.uint8)
        octets[3, 1] = octet
        return octets.view(t.dtype)

    return change


SCALE = "weight_scale_inv"


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("fp8 blocks", "weight", with_nan(0x7F), "weight holds a NaN; the file is damaged"),
        ("fp8 blocks", "weight", with_nan(0xFF), "weight holds a NaN; the file is damaged"),
        ("fp8 blocks", "weight", lambda t: t.to(torch.float8_e5m2), "weight is F8_E5M2; expected"),
        ("fp8 blocks", "weight", lambda t: t[:, None], "weight has shape .* expected 2 sizes"),
        ("fp8 blocks", "weight", lambda t: t[:, :-16], r"\[2, 2\]; expected .* or \[2, 1\]"),
        ("fp8 blocks", SCALE, None, "weight_scale_inv is missing"),
        ("fp8 blocks", SCALE, lambda t: t[:1], r"\[1, 2\]; expected \[1, 1\] or \[2, 2\] or \[48,"),
        ("fp8 blocks", SCALE, lambda t: t[None], r"weight_scale_inv has shape .* expected 2 sizes"),
        ("fp8 blocks", SCALE, lambda t: t.double(), "weight_scale_inv is F64; expected float16"),
        ("fp8 blocks", SCALE, lambda t: t.to(torch.float8_e5m2), "is F8_E5M2; expected float16"),
        ("packed mxfp8", "weight_scale", lambda t: t | 255, "weight_scale holds a NaN; the file"),
        ("fp8 blocks", SCALE, lambda t: t.fill_(torch.nan), "an infinity or a NaN"),
        ("fp8 blocks", SCALE, lambda t: t.fill_(torch.inf), "an infinity or a NaN"),
        ("fp8 blocks", "weight_scale", torch.ones(()), "weight_scale of an FP8 layer: this is not"),
        ("fp8 blocks", "bias", torch.zeros(47), r"bias is F32 \[47\]; expected"),
        ("fp8 per tensor", SCALE, lambda t: t.repeat(2), r"has shape \[2\]; expected \[1\]"),
        ("fp8 per tensor", SCALE, torch.ones(2, 2), r"\[2, 2\]; expected \[1, 1\] or \[48, 1\]"),
        ("fp8 per tensor", SCALE, torch.tensor(torch.nan), "an infinity or a NaN"),
        ("fbgemm fp8", "weight_scale", lambda t: t[:-1], r"shape \[47, 1\]; expected .*\[48, 1\]"),
        ("fbgemm fp8", "weight_scale", None, "weight_scale is missing"),
        ("packed fp8", "weight_scale", None, r"\.weight is F8_E4M3, which is not read"),
        ("packed fp8", "weight_scale", torch.ones(48, 2), r"\[48, 2\]; expected .*\[48, 1\]"),
        ("packed fp8", "weight_zero_point", torch.zeros(48, 1), "weight_zero_point of an FP8"),
        ("packed fp8", "weight_g_idx", torch.zeros(32).int(), "weight_g_idx of an FP8 layer"),
        ("packed fp8", "weight", with_nan(0xFF), "weight holds a NaN; the file is damaged"),
        ("modelopt fp8", "weight_scale", torch.ones(48), r"shape \[48\]; expected \[1\]"),
        ("modelopt fp8", "weight_scale", torch.ones(()).to(E4M3), "weight_scale is F8_E4M3"),
        ("modelopt fp8", "pre_quant_scale", torch.ones(32), "pre_quant_scale of an FP8 layer"),
        ("modelopt fp8", "weight_scale_2", torch.ones(()), "weight_scale_2 of an FP8 layer"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, name: str, part: str, value: Any, message: str
) -> None:
    write(tmp_path, FORMS[name])
    change(tmp_path, put(part, value))
    with pytest.raises(FormatError, match=rf"up_proj.*{message}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("value", [16, [16], [16, 16, 16], [0, 16], [16, -1], [True, 16], "16x16"])
def test_block_sizes_that_are_none(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "fp8", FORMS["fp8 blocks"])
    change_config(tmp_path / "fp8", lambda config: config.update(weight_block_size=value))
    with pytest.raises(FormatError, match=r"weight_block_size is .*; expected two positive int"):
        load_pretrained(tmp_path / "fp8")
    write(tmp_path / "packed", FORMS["packed fp8 blocks"])
    change_config(
        tmp_path / "packed",
        lambda config: config[GROUPS]["group_0"]["weights"].update(block_structure=value),
    )
    with pytest.raises(FormatError, match=r"group_0: block_structure is .*; expected two positive"):
        load_pretrained(tmp_path / "packed")


def test_blocks_that_cut_k_too_small(tmp_path: Path) -> None:
    write(tmp_path, FORMS["fp8 blocks"])
    change_config(tmp_path, lambda config: config.update(weight_block_size=[24, 20]))

    def fewer(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(SCALE)]:
            n, k = tensors[name.removesuffix("_scale_inv")].shape
            tensors[name] = torch.ones(-(-n // 24), -(-k // 20))

    change(tmp_path, fewer)
    message = "blocks of 20 columns cut K=48 into groups of 4, which is not a multiple of 16"
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)


def test_blocks_of_several_sizes_that_fit(tmp_path: Path) -> None:
    write(tmp_path, FORMS["packed fp8 blocks"])

    def more(config: dict[str, Any]) -> None:
        group = config[GROUPS]["group_0"]
        other = {**group, "weights": {**group["weights"], "block_structure": [25, 16]}}
        config[GROUPS]["group_1"] = other

    change_config(tmp_path, more)
    with pytest.raises(FormatError, match=r"fits blocks of several sizes: \[\(24, 16\), \(25, 16"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("weights", [{"num_bits": 4}, {"num_bits": 6}, {"type": "int"}])
def test_configs_that_say_otherwise(tmp_path: Path, weights: dict[str, Any]) -> None:
    write(tmp_path, FORMS["packed fp8"])
    change_config(tmp_path, lambda config: config[GROUPS]["group_0"]["weights"].update(weights))
    with pytest.raises(FormatError, match="no config group has weights of 8 floating-point bits"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["fp8 blocks", "fbgemm fp8", "packed fp8", "modelopt fp8"])
def test_scales_of_a_layer_that_is_not_fp8(tmp_path: Path, name: str) -> None:
    """A floating weight that has scales all the same would be a silent error."""
    expected = write(tmp_path, FORMS[name])
    change(tmp_path, put("weight", expected.get_submodule(UP).weight.data))
    with pytest.raises(FormatError, match=r"up_proj.*(unexpected|expected)|unexpected.*up_proj"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["packed fp8", "modelopt fp8"])
def test_fp8_without_a_meaning_is_not_taken_for_numbers(tmp_path: Path, name: str) -> None:
    write(tmp_path, FORMS[name])
    change(tmp_path, put("weight", lambda t: t.to(E4M3), "lm_head"))
    with pytest.raises(FormatError, match=r"lm_head\.weight is F8_E4M3, which is not read"):
        load_pretrained(tmp_path)


def test_tables_in_fp8(tmp_path: Path) -> None:
    write(tmp_path, FORMS["fp8 blocks"])

    def table(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(E4M3)
        tensors["model.embed_tokens.weight_scale_inv"] = torch.ones(())

    change(tmp_path, table)
    with pytest.raises(ValueError, match=r"embed_tokens is quantised .* it is a Embedding"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("octet", [0x7F, 0xFF])
def test_a_nan_in_our_own_layout(tmp_path: Path, octet: int) -> None:
    write(tmp_path / "theirs", FORMS["fp8 blocks"])
    load_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    change(tmp_path / "ours", put("weight", with_nan(octet)))
    with pytest.raises(FormatError, match=r"up_proj\.weight holds a NaN; the file is damaged"):
        load_pretrained(tmp_path / "ours")
