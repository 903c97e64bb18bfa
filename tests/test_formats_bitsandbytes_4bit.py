"""NF4 checkpoints of bitsandbytes: the weights, the library's own view of them, models.

Loading, generating, saving and reloading each form is in test_load_pretrained.py, damaged files in
test_formats_fuzz.py, what is refused in test_formats_nf4_refused.py; what the layers compute in
test_lut4_linear.py, the library's modules in memory in test_bitsandbytes_modules.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from nf4_case import Nf4Weight, bitsandbytes_4bit, draw_nf4
from safetensors.torch import save_file
from tiny_checkpoints import (
    BLOCKS_OF_64,
    FORMS,
    NF4_CONFIG,
    change,
    linears,
    save,
    tiny_llama,
    write,
)
from torch import Tensor, nn

from intlass_ops import IntLinear, Lut4Linear, explain
from intlass_ops.__main__ import main
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.lut4 import StoredLut4
from intlass_ops.formats.reader import open_reader
from intlass_ops.integrations.load_pretrained import load_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
NF4 = [name for name in FORMS if "nf4" in name]
UP = "model.layers.0.mlp.up_proj"
STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
Tensors = dict[str, Tensor]
# The numbers of FP4 are thirds: the scale is rounded instead.
RTOL = {"nf4": 0.0, "fp4": 2**-22}


def layer_of(directory: Path) -> Lut4Linear:
    reader = open_reader(Checkpoint(directory))
    assert reader.paths == ["layer"]
    stored = reader.stored("layer")
    assert isinstance(stored, StoredLut4)
    layer = stored.load()
    assert layer.scales.shape == (stored.shape[0], stored.groups)
    assert (layer.scales.dtype, layer.group_size) == (stored.scale_dtype, stored.group_size)
    return layer


def put(directory: Path, tensors: Tensors) -> None:
    """A checkpoint of one linear."""
    named = {f"layer.{part}": t.contiguous() for part, t in tensors.items()}
    save_file(named, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": NF4_CONFIG}))


# ------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_every_code_in_every_storage(tmp_path: Path, storage: torch.dtype, double: bool) -> None:
    drawn = draw_nf4(48, 128, 0, double=double)
    every = torch.cartesian_prod(torch.arange(16), torch.arange(16)).flatten()  # of every byte
    w = Nf4Weight(every.repeat(12).view(48, 128), drawn.s, drawn.nested)
    put(tmp_path, bitsandbytes_4bit(w, storage))
    layer = layer_of(tmp_path)
    assert torch.equal(layer.weight, w.packed())
    assert torch.equal(layer.scales.float(), w.s)
    assert torch.equal(layer.dequantize(), w.dense())


@pytest.mark.parametrize(("k", "block"), [(32, 32), (64, 64), (192, 64), (256, 128), (4096, 4096)])
@pytest.mark.parametrize("double", [False, True])
def test_blocks_become_groups(tmp_path: Path, k: int, block: int, double: bool) -> None:
    w = draw_nf4(7, k, 0, group=block, double=double)
    put(tmp_path, bitsandbytes_4bit(w))
    layer = layer_of(tmp_path)
    assert layer.group_size == block
    assert torch.equal(layer.dequantize(), w.dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_kept_in_what_holds_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """The largest magnitudes of a model in bf16 or fp16 are numbers of its type."""
    w = draw_nf4(48, 128, 0, dtype=dtype)
    put(tmp_path, bitsandbytes_4bit(w))
    layer = layer_of(tmp_path)
    assert layer.scales.dtype == dtype
    assert torch.equal(layer.dequantize(), w.dense())


# -------------------------------------------------------------------- what bitsandbytes makes of it


def of_bitsandbytes(n: int, k: int, **options: Any) -> Any:
    """A `Linear4bit` with random weights, quantised by the library."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    dtype = options.pop("dtype", torch.bfloat16)
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = {"quant_type": "nf4", "requires_grad": False, **options}
    layer.weight = bitsandbytes.nn.Params4bit(w, **options)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("kind", "n", "k", "block", "storage"),
    [
        ("nf4", 48, 128, 64, torch.uint8),
        ("nf4", 300, 512, 64, torch.bfloat16),  # several blocks of scales
        ("nf4", 5, 256, 128, torch.float32),
        ("fp4", 48, 128, 64, torch.uint8),
    ],
)
def test_bitsandbytes_dequantises_to_the_same(
    tmp_path: Path,
    dtype: torch.dtype,
    double: bool,
    kind: str,
    n: int,
    k: int,
    block: int,
    storage: torch.dtype,
) -> None:
    options = {"compress_statistics": double, "blocksize": block, "quant_storage": storage}
    options["quant_type"] = kind
    linear = of_bitsandbytes(n, k, dtype=dtype, **options)
    put(tmp_path, linear.state_dict())
    from bitsandbytes.functional import dequantize_4bit

    layer, state = layer_of(tmp_path), linear.weight.quant_state
    state.dtype = torch.float32  # that of what it was made of would round the weight again
    expected = dequantize_4bit(linear.weight.data, state)
    torch.testing.assert_close(layer.dequantize(), expected, rtol=RTOL[kind], atol=0)
    if kind == "nf4" and not double:
        assert layer.scales.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_what_transformers_writes(tmp_path: Path, kind: str, double: bool) -> None:
    """transformers quantises while it loads and saves; bitsandbytes says what was meant."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny_llama(**BLOCKS_OF_64).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, dense = (
        load_pretrained(tmp_path / "theirs", dtype=torch.float32),
        tiny_llama(**BLOCKS_OF_64),
    )
    dense.load_state_dict(model.float().state_dict())
    found = {path: m for path, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    assert found.keys() == linears(dense).keys()
    for path, module in found.items():
        module.weight.quant_state.dtype = torch.float32
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
        layer = ours.get_submodule(path)
        assert isinstance(layer, Lut4Linear)
        torch.testing.assert_close(layer.dequantize(), expected, rtol=RTOL[kind], atol=0)
        dense.get_parameter(f"{path}.weight").copy_(expected)
    torch.testing.assert_close(ours(PROMPT).logits, dense(PROMPT).logits, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", NF4)
def test_layers_of_16_bits_stay_as_they_are(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path, FORMS[name])

    def undo(tensors: Tensors) -> None:
        for part in [each for each in tensors if each.startswith(f"{UP}.weight")]:
            del tensors[part]
        tensors[f"{UP}.weight"] = expected.get_submodule(UP).weight.data

    change(tmp_path, undo)
    model = load_pretrained(tmp_path)
    assert type(model.get_submodule(UP)) is nn.Linear
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_quantised(tmp_path: Path) -> None:
    """Where `llm_int8_skip_modules` is empty; its tied table is not in the file."""
    model = tiny_llama(tied=False, **BLOCKS_OF_64)
    head = draw_nf4(64, 64, 9)
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    state |= {f"lm_head.{part}": t for part, t in bitsandbytes_4bit(head).items()}
    save(tmp_path, state, NF4_CONFIG, model.config)
    ours = load_pretrained(tmp_path)
    assert isinstance(ours.lm_head, Lut4Linear)
    with torch.no_grad():
        model.lm_head.weight.copy_(head.dense())
    torch.testing.assert_close(ours(PROMPT).logits, model(PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_table_is_not_quantised(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS["bitsandbytes nf4"], None)
    tied = tiny_llama(tied=True, **BLOCKS_OF_64)
    state = {n: t for n, t in expected.state_dict().items() if n != "lm_head.weight"}
    tied.load_state_dict(state, strict=False)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model(PROMPT).logits, tied(PROMPT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NF4)
def test_a_model_in_bfloat16_keeps_its_scales(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path / "theirs", FORMS[name])
    model = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    layer = model.get_submodule(UP)
    assert layer.weight.dtype == torch.uint8
    assert layer.scales.dtype == (torch.float32 if "double" in name else torch.bfloat16)
    assert torch.equal(layer.dequantize(), expected.get_submodule(UP).weight)
    logits, reference = model(PROMPT).logits, expected(PROMPT).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - reference).norm() < 0.05 * reference.norm()
    dispatches = explain(model, input_ids=PROMPT).dispatches
    assert [each.scheme for each in dispatches] == ["nf4a16"] * len(linears(expected))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(PROMPT).logits, logits)
    plain = again.dequantize()
    assert not any(isinstance(m, Lut4Linear) for m in plain.modules())
    assert torch.equal(
        plain.get_submodule(UP).weight, layer.dequantize(plain.get_submodule(UP).weight.dtype)
    )


def test_convert_writes_our_layout(tmp_path: Path) -> None:
    expected = write(tmp_path / "theirs", FORMS["bitsandbytes nf4 double"])
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert {entry["kind"] for entry in config["layers"]} == {"nf4"}
    model = load_pretrained(tmp_path / "ours")
    for path, linear in linears(expected).items():
        assert torch.equal(model.get_submodule(path).dequantize(), linear.weight)


@pytest.mark.parametrize("backend", ["intlass", "inductor"])
def test_what_is_loaded_compiles(tmp_path: Path, backend: str) -> None:
    write(tmp_path, FORMS["bitsandbytes nf4"])
    mlp = load_pretrained(tmp_path).get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 3, 64)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(mlp, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))


def test_qlora_of_a_checkpoint(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from intlass_ops.integrations.peft_lora import LoraIntLinear, lora_config

    write(tmp_path, FORMS["bitsandbytes nf4 double"])
    model = load_pretrained(tmp_path)
    before = model(PROMPT).logits.detach()
    config = lora_config(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    bases = [m.base_layer for m in model.modules() if isinstance(m, LoraIntLinear)]
    assert len(bases) == 4
    assert all(isinstance(each, (Lut4Linear, IntLinear)) for each in bases)
    assert torch.equal(model(PROMPT).logits, before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(PROMPT, labels=PROMPT).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
