"""FP8 checkpoints: the weights, the libraries' own view of them, models.

Loading, generating, saving and reloading each form is in test_load_pretrained.py, damaged files in
test_formats_fuzz.py, what is refused in test_formats_fp8_refused.py, experts in
test_formats_fp8_experts.py; what the layers compute in test_fp8_linear.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from fp8_case import E4M3, Fp8Weight, all_codes, draw_fp8
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    FORMS,
    FP8_CONFIG,
    change,
    change_config,
    compressed_fp8,
    fp8,
    linears,
    tiny_llama,
    write,
)
from torch import Tensor, nn

from intlass_ops import Fp4Linear, Fp8Linear, IntLinear, explain
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.fp8 import StoredFp8
from intlass_ops.formats.reader import open_reader
from intlass_ops.integrations.load_pretrained import load_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
FP8 = [name for name in FORMS if "fp8" in name]
UP = "model.layers.0.mlp.up_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
Tensors = dict[str, Tensor]


def layer_of(directory: Path, path: str = "layer") -> Fp8Linear:
    stored = open_reader(Checkpoint(directory)).stored(path)
    assert isinstance(stored, StoredFp8)
    layer = stored.load()
    assert layer.scales.shape == (stored.shape[0], stored.groups)
    assert (layer.scales.dtype, layer.group_size) == (stored.scale_dtype, stored.group_size)
    return layer


def put(directory: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """A checkpoint of one linear."""
    named = {f"layer.{part}": t.contiguous() for part, t in tensors.items()}
    save_file(named, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))


# ------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("name", FP8)
def test_every_code(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    drawn = form.make(254, 32, 0, **form.draw)
    w = Fp8Weight(all_codes()[:, None].expand(-1, 32), drawn.s, drawn.block)
    put(tmp_path, form.store(w), form.config)
    layer = layer_of(tmp_path)
    assert torch.equal(layer.weight.view(torch.uint8), w.q.to(torch.uint8))
    assert torch.equal(layer.dequantize(), w.dense())


SIZES = [
    (256, 384, (128, 128), 128),
    (130, 192, (128, 128), 64),  # the last block is half of one
    (40, 208, (128, 128), 16),
    (129, 100, (128, 128), 100),  # one block; K is what it is
    (48, 96, (24, 32), 32),
    (7, 64, (128, 64), 64),
    (4, 48, (1, 16), 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "block", "group"), SIZES)
def test_blocks_become_groups_of_each_row(
    tmp_path: Path, n: int, k: int, block: tuple[int, int], group: int, dtype: torch.dtype
) -> None:
    w = draw_fp8(n, k, 0, block=block, dtype=dtype)
    ours = {**FP8_CONFIG, "weight_block_size": list(block)}
    theirs = compressed_fp8(strategy="block", block_structure=list(block))
    for scale, config in (("weight_scale_inv", ours), ("weight_scale", theirs)):
        put(tmp_path, fp8(w, scale), config)
        layer = layer_of(tmp_path)
        assert (layer.group_size, layer.scales.dtype) == (group, dtype)
        assert torch.equal(layer.dequantize(), w.dense())


def test_scales_that_bfloat16_holds_are_kept_in_it(tmp_path: Path) -> None:
    """Powers of two in float32 (DeepSeek-V3.1), which kernels read faster so."""
    w = draw_fp8(40, 96, 0, block=(32, 32))
    w.s = 2.0 ** w.s.log2().round()
    put(tmp_path, fp8(w), {**FP8_CONFIG, "weight_block_size": [32, 32]})
    layer = layer_of(tmp_path)
    assert layer.scales.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), w.dense())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_as_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every byte of e8m0 that is a number; bfloat16 holds them all."""
    w = draw_fp8(5, 51 * 16, 0, block=(1, 16))
    exponents = torch.arange(255, dtype=torch.uint8).view(5, 51)
    w.s = torch.exp2(exponents.double() - 127)
    tensors = {"weight": w.codes(), "weight_scale_inv": exponents.view(dtype)}
    put(tmp_path, tensors, {**FP8_CONFIG, "weight_block_size": [1, 16]})
    layer = layer_of(tmp_path)
    assert layer.scales.dtype == torch.bfloat16
    assert torch.equal(layer.scales.double(), w.s)
    assert torch.equal(layer.dequantize(), w.dense())


@pytest.mark.parametrize(
    ("scheme", "block"),
    [
        ({"strategy": "group", "group_size": 32}, (1, 32)),
        ({"group_size": 16}, (1, 16)),
        ({"strategy": "channel"}, (1, None)),
        ({"strategy": "channel", "group_size": -1}, (1, None)),
        ({"strategy": "tensor"}, (None, None)),
    ],
)
def test_strategies_of_compressed_tensors(
    tmp_path: Path, scheme: dict[str, Any], block: tuple[int | None, int | None]
) -> None:
    w = draw_fp8(40, 96, 0, block=block)
    forms = [fp8(w)]
    if block == (None, None):
        forms += [{**forms[0], "weight_scale": w.s[0]}, {**forms[0], "weight_scale": w.s}]
    for tensors in forms:
        put(tmp_path, tensors, compressed_fp8(**scheme))
        assert torch.equal(layer_of(tmp_path).dequantize(), w.dense())


# ------------------------------------------------------------------------ what libraries make of it


@pytest.mark.parametrize(("n", "k", "block", "group"), SIZES)
def test_transformers_dequantises_to_the_same(
    tmp_path: Path, n: int, k: int, block: tuple[int, int], group: int
) -> None:
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")
    dequantize = getattr(theirs, "_dequantize_fp8_weight", None)
    if dequantize is None:
        pytest.skip("this version of transformers has no _dequantize_fp8_weight")
    w = draw_fp8(n, k, 0, block=block)
    put(tmp_path, fp8(w, "weight_scale_inv"), {**FP8_CONFIG, "weight_block_size": list(block)})
    expected = dequantize(w.codes(), w.s, list(block), torch.float32)
    assert torch.equal(layer_of(tmp_path).dequantize(), expected)


@torch.no_grad()
def test_transformers_reads_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    form = FORMS["fp8 blocks"]
    config = {**form.config, "weight_block_size": [16, 16]}  # whole blocks alone are read there
    write(tmp_path, replace(form, draw={"block": (16, 16)}, config=config))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = load_pretrained(tmp_path)
    for path, linear in linears(theirs).items():
        assert torch.equal(ours.get_submodule(path).dequantize(), linear.weight)
    torch.testing.assert_close(ours(PROMPT).logits, theirs(PROMPT).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8"])
def test_what_compressed_tensors_writes(tmp_path: Path, kind: str) -> None:
    """The library's own compressor writes, its own `dequantize` says what was meant."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    mx = kind == "MXFP8"
    if mx and not hasattr(quantization.quant_scheme, "MXFP8"):
        pytest.skip("this version of compressed-tensors has no MXFP8")
    sizes = {"hidden_size": 160, "intermediate_size": 224 if mx else 208, "head_dim": 80}
    model, dense = tiny_llama(**sizes), tiny_llama(**sizes)
    config = quantization.QuantizationConfig(config_groups={kind: ["Linear"]}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    schemes = {}
    for path in linears(model):
        module: Any = model.get_submodule(path)
        schemes[path] = module.quantization_scheme
        grid = module.weight_scale.shape
        rows, columns = (grid[0], 1) if len(grid) < 2 else grid
        bn, bk = (128, 128) if kind == "FP8_BLOCK" else (module.weight.shape[0] // rows, 1 << 20)
        bk = 32 if mx else bk
        for i in range(rows):
            for j in range(columns):
                block = module.weight[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk]
                one = (i, j) if len(grid) == 2 else i
                scale = block.abs().max() / 448
                module.weight_scale[one] = scale.log2().ceil().exp2() if mx else scale
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.01)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    compressor.update_config(str(tmp_path))

    loaded = load_pretrained(tmp_path)
    assert sum(isinstance(m, Fp8Linear) for m in loaded.modules()) == len(schemes)
    for path, scheme in schemes.items():
        codes, scale = state[f"{path}.weight"], state[f"{path}.weight_scale"]
        assert codes.dtype == E4M3
        scale = torch.exp2(scale.float() - 127) if mx else scale
        expected = dequantize(x_q=codes, scale=scale, args=scheme.weights, dtype=torch.float32)
        assert torch.equal(loaded.get_submodule(path).dequantize(), expected)
        dense.get_parameter(f"{path}.weight").copy_(expected)
    torch.testing.assert_close(loaded(PROMPT).logits, dense(PROMPT).logits, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", FP8)
def test_layers_of_16_bits_stay_as_they_are(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path, FORMS[name])

    def undo(tensors: Tensors) -> None:
        for part in [each for each in tensors if each.startswith(f"{UP}.weight")]:
            del tensors[part]
        for part in ("input_scale", "activation_scale", "input_scale_ub"):
            tensors.pop(f"{UP}.{part}", None)
        tensors[f"{UP}.weight"] = expected.get_submodule(UP).weight.data

    change(tmp_path, undo)
    model = load_pretrained(tmp_path)
    assert type(model.get_submodule(UP)) is nn.Linear
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["packed nvfp4", "modelopt nvfp4"])
def test_fp8_beside_nvfp4(tmp_path: Path, name: str) -> None:
    """Attention in FP8, as ModelOpt's MIXED_PRECISION and mixed-precision files have it."""
    other = "packed fp8" if name.startswith("packed") else "modelopt fp8"
    of_fp4 = write(tmp_path / "fp4", FORMS[name])
    of_fp8 = write(tmp_path / "fp8", FORMS[other])
    codes = load_file(tmp_path / "fp8" / "model.safetensors")

    def mix(tensors: Tensors) -> None:
        for each in [n for n in tensors if ".self_attn." in n]:
            del tensors[each]
        tensors |= {n: t for n, t in codes.items() if ".self_attn." in n}

    def both(config: dict[str, Any]) -> None:
        if other == "packed fp8":
            config["format"] = "mixed-precision"
            config["config_groups"]["g1"] = FORMS[other].config["config_groups"]["group_0"]
            return
        algorithm = {True: "FP8", False: "NVFP4"}
        layers = {p: {"quant_algo": algorithm["self_attn" in p]} for p in linears(of_fp4)}
        config.update(quant_algo="MIXED_PRECISION", quantized_layers=layers)

    change(tmp_path / "fp4", mix)
    change_config(tmp_path / "fp4", both)
    model = load_pretrained(tmp_path / "fp4")
    assert isinstance(model.get_submodule(UP), Fp4Linear)
    assert isinstance(model.get_submodule(K_PROJ), Fp8Linear)
    for path, linear in linears(of_fp4).items():
        if "self_attn" in path:
            linear.load_state_dict(of_fp8.get_submodule(path).state_dict())
    torch.testing.assert_close(model(PROMPT).logits, of_fp4(PROMPT).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_pretrained(tmp_path / "ours")(PROMPT).logits, model(PROMPT).logits)


def test_integers_beside_fp8(tmp_path: Path) -> None:
    """Both have a `weight`: its type tells them apart."""
    write(tmp_path / "fp8", FORMS["packed fp8"])
    expected = write(tmp_path / "int", FORMS["int w8a8"])
    integers = load_file(tmp_path / "int" / "model.safetensors")
    change(
        tmp_path / "fp8", lambda t: t.update({n: v for n, v in integers.items() if ".mlp." in n})
    )
    group = FORMS["int w8a8"].config["config_groups"]["group_0"]
    change_config(tmp_path / "fp8", lambda config: config["config_groups"].update(g1=group))
    model = load_pretrained(tmp_path / "fp8")
    layer = model.get_submodule(UP)
    assert isinstance(layer, IntLinear)
    assert torch.equal(layer.weight * layer.scales.float(), expected.get_submodule(UP).weight)
    assert isinstance(model.get_submodule(K_PROJ), Fp8Linear)


@pytest.mark.parametrize("name", ["fp8 blocks", "packed fp8"])
def test_a_model_in_bfloat16_keeps_its_scales(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path / "theirs", FORMS[name])
    model = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    layer = model.get_submodule(UP)
    assert layer.weight.dtype == E4M3
    assert layer.scales.dtype == (torch.float32 if name == "fp8 blocks" else torch.bfloat16)
    assert torch.equal(layer.dequantize(), expected.get_submodule(UP).weight)
    logits, reference = model(PROMPT).logits, expected(PROMPT).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - reference).norm() < 0.05 * reference.norm()
    assert len(explain(model, input_ids=PROMPT).dispatches) == len(linears(expected))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(PROMPT).logits, logits)
    plain = again.dequantize()
    assert not any(isinstance(m, Fp8Linear) for m in plain.modules())


@pytest.mark.parametrize("backend", ["intlass", "inductor"])
def test_what_is_loaded_compiles(tmp_path: Path, backend: str) -> None:
    write(tmp_path, FORMS["fp8 blocks"])
    mlp = load_pretrained(tmp_path).get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 3, 32)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(mlp, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))


def test_adapters_keep_a_type_of_their_own() -> None:
    """peft gives an adapter the type of a floating weight; FP8 would round it away."""
    peft = pytest.importorskip("peft")
    from intlass_ops.integrations.peft_lora import lora_config

    w = draw_fp8(48, 32, 0, block=(16, 16))
    base = nn.Sequential(Fp8Linear(w.codes(), w.rows()), nn.LayerNorm(48))
    config = lora_config(r=4, target_modules=["0"])
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    (a,) = [p for n, p in adapters.items() if "lora_A" in n]
    assert not torch.equal(a, a.to(E4M3).float())
    model(torch.randn(3, 32)).square().sum().backward()
    assert all(p.grad is not None for p in adapters.values())
