"""Checkpoints of other libraries: codes bit for bit, generation, saving, reloading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file
from tiny_checkpoints import FORMS, Weight, draw, linears, write, write_experts
from transformers.quantizers.base import HfQuantizer

from intlass_ops import Fp4Linear, Fp8Linear, IntLinear, Lut4Linear, dequantize, pack_int4
from intlass_ops.formats import FormatError
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.experts import stacked
from intlass_ops.formats.layers import layer_of
from intlass_ops.formats.reader import open_reader
from intlass_ops.formats.stored import StoredWeight, unsigned
from intlass_ops.integrations.load_pretrained import load_pretrained
from intlass_ops.nn import IntExpertLinear, PackedLinear

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])


def generate(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=12, do_sample=False)  # type: ignore[operator]


@pytest.mark.parametrize("name", FORMS)
def test_codes_come_over_exactly_and_generation_agrees(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    expected = write(tmp_path / "theirs", form)
    reader = open_reader(Checkpoint(tmp_path / "theirs"))
    dense = {path: linear.weight for path, linear in linears(expected).items()}
    assert set(reader.paths) == set(dense)
    for path in reader.paths:
        weight = reader.stored(path).load()
        assert torch.equal(weight.dequantize(), dense[path]), path

    model = load_pretrained(tmp_path / "theirs")
    kinds = (Fp4Linear, Fp8Linear, IntLinear, Lut4Linear, PackedLinear)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    assert len(layers) == len(dense)
    logits, reference = model(PROMPT).logits, expected(PROMPT).logits
    if reader.activation(reader.paths[0]) is None:
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)
        assert torch.equal(generate(model), generate(expected))
    else:
        # Activations are rounded to INT8: close, not equal.
        assert (logits - reference).norm() < 0.05 * reference.norm()

    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(PROMPT).logits, logits)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "name", ["gptq v1", "awq", "packed w4a16", "int w8a8", "auto-round gptq", "bitsandbytes int8"]
)
def test_experts_of_a_checkpoint_are_joined(tmp_path: Path, name: str) -> None:
    expected = write_experts(tmp_path / "theirs", FORMS[name])
    model = load_pretrained(tmp_path / "theirs")
    assert sum(isinstance(m, IntExpertLinear) for m in model.modules()) == 4
    logits, reference = model(PROMPT).logits, expected(PROMPT).logits
    if name == "int w8a8":
        assert (logits - reference).norm() < 0.05 * reference.norm()
    else:
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)
        assert torch.equal(generate(model), generate(expected))
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(PROMPT).logits, logits)


def test_parameters_that_loading_leaves_as_in_the_file_are_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.17 leaves those that it renames, a router for one; here, all of them."""
    write_experts(tmp_path, FORMS["awq"])
    monkeypatch.setattr(HfQuantizer, "get_new_dtype", lambda *_: None, raising=False)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(PROMPT).logits.dtype == torch.bfloat16


def test_signed_experts_among_unsigned_ones_keep_their_values() -> None:
    stored = [open_stored(draw(16, 32, seed, symmetric=seed == 0), seed) for seed in range(2)]
    assert [each.zeros is None for each in stored] == [True, False]
    spec, read = stacked("experts", [stored], None)
    layer = layer_of(spec.kind, 32, None, {name: get() for name, get in read.items()})
    for expert, each in enumerate(stored):
        parts = (layer.weight[expert], layer.scales[expert], layer.zeros[expert])
        assert torch.equal(dequantize(*parts), each.load().dequantize())


def open_stored(w: Weight, seed: int) -> StoredWeight:
    codes = pack_int4(w.q.to(torch.uint8))
    return unsigned(f"expert {seed}", 4, (16, 32), w.s, w.z, None, lambda: codes)


def test_experts_stored_otherwise_are_refused(tmp_path: Path) -> None:
    write_experts(tmp_path, FORMS["gptq v2 act-order"])
    with pytest.raises(FormatError, match=r"experts\.0\.w1: act-order .* not read for experts"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("linears", "table", "layer"),
    [("Q4_1", "Q8_0", IntLinear), ("Q8_0", "Q5_1", PackedLinear), ("Q5_1", "Q4_1", IntLinear)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_file_loads_saves_and_reloads(
    tmp_path: Path, tied: bool, linears: str, table: str, layer: type
) -> None:
    pytest.importorskip("gguf")
    from gguf import GGMLQuantizationType as Type
    from tiny_gguf_models import write_llama

    from intlass_ops.formats.gguf import GGUFFile
    from intlass_ops.integrations import gguf_models

    path = tmp_path / "tiny.gguf"
    write_llama(path, Type[linears], table=Type[table], tied=tied)
    expected = gguf_models.load_dense(GGUFFile(path))
    model = load_pretrained(path)
    assert isinstance(model.lm_head, layer)
    logits = model(PROMPT).logits
    torch.testing.assert_close(logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    of_demo = gguf_models.load(GGUFFile(path))(PROMPT).logits
    torch.testing.assert_close(of_demo, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model), generate(expected))
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(PROMPT).logits, logits)


@pytest.mark.parametrize(
    "name",
    [
        "gptq v2 act-order", "gptq v1 8 bits", "awq", "int w8a8", "packed mxfp4", "fp8 blocks",
        "bitsandbytes nf4 double",
    ],
)  # fmt: skip
def test_loads_onto_a_device(tmp_path: Path, name: str, device: str) -> None:
    expected = write(tmp_path, FORMS[name])
    model = load_pretrained(tmp_path, device_map=device, dtype=torch.bfloat16)
    assert {b.device.type for b in model.state_dict().values()} == {device}
    logits, reference = model(PROMPT.to(device)).logits.cpu().float(), expected(PROMPT).logits
    assert (logits - reference).norm() < 0.05 * reference.norm()


def test_tied_int4_table_serves_as_embedding_and_head(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf import GGMLQuantizationType as Type
    from tiny_gguf_models import write_llama

    from intlass_ops.formats.gguf import GGUFFile
    from intlass_ops.integrations import gguf_models

    write_llama(tmp_path / "tiny.gguf", Type.Q8_0, table=Type.Q4_1)
    file = GGUFFile(tmp_path / "tiny.gguf")
    model, dense = gguf_models.load(file), gguf_models.load_dense(file)
    logits = model(PROMPT).logits
    torch.testing.assert_close(logits, dense(PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_what_is_loaded_compiles_with_our_backend(tmp_path: Path) -> None:
    write(tmp_path, FORMS["gptq v2 act-order"])
    model = load_pretrained(tmp_path)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def rewrite_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def test_names_that_transformers_changes_are_followed(tmp_path: Path) -> None:
    """Here those of the model without its head; there are many, of models of images and text."""
    expected = write(tmp_path, FORMS["gptq v1"])
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("model."): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    model = load_pretrained(tmp_path)
    logits = model(PROMPT).logits
    torch.testing.assert_close(logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(PROMPT).logits, logits)


def test_gptq_version_is_not_guessed(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS["gptq v2 8 bits symmetric"])
    rewrite_config(tmp_path, checkpoint_format="gptq")
    with pytest.raises(FormatError, match="all stored zero points are 128, as in 'gptq_v2'"):
        load_pretrained(tmp_path)
    model = load_pretrained(tmp_path, checkpoint_format="gptq_v2")
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match="expected gptq or gptq_v2"):
        load_pretrained(tmp_path, checkpoint_format="v3")


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq v1", {"bits": 5}, "bits is 5; expected one of 2, 3, 4, 8"),
        ("gptq v1", {"bits": 3}, "qzeros has 4 words a row, which are not N=32 fields of 3 bits"),
        ("gptq v1", {"quant_method": "aqlm"}, "quant_method is 'aqlm'; read are gptq"),
        ("gptq v1", {"sym": True}, "says symmetric, but zero points differ from 8"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("packed w4a16", {"format": "mxfp6-pack-quantized"}, "format is 'mxfp6-pack"),
        ("packed w4a16", {"config_groups": {}}, "config_groups is {}"),
        ("packed w4a16", {"transform_config": {"r": 1}}, "transform_config"),
    ],
)
def test_config_that_is_not_read_is_refused(
    tmp_path: Path, form: str, changes: dict[str, object], message: str
) -> None:
    write(tmp_path, FORMS[form])
    rewrite_config(tmp_path, **changes)
    with pytest.raises(FormatError, match=message):
        load_pretrained(tmp_path)


def test_static_activations_are_sent_to_prepare(tmp_path: Path) -> None:
    write(tmp_path, FORMS["int w8a8"])
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    rewrite_config(tmp_path, config_groups=config["config_groups"])
    with pytest.raises(FormatError, match=r"intlass_ops\.prepare_"):
        load_pretrained(tmp_path)


def test_missing_tensor_is_an_error_not_a_random_weight(tmp_path: Path) -> None:
    write(tmp_path, FORMS["awq"])
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"missing tensors .* model\.norm\.weight"):
        load_pretrained(tmp_path)


def test_order_that_is_no_permutation_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "theirs", FORMS["gptq v2 act-order"])
    load_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.order"][3] = 1000
    save_file(state, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj\.order is no permutation of the 32 inputs"):
        load_pretrained(tmp_path / "ours")


def test_pickles_are_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04\x95")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        load_pretrained(tmp_path)


def test_index_cannot_leave_the_directory(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    write(inside, FORMS["awq"])
    (inside / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="no file of this directory"):
        Checkpoint(inside)


@pytest.mark.parametrize("name", ["gptq v1", "awq", "packed w4a16", "hqq 4 bits", "torchao int4"])
def test_real_weights_in_each_format(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--thorough"):
        pytest.skip("half a minute a format: --thorough")
    from intlass_ops.demo.course import find_model
    from intlass_ops.formats.gguf import GGUFFile
    from intlass_ops.integrations import gguf_models

    file = GGUFFile(find_model())
    dense = gguf_models.load_dense(file)
    expected = write(tmp_path / "theirs", FORMS[name], dense, group=64)
    model = load_pretrained(tmp_path / "theirs", dtype=torch.float32)
    prompt = gguf_models.tokenizer_of(file)("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False}
    tokens = model.generate(**prompt, **options)
    assert torch.equal(tokens, expected.generate(**prompt, **options))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(again.generate(**prompt, **options), tokens)


def test_a_device_needs_no_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, FORMS["awq"])
    monkeypatch.setattr(
        "transformers.integrations.accelerate.is_accelerate_available", lambda: False
    )
    with pytest.raises(ValueError, match="requires `accelerate`"):
        load_pretrained(tmp_path, device_map={"": "cpu"})
    assert load_pretrained(tmp_path, device_map="cpu").device.type == "cpu"


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import intlass_ops

    def absent(name: str, package: str) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"load_pretrained needs transformers: pip install"):
        _ = intlass_ops.load_pretrained
