"""Checkpoints with a linear in FP8 for each expert: joined, and in our own layout.

Dense layers in FP8 are in test_formats_fp8.py, what the layers compute in test_fp8_linear.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from fp8_case import E4M3, draw_fp8
from tiny_checkpoints import FORMS, FP8_CONFIG, change, fp8, save, write_experts
from torch import Tensor

from intlass_ops import Fp8ExpertLinear
from intlass_ops.formats import FormatError
from intlass_ops.formats.experts import stacked
from intlass_ops.formats.fp4 import StoredFp4
from intlass_ops.formats.fp8 import StoredFp8
from intlass_ops.formats.layers import LayerSpec, fp8_spec, layer_of, read_specs, write_specs
from intlass_ops.integrations.load_pretrained import load_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
FP8 = [name for name in FORMS if "fp8" in name]
UP = "model.layers.1.block_sparse_moe.experts.2.w3"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj_quantized"


def experts_of(model: Any) -> dict[str, Fp8ExpertLinear]:
    named = model.named_modules()
    return {path: each for path, each in named if isinstance(each, Fp8ExpertLinear)}


@torch.no_grad()
@pytest.mark.parametrize("model", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("name", FP8)
def test_experts_of_a_checkpoint_are_joined(tmp_path: Path, name: str, model: str) -> None:
    expected = write_experts(tmp_path / "theirs", FORMS[name], model)
    loaded = load_pretrained(tmp_path / "theirs")
    layers = experts_of(loaded)
    assert len(layers) == 4
    for path, layer in layers.items():
        dense = expected.get_parameter(path.removesuffix("_quantized"))
        assert torch.equal(layer.dequantize(), dense)
    logits, options = loaded(PROMPT).logits, {"max_new_tokens": 12, "do_sample": False}
    torch.testing.assert_close(logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    generated = loaded.generate(PROMPT, **options)
    assert torch.equal(generated, expected.generate(PROMPT, **options))

    loaded.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert again.state_dict().keys() == loaded.state_dict().keys()
    assert torch.equal(again(PROMPT).logits, logits)
    assert torch.equal(again.generate(PROMPT, **options), generated)

    plain = loaded.dequantize()
    assert not experts_of(plain)
    for path, parameter in expected.named_parameters():
        assert torch.equal(plain.get_parameter(path), parameter)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fp8 blocks", "modelopt fp8"])
def test_loads_onto_a_device_in_bfloat16(tmp_path: Path, name: str, device: str) -> None:
    expected = write_experts(tmp_path, FORMS[name])
    model = load_pretrained(tmp_path, device_map=device, dtype=torch.bfloat16)
    assert {b.device.type for b in model.state_dict().values()} == {device}
    for layer in experts_of(model).values():
        assert (layer.weight.dtype, layer.scales.dtype) == (E4M3, torch.float32)
    logits, reference = model(PROMPT.to(device)).logits, expected(PROMPT).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.cpu().float() - reference).norm() < 0.05 * reference.norm()


def test_a_number_for_gate_and_another_for_up(tmp_path: Path) -> None:
    write_experts(tmp_path, FORMS["modelopt fp8"])
    before = load_pretrained(tmp_path).get_submodule(GATE_UP)
    change(tmp_path, lambda tensors: tensors[f"{UP}.weight_scale"].fill_(0.25))
    layer = load_pretrained(tmp_path).get_submodule(GATE_UP)
    assert layer.scales.shape == (4, 96, 1)
    assert set(layer.scales[2, 48:].flatten().tolist()) == {0.25}
    assert torch.equal(layer.scales[2, :48], before.scales[2, :48])
    assert torch.equal(layer.weight.view(torch.uint8), before.weight.view(torch.uint8))


def stored(name: str, n: int, k: int, block: Any, dtype: torch.dtype = torch.float32) -> Any:
    w = draw_fp8(n, k, len(name), block=block, dtype=dtype)
    groups = k // (block[1] or k)
    return w, StoredFp8(name, (n, k), groups, dtype, w.codes, w.rows)


@pytest.mark.parametrize(
    ("blocks", "groups", "dtype"),
    [
        ([(1, None), (1, 32)], 3, torch.float32),
        ([(1, 48), (1, 32)], 6, torch.float32),
        ([(None, None), (16, 16)], 6, torch.float32),
        ([(1, 32), (1, 32)], 3, torch.bfloat16),
    ],
)
def test_groups_that_differ_become_smaller_ones(
    blocks: list[Any], groups: int, dtype: torch.dtype
) -> None:
    """Gate and up, with two experts each; one of up's has scales in float32."""
    parts, dense = [], []
    for n, block in zip((16, 32), blocks, strict=True):
        every = [stored(f"{block}{e}", n, 96, block, dtype) for e in range(2)]
        parts.append([each for _, each in every])
        dense.append(torch.stack([w.dense() for w, _ in every]))
    spec, read = stacked("x", parts, None)
    layer = layer_of(spec.kind, 96, None, {name: get() for name, get in read.items()})
    assert isinstance(layer, Fp8ExpertLinear)
    assert layer.scales.shape == (2, 48, groups)
    assert layer.scales.dtype == dtype
    assert torch.equal(layer.dequantize(), torch.cat(dense, 1))


def test_types_of_scales_that_differ_become_one() -> None:
    pair = [stored(f"{i}", 16, 32, (1, 16), t) for i, t in enumerate((torch.half, torch.bfloat16))]
    spec, read = stacked("x", [[each for _, each in pair]], None)
    assert read["scales"]().dtype == torch.float32
    layer = layer_of(spec.kind, 32, None, {name: get() for name, get in read.items()})
    assert isinstance(layer, Fp8ExpertLinear)
    assert torch.equal(layer.dequantize(), torch.stack([w.dense() for w, _ in pair]))


def test_experts_that_cannot_be_joined() -> None:
    _, first = stored("a", 16, 240, (1, 80))
    _, other = stored("b", 16, 240, (1, 48))
    _, more = stored("c", 16, 240, (1, 40))
    spec, _ = stacked("x", [[first, other]], None)
    assert {name: shape for name, _, shape in spec.tensors}["scales"] == (2, 16, 15)
    with pytest.raises(FormatError, match=r"^x: the experts differ in their groups: \[40, 48\]"):
        stacked("x", [[other, more]], None)
    of_fp4 = StoredFp4("d", "mxfp4", (16, 240), None, Tensor, Tensor)
    with pytest.raises(FormatError, match=r"^x: a and d are not stored alike"):
        stacked("x", [[first, of_fp4]], None)


def write_deepseek(directory: Path, layer: int) -> Any:
    """A tiny DeepSeek-V3 that has one more layer, of some number, which predicts a second token."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        n_group=1, topk_group=1, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=None, pad_token_id=0,
        architectures=["DeepseekV3ForCausalLM"], dtype="float32",
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    dense = revert_weight_conversion(model, model.state_dict())
    state = dict(dense)
    quantised = [n for n in dense if n.endswith("weight") and ("_proj" in n or "experts" in n)]
    for seed, name in enumerate(quantised):
        w = draw_fp8(*dense[name].shape, seed, block=(24, 16))
        dense[name] = w.dense()
        path = name.removesuffix(".weight")
        state |= {f"{path}.{part}": t for part, t in fp8(w, "weight_scale_inv").items()}
        if ".layers.1." in name:
            further = path.replace(".layers.1.", f".layers.{layer}.")
            copied = {part: t.clone() for part, t in fp8(w, "weight_scale_inv").items()}
            state |= {f"{further}.{part}": t for part, t in copied.items()}
    state[f"model.layers.{layer}.enorm.weight"] = torch.ones(32)
    save(directory, state, FP8_CONFIG, config)
    return DeepseekV3ForCausalLM.from_pretrained(None, config=config, state_dict=dense).eval()


@torch.no_grad()
def test_layers_that_predict_more_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3 is published with one, number 61, which transformers does without."""
    expected = write_deepseek(tmp_path / "theirs", 61)
    model = load_pretrained(tmp_path / "theirs")
    assert len(experts_of(model)) == 2
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert not any(".61." in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(PROMPT).logits, model(PROMPT).logits)
    write_deepseek(tmp_path / "other", 60)
    with pytest.raises(ValueError, match=r"layers\.60\..* but in the model it is no such module"):
        load_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "nvfp4", r"Fp4ExpertLinear: weight is torch\.float8_e4m3fn"),
        ("kind", "int8", r"IntExpertLinear: weight is torch\.float8_e4m3fn"),
        ("in_features", 64, "kind 'fp8' of in_features 32, by its tensors; expected 'fp8' of 64"),
        ("activation", "int8", "kind 'fp8' with quantised activations"),
        ("bias", ["float32", [4, 96]], "kind 'fp8' with bias"),
        ("zeros", ["uint8", [4, 96, 2]], "kind 'fp8' with zeros"),
        ("scales", ["float32", [4, 96, 3]], "3 scales a row of K=32"),
        ("scales", ["uint8", [4, 96, 2]], r"scales are torch\.uint8"),
        ("scales", ["float8_e4m3fn", [4, 96, 2]], "scales is float8_e4m3fn"),
        ("weight", ["int8", [4, 96, 32]], r"weight is torch\.int8"),
        ("weight", ["float8_e5m2", [4, 96, 32]], "float8_e5m2"),
    ],
)
def test_damaged_descriptions_of_our_own(key: str, value: Any, message: str) -> None:
    spec = fp8_spec((4, 96, 32), 2, torch.float32)
    config = write_specs({"a": spec, "b": spec})
    (entry,) = config["layers"]
    found = read_specs("here", config)["b"]
    assert LayerSpec.of(found.module()) == found == spec
    (entry if key in entry else entry["tensors"])[key] = value
    with pytest.raises(FormatError, match=rf"^here: layers\[0\]: not a layer .*{message}"):
        read_specs("here", config)
