"""Checkpoints with a linear in FP4 for each expert: joined, damaged, and in our own layout.

Dense layers in FP4 are in test_formats_fp4.py, gpt-oss's fused experts in test_experts.py, what the
layers compute in test_fp4_experts.py.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tiny_checkpoints import FORMS, change, write_experts
from torch import Tensor

from intlass_ops import Fp4ExpertLinear
from intlass_ops.formats import FormatError
from intlass_ops.formats.experts import stacked
from intlass_ops.formats.fp4 import StoredFp4
from intlass_ops.formats.layers import LayerSpec, fp4_spec, read_specs, write_specs
from intlass_ops.formats.stored import StoredWeight
from intlass_ops.integrations.load_pretrained import load_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
FP4 = ["packed nvfp4", "packed mxfp4", "modelopt nvfp4"]
GATE, UP = (f"model.layers.1.block_sparse_moe.experts.2.{name}" for name in ("w1", "w3"))


def experts_of(model: Any) -> dict[str, Fp4ExpertLinear]:
    named = model.named_modules()
    return {path: each for path, each in named if isinstance(each, Fp4ExpertLinear)}


@torch.no_grad()
@pytest.mark.parametrize("model", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("name", FP4)
def test_experts_of_a_checkpoint_are_joined(tmp_path: Path, name: str, model: str) -> None:
    expected = write_experts(tmp_path / "theirs", FORMS[name], model)
    loaded = load_pretrained(tmp_path / "theirs")
    layers = experts_of(loaded)
    assert len(layers) == 4
    for path, layer in layers.items():
        dense = expected.get_parameter(path.removesuffix("_quantized"))
        assert torch.equal(layer.dequantize(), dense)
        if layer.global_scale is not None:
            assert len(set(layer.global_scale.tolist())) == 4
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
@pytest.mark.parametrize("name", FP4)
def test_loads_onto_a_device_in_bfloat16(tmp_path: Path, name: str, device: str) -> None:
    expected = write_experts(tmp_path, FORMS[name])
    model = load_pretrained(tmp_path, device_map=device, dtype=torch.bfloat16)
    assert {b.device.type for b in model.state_dict().values()} == {device}
    for layer in experts_of(model).values():
        assert layer.global_scale is None or layer.global_scale.dtype == torch.float32
    logits, reference = model(PROMPT.to(device)).logits, expected(PROMPT).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.cpu().float() - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [("modelopt nvfp4", "weight_scale_2", 0.25), ("packed nvfp4", "weight_global_scale", 4.0)],
)
def test_gate_and_up_may_have_other_global_scales(
    tmp_path: Path, name: str, part: str, value: float
) -> None:
    path = "model.layers.1.mlp.experts.gate_up_proj_quantized"
    write_experts(tmp_path, FORMS[name])
    before = load_pretrained(tmp_path).get_submodule(path)
    change(tmp_path, lambda tensors: tensors[f"{UP}.{part}"].fill_(value))
    model = load_pretrained(tmp_path)
    layer = model.get_submodule(path)
    assert layer.global_scale.shape == (4, 2)
    assert layer.global_scale[2].tolist() == [before.global_scale[2].item(), 0.25]
    changed = before.dequantize()
    half = changed.shape[1] // 2
    changed[2, half:] *= 0.25 / before.global_scale[2]
    torch.testing.assert_close(layer.dequantize(), changed, rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    # Where they agree there is one.
    change(tmp_path, lambda tensors: tensors[f"{GATE}.{part}"].fill_(value))
    scales = load_pretrained(tmp_path).get_submodule(path).global_scale
    assert scales.shape == (4,)
    assert scales[2] == 0.25


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", lambda t: t.fill_(1).view(torch.uint8).fill_(127).view(t.dtype), "a NaN"),
        ("weight_scale", None, "w3: weight_scale is missing"),
        ("bias", lambda _: torch.zeros(48), "biases of experts are not read"),
        ("weight_packed", lambda t: t[:, :8].contiguous(), r"weight_scale has shape \[48, 2\]"),
    ],
)
def test_damaged_experts_are_refused(tmp_path: Path, part: str, value: Any, message: str) -> None:
    write_experts(tmp_path, FORMS["packed nvfp4"])

    def edit(tensors: dict[str, Tensor]) -> None:
        before = tensors.pop(f"{UP}.{part}", None)
        if value is not None:
            tensors[f"{UP}.{part}"] = value(before)

    change(tmp_path, edit)
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)


def test_experts_of_other_kinds_are_not_joined() -> None:
    def stored(name: str, kind: str, n: int = 8) -> StoredFp4:
        one = torch.tensor(1.0) if kind == "nvfp4" else None
        return StoredFp4(name, kind, (n, 32), one, Tensor, Tensor)

    integers = StoredWeight("c", 4, (8, 32), torch.ones(8, 1), None, None, Tensor)
    first = stored("a", "nvfp4")
    for other in (stored("b", "mxfp4"), integers):
        with pytest.raises(FormatError, match=rf"^x: a and {other.name} are not stored alike"):
            stacked("x", [[first, other]], None)
    for parts in ([[first, stored("b", "nvfp4", 16)]], [[first], [first, first]]):
        with pytest.raises(FormatError, match=r"^x: the experts differ in number or shape"):
            stacked("x", parts, None)


def test_experts_are_read_one_after_the_other() -> None:
    """What an expert's tensors were read as is gone before the next one is read."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Seen(Tensor):
        pass

    def read() -> Tensor:
        assert not alive
        t = torch.zeros(8, 16, dtype=torch.uint8).as_subclass(Seen)
        alive.add(t)
        return t

    parts = [[StoredFp4("a", "mxfp4", (8, 32), None, read, read) for _ in range(4)]] * 2
    _, tensors = stacked("x", parts, None)
    assert tensors["weight"]().shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "mxfp4", "kind 'nvfp4' of in_features 32, by its tensors; expected 'mxfp4' of 32"),
        ("kind", "int8", "experts of kind 'int8' with weight, scales, global_scale"),
        ("activation", "int8", "kind 'nvfp4' with quantised activations"),
        ("bias", ["float32", [4, 96]], "kind 'nvfp4' with bias"),
        ("global_scale", ["float32", [3]], r"global_scale is torch\.float32 \(3,\); .* \[4\]"),
        ("scales", ["uint8", [4, 96, 3]], "3 scales a row of K=32"),
        ("weight", ["uint8", [1, 4, 96, 16]], r"weight is torch\.uint8 \(1, 4, 96, 16\)"),
    ],
)
def test_damaged_descriptions_of_our_own(key: str, value: Any, message: str) -> None:
    spec = fp4_spec("nvfp4", (4, 96, 32))
    config = write_specs({"a": spec, "b": spec})
    (entry,) = config["layers"]
    found = read_specs("here", config)["b"]
    assert LayerSpec.of(found.module()) == found == spec
    (entry if key in entry else entry["tensors"])[key] = value
    with pytest.raises(FormatError, match=rf"^here: layers\[0\]: not a layer .*{message}"):
        read_specs("here", config)
