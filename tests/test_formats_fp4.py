"""NVFP4 and MXFP4 checkpoints: the weights, and the libraries' own view of them.

Loading, generating, saving and reloading each form is in test_load_pretrained.py, damaged files in
test_formats_fuzz.py, what is refused in test_formats_fp4_refused.py, experts in
test_formats_fp4_experts.py; what the layers compute in test_fp4_linear.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from fp4_case import E2M1, Fp4Weight
from safetensors.torch import load_file, save_file
from tiny_checkpoints import DIVISOR, FORMS, change, change_config, linears, tiny_llama, write
from torch import Tensor, nn

from intlass_ops import Fp4Linear, IntLinear, explain, prepare_
from intlass_ops.formats import FormatError
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.fp4 import StoredFp4
from intlass_ops.formats.layers import buffers_of, read_specs, write_specs
from intlass_ops.formats.reader import open_reader
from intlass_ops.integrations.load_pretrained import load_pretrained

PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
FP4 = ["packed nvfp4", "packed mxfp4", "modelopt nvfp4"]
UP = "model.layers.0.mlp.up_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
E4M3 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]


def layer_of(directory: Path, path: str = UP) -> Fp4Linear:
    stored = open_reader(Checkpoint(directory)).stored(path)
    assert isinstance(stored, StoredFp4)
    return stored.load()


# ------------------------------------------------------------------------------------ the weights


@pytest.mark.parametrize("name", FP4)
def test_every_code_under_every_scale(tmp_path: Path, name: str) -> None:
    """Each row has all codes under one scale; of e4m3 zero, subnormal and negative ones too."""
    form = FORMS[name]
    bits = torch.arange(255) if "mx" in name else torch.arange(256)
    bits = bits if "mx" in name else bits[bits % 128 != 127]
    q = torch.arange(16).repeat(len(bits), 2 if "mx" in name else 1)
    w = Fp4Weight(q, bits[:, None].to(torch.uint8), form.make(16, 32, 0, **form.draw).global_scale)
    tensors = {f"layer.{part}": t for part, t in form.store(w).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": form.config}))
    layer = layer_of(tmp_path, "layer")
    assert torch.equal(layer.dequantize(), w.dense())
    assert torch.equal(layer.weight, w.packed())
    assert torch.equal(layer.scales, w.s)


def test_a_divisor_costs_one_rounding_of_float32(tmp_path: Path) -> None:
    """compressed-tensors divides by the global scale; a layer multiplies by its reciprocal."""
    form = FORMS["packed nvfp4"]
    write(tmp_path, form)
    tensors = load_file(tmp_path / "model.safetensors")
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    for path in open_reader(Checkpoint(tmp_path)).paths:
        packed = tensors[f"{path}.weight_packed"].long()
        codes = values[torch.stack((packed % 16, packed // 16), -1).flatten(1)]
        scale = tensors[f"{path}.weight_scale"].double().repeat_interleave(16, 1)
        divided = codes * scale / tensors[f"{path}.weight_global_scale"].double()
        w = layer_of(tmp_path, path).dequantize().double()
        assert bool(((w - divided).abs() <= 2**-23 * divided.abs()).all())
        assert float(tensors[f"{path}.weight_global_scale"]) == DIVISOR


@pytest.mark.parametrize("kind", ["NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4"])
def test_what_compressed_tensors_writes(tmp_path: Path, kind: str) -> None:
    """The library's own compressor writes, its own decompressor says what was meant."""
    model, weights = _compress(tmp_path, kind)
    loaded = load_pretrained(tmp_path)
    assert sum(isinstance(m, Fp4Linear) for m in loaded.modules()) == len(weights)
    for path, expected in weights.items():
        layer = loaded.get_submodule(path)
        # It divides scales, then multiplies, then has bf16: as far apart as three roundings.
        exact = kind.startswith("MX")
        torch.testing.assert_close(
            layer.dequantize(), expected, rtol=0 if exact else 3 * 2**-24, atol=0
        )
    expected_logits = model(PROMPT).logits
    torch.testing.assert_close(loaded(PROMPT).logits, expected_logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _compress(directory: Path, kind: str) -> tuple[Any, Tensors]:
    """A tiny Llama in ``directory``; the model of its weights, and they by path."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = tiny_llama(intermediate_size=64)
    config = quantization.QuantizationConfig(config_groups={kind: ["Linear"]}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    paths = list(linears(model))
    for path in paths:
        module: Any = model.get_submodule(path)
        args = module.quantization_scheme.weights
        w = module.weight
        blocks = w.unflatten(1, (-1, args.group_size))
        one = generate_gparam(w.amin(), w.amax()).reshape(1) if "NV" in kind else None
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, one)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if one is not None:
            module.weight_global_scale.data = one
            if hasattr(module, "input_global_scale"):
                module.input_global_scale.data = torch.tensor([100.0])
    schemes = {path: model.get_submodule(path).quantization_scheme for path in paths}
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    compressor.update_config(str(directory))
    dense, weights = tiny_llama(intermediate_size=64), {}
    for path in paths:
        packed, scale = state[f"{path}.weight_packed"], state[f"{path}.weight_scale"]
        n, width = packed.shape
        scale = decompress_mx_scale(scale).float() if "MX" in kind else scale.float()
        weights[path] = dequantize(
            x_q=unpack_fp4_from_uint8(packed, n, 2 * width, torch.float32),
            scale=scale,
            args=schemes[path].weights,
            global_scale=state.get(f"{path}.weight_global_scale"),
            dtype=torch.float32,
        )
        dense.get_parameter(f"{path}.weight").copy_(weights[path])
    return dense, weights


def test_prepare_leaves_fp4_modules_of_a_library_as_they_are() -> None:
    """They have the tensors of its integer layers, by name, but other bits in them."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = nn.Sequential(nn.Linear(64, 64))
    config = quantization.QuantizationConfig(config_groups={"NVFP4A16": ["Linear"]})
    quantization.apply_quantization_config(model, config)
    compressors.compress_module(model[0])
    before = model[0]
    (decision,) = prepare_(model)
    assert decision.outcome == "declined"
    assert model[0] is before


def test_modelopt_s_own_file_says_the_same(tmp_path: Path) -> None:
    expected = write(tmp_path, FORMS["modelopt nvfp4"])
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    theirs: dict[str, Any] = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["lm_head"],
        },
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(theirs))
    logits = load_pretrained(tmp_path)(PROMPT).logits
    torch.testing.assert_close(logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": 3}')
    with pytest.raises(FormatError, match=r"hf_quant_config\.json: quantization is no object"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", [*FP4, "packed w4a16"])
def test_scales_of_a_quantised_cache_are_not_used(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path, FORMS[name])

    def add(tensors: Tensors) -> None:
        for layer in range(2):
            attention = f"model.layers.{layer}.self_attn"
            tensors[f"{attention}.k_proj.k_scale"] = torch.tensor(0.02)
            tensors[f"{attention}.v_proj.v_scale"] = torch.tensor(0.02)
            tensors[f"{attention}.k_scale"] = torch.tensor([0.02]).bfloat16()
            tensors[f"{attention}.v_scale"] = torch.tensor([0.02]).to(E4M3)

    change(tmp_path, add)
    model = load_pretrained(tmp_path)
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert not any(name.endswith(("k_scale", "v_scale")) for name in model.state_dict())


@pytest.mark.parametrize("name", FP4)
def test_layers_of_16_bits_stay_as_they_are(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path, FORMS[name])
    parts = [part for part in FORMS[name].store(_any(name)) if part != "weight"]

    def undo(tensors: Tensors) -> None:
        for part in parts:
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.weight"] = expected.get_submodule(UP).weight.data

    change(tmp_path, undo)
    model = load_pretrained(tmp_path)
    assert type(model.get_submodule(UP)) is nn.Linear
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)


def _any(name: str) -> Fp4Weight:
    w: Fp4Weight = FORMS[name].make(16, 32, 0, **FORMS[name].draw)
    return w


def test_integers_beside_fp4(tmp_path: Path) -> None:
    """Groups are told apart by their tensors, also where nothing names the layers."""
    write(tmp_path / "fp4", FORMS["packed nvfp4"])
    write(tmp_path / "int", FORMS["packed w4a16"])
    integers = load_file(tmp_path / "int" / "model.safetensors")

    def mix(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".mlp." in n]:
            del tensors[name]
        tensors |= {name: t for name, t in integers.items() if ".mlp." in name}

    change(tmp_path / "fp4", mix)
    groups = FORMS["packed w4a16"].config["config_groups"]

    def both(config: dict[str, Any]) -> None:
        config["format"] = "mixed-precision"
        config["config_groups"]["group_1"] = groups["group_0"]

    change_config(tmp_path / "fp4", both)
    model = load_pretrained(tmp_path / "fp4")
    assert isinstance(model.get_submodule(UP), IntLinear)
    assert isinstance(model.get_submodule(K_PROJ), Fp4Linear)
    expected = load_pretrained(tmp_path / "int").get_submodule(UP)
    assert torch.equal(model.get_buffer(f"{UP}.scales"), expected.scales)


# --------------------------------------------------------------------------- our layers in a model


@pytest.mark.parametrize("name", FP4)
def test_dequantised_models_have_ordinary_linears(tmp_path: Path, name: str) -> None:
    expected = write(tmp_path, FORMS[name])
    model = load_pretrained(tmp_path).dequantize()
    assert not any(isinstance(m, Fp4Linear) for m in model.modules())
    for path, linear in linears(expected).items():
        assert torch.equal(model.get_parameter(f"{path}.weight"), linear.weight)


def test_a_model_in_bfloat16_keeps_its_second_scales(tmp_path: Path) -> None:
    expected = write(tmp_path / "theirs", FORMS["modelopt nvfp4"])
    model = load_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    scale = model.get_submodule(UP).global_scale
    assert isinstance(scale, Tensor)
    assert scale.dtype == torch.float32
    logits, reference = model(PROMPT).logits, expected(PROMPT).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - reference).norm() < 0.05 * reference.norm()
    assert len(explain(model, input_ids=PROMPT).dispatches) == len(linears(expected))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(PROMPT).logits, logits)


@pytest.mark.parametrize("backend", ["intlass", "inductor"])
def test_what_is_loaded_compiles(tmp_path: Path, backend: str) -> None:
    write(tmp_path, FORMS["packed nvfp4"])
    mlp = load_pretrained(tmp_path).get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 3, 32)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(mlp, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "mxfp4", "kind 'nvfp4' of in_features 32, by its tensors; expected 'mxfp4' of 32"),
        ("kind", "fp4", "kind 'fp4'"),
        ("in_features", 64, "expected 'nvfp4' of 64"),
        ("activation", "int8", "kind 'nvfp4' with quantised activations"),
        ("zeros", ["uint8", [48, 2]], "kind 'nvfp4' with zeros"),
        ("scales", ["uint8", [48, 3]], "3 scales a row of K=32"),
        ("scales", ["int8", [48, 2]], r"scales are torch\.int8"),
        ("global_scale", ["float16", []], r"global_scale is torch\.float16"),
    ],
)
def test_damaged_descriptions_of_our_own(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    write(tmp_path, FORMS["packed nvfp4"])
    config = write_specs({UP: buffers_of(open_reader(Checkpoint(tmp_path)).stored(UP), None)[0]})
    assert read_specs("here", config)[UP].kind == "nvfp4"
    entry = config["layers"][0]
    (entry if key in entry else entry["tensors"])[key] = value
    with pytest.raises(FormatError, match=rf"^here: layers\[0\]: not a layer .*{message}"):
        read_specs("here", config)
