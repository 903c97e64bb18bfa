"""NVFP4 and MXFP4 checkpoints that are refused, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tiny_checkpoints import FORMS, change, change_config, linears, write
from torch import Tensor

from intlass_ops.formats import FormatError
from intlass_ops.integrations.load_pretrained import load_pretrained

FP4 = ["packed nvfp4", "packed mxfp4", "modelopt nvfp4"]
UP = "model.layers.0.mlp.up_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
E4M3 = torch.float8_e4m3fn
PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
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


def with_nan(t: Tensor) -> Tensor:
    octets = t.clone().view(torch.uint8)
    octets[3, 0] = 255
    return octets.view(t.dtype)


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("packed nvfp4", "weight_scale", None, "weight_scale is missing"),
        ("packed nvfp4", "weight_global_scale", None, "weight_global_scale is missing"),
        ("packed nvfp4", "weight_scale", lambda t: t[:, :1], r"has shape \[48, 1\]; expected"),
        ("packed nvfp4", "weight_scale", lambda t: t[:-1], r"has shape \[47, 2\]; expected"),
        ("packed nvfp4", "weight_scale", lambda t: t.bfloat16(), "is BF16; expected float8_e4m3fn"),
        ("packed nvfp4", "weight_scale", with_nan, "weight_scale holds a NaN"),
        ("packed nvfp4", "weight_packed", lambda t: t[:, :-1], "K=30 is not a multiple of 16"),
        ("packed nvfp4", "weight_packed", lambda t: t[:, :, None], "expected 2 sizes"),
        ("packed nvfp4", "weight_global_scale", torch.zeros(1), r"scale is 0\.0; the file is dam"),
        ("packed nvfp4", "weight_global_scale", torch.tensor([1e-42]), "the file is damaged"),
        ("packed nvfp4", "weight_global_scale", torch.tensor([torch.nan]), "an infinity or a NaN"),
        ("packed nvfp4", "weight_global_scale", torch.ones(2), r"has shape \[2\]; expected \[1\]"),
        ("packed nvfp4", "weight_global_scale", torch.ones(1).double(), "is F64; expected"),
        ("packed nvfp4", "weight_zero_point", torch.zeros(48, 2), "weight_zero_point of an FP4"),
        ("packed nvfp4", "weight_g_idx", torch.zeros(32).int(), "weight_g_idx of an FP4 layer"),
        ("packed nvfp4", "bias", torch.zeros(47), r"bias is F32 \[47\]; expected"),
        ("packed mxfp4", "weight_scale", with_nan, "weight_scale holds a NaN"),
        ("packed mxfp4", "weight_scale", lambda t: t.view(E4M3), "no config group has weights of"),
        ("packed mxfp4", "weight_scale", lambda t: t.repeat(1, 2), r"\[64, 2\]; expected \[64, 1"),
        ("packed mxfp4", "weight_global_scale", torch.ones(1), "weight_global_scale of an FP4"),
        ("modelopt nvfp4", "weight_scale_2", None, "weight_scale_2 is missing"),
        ("modelopt nvfp4", "weight_scale_2", torch.tensor(torch.inf), "an infinity or a NaN"),
        (
            "modelopt nvfp4",
            "weight",
            torch.zeros(48, 32).to(E4M3),
            "weight_scale_2 of an FP8 layer",
        ),
        ("modelopt nvfp4", "weight", torch.zeros(48, 32), "weight is F32; expected uint8"),
        ("modelopt nvfp4", "weight_scale", torch.ones(()), "weight_scale is F32; expected float8"),
        ("modelopt nvfp4", "weight_scale", with_nan, "weight_scale holds a NaN"),
        ("modelopt nvfp4", "pre_quant_scale", torch.ones(32), "pre_quant_scale of an FP4 layer"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, name: str, part: str, value: Any, message: str
) -> None:
    write(tmp_path, FORMS[name])
    change(tmp_path, put(part, value))
    with pytest.raises(FormatError, match=rf"up_proj.*{message}"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "algorithm",
    ["FP8_PB_WO", "W4A8_AWQ", "NVFP4_AWQ", "NVFP4_SVD", "W4A8_NVFP4_FP8", "MXFP6", None, 4],
)
def test_other_algorithms_of_modelopt(tmp_path: Path, algorithm: Any) -> None:
    write(tmp_path, FORMS["modelopt nvfp4"])
    change_config(tmp_path, lambda config: config.update(quant_algo=algorithm))
    with pytest.raises(FormatError, match=rf"ModelOpt's config: quant_algo is {algorithm!r}; read"):
        load_pretrained(tmp_path)


def test_mixed_checkpoints_of_modelopt_name_the_layer(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS["modelopt nvfp4"])
    layers = {path: {"quant_algo": "NVFP4", "group_size": 16} for path in linears(expected)}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    change_config(tmp_path, lambda config: config.update(mixed))
    logits = load_pretrained(tmp_path)(PROMPT).logits
    torch.testing.assert_close(logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    layers[K_PROJ]["quant_algo"] = "NVFP4_AWQ"
    change_config(tmp_path, lambda config: config.update(mixed))
    with pytest.raises(FormatError, match=r"k_proj: quant_algo is 'NVFP4_AWQ'; read are NVFP4"):
        load_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config.update(quantized_layers=3))
    with pytest.raises(FormatError, match="quantized_layers is no object"):
        load_pretrained(tmp_path)


FP6_GROUP = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 6, "type": "float"}}


def test_mixed_checkpoints_of_compressed_tensors_name_the_layer(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS["packed nvfp4"])

    def both(config: dict[str, Any]) -> None:
        config["format"] = "mixed-precision"
        config["config_groups"]["group_1"] = FP6_GROUP

    change_config(tmp_path, both)  # as long as no layer is of that group, it does not matter
    logits = load_pretrained(tmp_path)(PROMPT).logits
    torch.testing.assert_close(logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)

    def in_fp8(tensors: Tensors) -> None:
        for part in ("weight_packed", "weight_global_scale", "input_global_scale"):
            del tensors[f"{K_PROJ}.{part}"]
        tensors[f"{K_PROJ}.weight"] = torch.ones(16, 32).to(E4M3)
        tensors[f"{K_PROJ}.weight_scale"] = torch.ones(16, 1)

    change(tmp_path, in_fp8)
    with pytest.raises(FormatError, match=r"self_attn\.k_proj: no config group has weights of 8 "):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"type": "complex"}, "weights of type 'complex'; expected 'int' or 'float'"),
        ({"num_bits": None}, "num_bits is None; expected an integer"),
        ({"num_bits": 8}, "no config group has weights of 4 floating-point bits in groups of 16"),
        ({"group_size": 32}, "no config group has weights of 4 floating-point bits in groups of"),
        ({"group_size": [16]}, "no config group has weights of 4 floating-point bits"),
        ({"type": "int"}, "no config group has weights of 4 floating-point bits"),
    ],
)
def test_configs_that_say_otherwise(tmp_path: Path, weights: dict[str, Any], message: str) -> None:
    write(tmp_path, FORMS["packed nvfp4"])
    change_config(
        tmp_path, lambda config: config["config_groups"]["group_0"]["weights"].update(weights)
    )
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)


def test_int8_codes_under_a_config_of_fp4(tmp_path: Path) -> None:
    write(tmp_path, FORMS["int w8a8"])
    groups = FORMS["packed nvfp4"].config["config_groups"]
    change_config(tmp_path, lambda config: config.update(config_groups=groups))
    with pytest.raises(FormatError, match="no config group has integer weights"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", [*FP4, "gptq v1"])
def test_fp8_without_a_meaning_is_not_taken_for_numbers(tmp_path: Path, name: str) -> None:
    write(tmp_path, FORMS[name])
    change(tmp_path, put("weight", lambda t: t.to(E4M3), "lm_head"))
    with pytest.raises(FormatError, match=r"lm_head\.weight is F8_E4M3, which is not read"):
        load_pretrained(tmp_path)
