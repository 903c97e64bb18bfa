"""GPTQ's relatives: 3 bits, rules for single layers, AutoRound, LLM.int8.

That every form's codes come over exactly is in test_load_pretrained.py, what is refused in
test_formats_layer_rules_refused.py, damaged files are in test_formats_fuzz.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tiny_checkpoints import (
    FORMS,
    Weight,
    auto_round_config,
    change,
    change_config,
    draw,
    gptq,
    gptq_config,
    linears,
    save,
    tiny_llama,
    words,
    write,
)
from torch import Tensor

from intlass_ops import IntLinear
from intlass_ops.formats import FormatError
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.reader import open_reader
from intlass_ops.formats.stored import fields
from intlass_ops.integrations.load_pretrained import load_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Tensors = dict[str, Tensor]


def unsigned(words: Tensor) -> list[int]:
    return [int(word) % (1 << 32) for word in words.flatten()]


def test_three_bits_lie_as_autogptq_has_them() -> None:
    """Ten codes and two bits of the next; its third bit, ten, a bit of the next; two, ten."""
    code = draw(1, 32, 0, bits=3).q[0].tolist()
    first = sum(code[i] << 3 * i for i in range(10)) | (code[10] & 3) << 30
    second = code[10] >> 2 | sum(code[11 + i] << 3 * i + 1 for i in range(10))
    second |= (code[21] & 1) << 31
    third = code[21] >> 1 | sum(code[22 + i] << 3 * i + 2 for i in range(10))
    packed = words(torch.tensor([code]), 3)
    assert unsigned(packed) == [first, second, third]
    assert fields(packed, 3).tolist() == [code]


def read_one(
    directory: Path, w: Weight, config: dict[str, Any], version: int = 1, **tensors: Tensor | None
) -> Tensor:
    """The dense weight of a checkpoint of one layer; None: without that tensor."""
    parts = {**gptq(w, version), **tensors}
    state = {f"layer.{name}": t for name, t in parts.items() if t is not None}
    save(directory, state, config, tiny_llama().config)
    return open_reader(Checkpoint(directory)).stored("layer").load().dequantize()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_three_bits_with_any_zero_point(tmp_path: Path, version: int, seed: int) -> None:
    w = draw(96, 64, seed, bits=3, shuffled=seed == 1)
    assert {*w.z.flatten().tolist()} == {*range(8)}
    assert torch.equal(read_one(tmp_path, w, gptq_config(3, version), version), w.dense())


OLD = torch.tensor([0x24924924, 0x92492492 - (1 << 32), 0x49249249], dtype=torch.int32)


def test_three_bits_of_older_gptqmodel(tmp_path: Path) -> None:
    """Its offsets of zero points were others: harmless where all are known, else refused."""
    old = {"quantizer": ["optimum:1.24.0", "gptqmodel:5.8.0"]}
    w = draw(64, 64, 0, bits=3, symmetric=True)
    stored = words(w.z.t(), 3) - OLD.repeat(2)
    config = {**gptq_config(3, 1, symmetric=True), "meta": old}
    assert torch.equal(read_one(tmp_path, w, config, qzeros=stored), w.dense())
    assert torch.equal(read_one(tmp_path, w, config), w.dense())  # written as AutoGPTQ does
    w = draw(64, 64, 0, bits=3)
    config = {**gptq_config(3, 1), "meta": old}
    with pytest.raises(FormatError, match=r"of version 1 by GPTQModel 5 are not read"):
        read_one(tmp_path, w, config)
    config["checkpoint_format"] = "gptq_v2"
    assert torch.equal(read_one(tmp_path, w, config, 2), w.dense())


@pytest.mark.parametrize("meta", [None, {}, {"quantizer": None}, {"quantizer": "autogptq:0.7"}])
def test_three_bits_of_other_writers(tmp_path: Path, meta: Any) -> None:
    """A zero point of 0 is not what they meant: GPTQModel alone stores it soundly."""
    config = {**gptq_config(3, 1), "meta": meta}
    w = draw(64, 64, 0, bits=3, lowest=1)
    assert torch.equal(read_one(tmp_path, w, config), w.dense())
    w.z[5, 2] = 0
    with pytest.raises(FormatError, match="of which some are 0, are not read unless the config's"):
        read_one(tmp_path, w, config)
    config["meta"] = {"quantizer": "gptqmodel:7.0.0"}
    assert torch.equal(read_one(tmp_path, w, config), w.dense())
    with pytest.raises(FormatError, match="by GPTQModel 0 are not read"):
        read_one(tmp_path, w, config | {"meta": {"quantizer": ["gptqmodel"]}})


def test_three_bit_versions_are_not_guessed(tmp_path: Path) -> None:
    w = draw(32, 32, 0, bits=3, symmetric=True)
    with pytest.raises(FormatError, match="all stored zero points are 4, as in 'gptq_v2'"):
        read_one(tmp_path, w, gptq_config(3, 1, symmetric=True), 2)
    with pytest.raises(FormatError, match="all stored zero points are 3, as in 'gptq'"):
        read_one(tmp_path, w, gptq_config(3, 2, symmetric=True), 1)


def floating(directory: Path, name: str, left: str, config: dict[str, Any]) -> None:
    """A form's checkpoint with one layer as it was before it was quantised; it is to be read."""
    form = FORMS[name]
    expected = write(directory, form)
    weight = torch.randn(linears(expected)[left].weight.shape)

    def put_back(tensors: Tensors) -> None:
        for part in [n for n in tensors if n.startswith(f"{left}.") and not n.endswith("bias")]:
            del tensors[part]
        tensors[f"{left}.weight"] = weight

    change(directory, put_back)
    change_config(directory, lambda c: c.update(config))
    linears(expected)[left].weight.data = weight
    model = load_pretrained(directory)
    layers = dict(model.named_modules())
    assert isinstance(layers[left], torch.nn.Linear)
    assert sum(isinstance(m, IntLinear) for m in layers.values()) == len(linears(expected)) - 1
    logits, reference = model(PROMPT).logits, expected(PROMPT).logits
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)
    model.save_pretrained(directory / "ours")
    assert torch.equal(load_pretrained(directory / "ours")(PROMPT).logits, logits)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq v1", {"dynamic": {r"-:.*\.0\.mlp\.up_proj": {}}}),
        ("auto-round gptq", {"extra_config": {UP: {"bits": 16, "act_bits": 16}}}),
        ("auto-round awq", {"extra_config": {".*up_proj": {"bits": 16, "data_type": "fp"}}}),
        ("bitsandbytes int8", {"llm_int8_skip_modules": ["lm_head", UP]}),
    ],
)
def test_layers_that_rules_leave_out_are_floating(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    floating(tmp_path, name, UP, config)


def test_it_is_the_tensors_that_say_which_rule_a_layer_has(tmp_path: Path) -> None:
    """The first one that fits in GPTQModel, whose order is that of the file."""
    w = draw(32, 64, 0, bits=8, shuffled=True)
    rules = {"+:lay.*": {"bits": 8}, ".*": {"bits": 2, "group_size": 32}, "layer": {"bits": 3}}
    config = {**gptq_config(4, 2), "dynamic": rules}
    assert torch.equal(read_one(tmp_path, w, config, 2), w.dense())
    w = draw(32, 64, 0, bits=2)
    config["dynamic"] = dict(reversed(rules.items()))
    assert torch.equal(read_one(tmp_path, w, config, 2), w.dense())


def test_patterns_are_not_run(tmp_path: Path) -> None:
    """This one would take Python's re longer than the universe has been there."""
    w, hostile = draw(32, 64, 0, bits=8), "(l|a|la|ay|y|e|r|er)*" * 30 + "(.*)*(.*)*(.*)*x"
    config = {**gptq_config(4, 2), "dynamic": {f"+:{hostile}": {"bits": 8}, "((": {"bits": 2}}}
    assert torch.equal(read_one(tmp_path, w, config, 2), w.dense())


def test_a_rule_of_sym_allows_both(tmp_path: Path) -> None:
    config = {**gptq_config(4, 1, symmetric=True), "dynamic": {"x": {"sym": False}}}
    for symmetric in (True, False):
        w = draw(32, 64, 0, symmetric=symmetric)
        assert torch.equal(read_one(tmp_path, w, config), w.dense())
    with pytest.raises(FormatError, match="all stored zero points are 8, as in 'gptq_v2'"):
        read_one(tmp_path, draw(32, 64, 0, symmetric=True), config, 2)


def test_groups_without_g_idx_are_those_of_the_config(tmp_path: Path) -> None:
    """K=96 in groups of 64 has two of them, as in groups of 48."""
    w = draw(32, 96, 0, groups=2)
    config = {**gptq_config(4, 1), "group_size": 64}
    with pytest.raises(FormatError, match="K=96 in 2 groups; the config says group_size=64"):
        read_one(tmp_path, w, config, g_idx=None)
    for sizes in ({"group_size": 48}, {"dynamic": {"x": {"group_size": 48}}}):
        assert torch.equal(read_one(tmp_path, w, config | sizes, g_idx=None), w.dense())
    w = draw(32, 96, 0, groups=1)
    for size in (128, 96, -1):  # one group may be shorter
        assert torch.equal(
            read_one(tmp_path, w, config | {"group_size": size}, g_idx=None), w.dense()
        )


@pytest.mark.parametrize(
    ("packing", "version"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, 1),
        ({"packing_format": "auto_round:gptq"}, 1),
        ({"packing_format": "auto_gptq"}, 1),
        ({"packing_format": "auto_round"}, 2),
        ({"packing_format": "auto_round:auto_gptq", "backend": "auto_round:exllamav2"}, 1),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}, 1),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}, 2),
    ],
)
def test_zero_points_of_autoround(tmp_path: Path, packing: dict[str, Any], version: int) -> None:
    w, config = draw(32, 64, 0), auto_round_config("")
    del config["packing_format"]
    assert torch.equal(read_one(tmp_path, w, config | packing, version, g_idx=None), w.dense())


def test_autoround_that_does_not_say_its_version_is_told(tmp_path: Path) -> None:
    w, config = draw(32, 64, 0), auto_round_config("auto_round:gptqmodel")
    with pytest.raises(FormatError, match="zero points of either version"):
        read_one(tmp_path, w, config, 2)
    reader = open_reader(Checkpoint(tmp_path), checkpoint_format="gptq_v2")
    assert torch.equal(reader.stored("layer").load().dequantize(), w.dense())
    w = draw(32, 64, 0, symmetric=True)
    with pytest.raises(FormatError, match="as in 'gptq_v2'; load it with checkpoint_format"):
        read_one(tmp_path, w, auto_round_config("auto_round:gptq", symmetric=True), 2)
    write(tmp_path, FORMS["auto-round awq"])
    with pytest.raises(FormatError, match="checkpoint_format='gptq' is for GPTQ, this checkpoint"):
        load_pretrained(tmp_path, checkpoint_format="gptq")


def test_llm_int8_without_a_format_is_of_rows(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS["bitsandbytes int8"])
    change(tmp_path, lambda tensors: tensors.pop(f"{DOWN}.weight_format"))
    model = load_pretrained(tmp_path)
    assert model.get_submodule(DOWN).bits == 8
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
