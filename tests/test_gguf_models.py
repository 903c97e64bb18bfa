"""Models of each architecture in GGUF files: the numbers of transformers' own model, codes kept."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

import transformers  # noqa: E402
from gguf import GGMLQuantizationType as Type  # noqa: E402
from tiny_gguf import HIDDEN  # noqa: E402
from tiny_gguf_models import CASES, LLAMA3, Case, write_model  # noqa: E402

from intlass_ops import (  # noqa: E402
    Fp4ExpertLinear,
    Fp4Linear,
    IntExpertLinear,
    IntLinear,
    Lut4Linear,
    load_pretrained,
)
from intlass_ops.formats import FormatError  # noqa: E402
from intlass_ops.formats.gguf import GGUFFile  # noqa: E402
from intlass_ops.integrations import gguf_models  # noqa: E402
from intlass_ops.integrations.experts import SUFFIX  # noqa: E402
from intlass_ops.integrations.model_layers import linear_of  # noqa: E402
from intlass_ops.nn import PackedLinear  # noqa: E402

IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
# What transformers' own reader of GGUF files knows, where its configs' defaults say what it does
# not read: of scaled rotary embeddings, softcapping and the width of experts it knows nothing.
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {},
    "qwen2": {},
    "qwen2moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3": {"head_dim": 128},
    "qwen3moe": {"moe_intermediate_size": 768},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "starcoder2": {},
}
every = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def dense_of(model: Any, name: str) -> torch.Tensor:
    """What a parameter of the float model is in ours."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, last + SUFFIX):
        dense = getattr(module, last + SUFFIX).dequantize()
        return dense.transpose(1, 2) if module.is_transposed else dense
    if last == "weight" and isinstance(module, (Fp4Linear, Lut4Linear)):
        return module.dequantize()
    if last == "weight" and isinstance(module, IntLinear):
        return linear_of(module, torch.float32).weight
    if last == "weight" and isinstance(module, PackedLinear):
        product = module(torch.eye(module.in_features))
        return (product if module.bias is None else product - module.bias).t()
    return getattr(module, last)


@every
@torch.no_grad()
def test_float_file_gives_the_transformers_model_back(tmp_path: Path, case: Case) -> None:
    original = write_model(tmp_path / "f.gguf", case)
    for loaded in (
        gguf_models.load_dense(GGUFFile(tmp_path / "f.gguf")),
        load_pretrained(tmp_path / "f.gguf"),
    ):
        assert type(loaded) is type(original)
        assert_same(loaded(IDS).logits, original(IDS).logits)
        for name, value in original.named_parameters():
            torch.testing.assert_close(
                loaded.get_parameter(name), value, rtol=0, atol=1e-6, msg=name
            )


# Of integers one kind an architecture
KINDS = [
    (case, kind)
    for turn, case in enumerate(CASES)
    for kind in ((Type.Q4_0, Type.Q4_1, Type.Q8_0)[turn % 3], Type.MXFP4)
]


@pytest.mark.parametrize(
    ("case", "kind"), [pytest.param(CASES[c], k, id=f"{c}-{k.name}") for c, k in KINDS]
)
@torch.no_grad()
def test_codes_are_kept(tmp_path: Path, case: Case, kind: Type) -> None:
    original = write_model(tmp_path / "q.gguf", case, kind)
    model = load_pretrained(tmp_path / "q.gguf")
    for name, value in original.named_parameters():
        # Q4_1's zeros are a rounded quotient.
        atol = 1e-6 if kind == Type.Q4_1 or name.endswith("norm.weight") else 0
        torch.testing.assert_close(dense_of(model, name), value, rtol=0, atol=atol, msg=name)
    assert_same(model(IDS).logits, original(IDS).logits)
    quantised = {
        name for name, info in GGUFFile(tmp_path / "q.gguf").tensors.items() if info.type != "F32"
    }
    integers, fp4 = (IntLinear, IntExpertLinear), (Fp4Linear, Fp4ExpertLinear)
    kinds = fp4 if kind == Type.MXFP4 else integers
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    gates = sum("ffn_gate_exps" in name for name in quantised)  # with ffn_up_exps one layer
    tied = "output.weight" not in quantised
    assert len(layers) == len(quantised) - gates - (not tied)
    for_demo = gguf_models.load(GGUFFile(tmp_path / "q.gguf"))
    assert_same(for_demo(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("name", ["llama 3.1", "qwen3", "qwen3moe", "phi3 longrope", "gemma3"])
@torch.no_grad()
def test_generates_saves_and_reloads(tmp_path: Path, name: str) -> None:
    original = write_model(tmp_path / "q.gguf", CASES[name], Type.Q4_0, table=Type.Q8_0)
    model = load_pretrained(tmp_path / "q.gguf")
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    text = model.generate(IDS[:1], **how)
    assert torch.equal(text, original.generate(IDS[:1], **how))
    model.save_pretrained(tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(again.generate(IDS[:1], **how), text)


# K-quants have blocks of 256 weights.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
K_QUANTS = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS]
GRIDS = [Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S]
TERNARY = [Type.TQ1_0, Type.TQ2_0]
FP4 = [Type.MXFP4, Type.NVFP4]


@pytest.mark.parametrize("kind", [*K_QUANTS, *GRIDS, *TERNARY, *FP4], ids=lambda kind: kind.name)
@torch.no_grad()
def test_k_quants(tmp_path: Path, kind: Type) -> None:
    original = write_model(tmp_path / "q.gguf", CASES["qwen3"], kind, table=Type.Q6_K, **WIDE)
    model = load_pretrained(tmp_path / "q.gguf")
    for name, value in original.named_parameters():
        torch.testing.assert_close(dense_of(model, name), value, rtol=1e-5, atol=1e-5, msg=name)
    assert_same(model(IDS).logits, original(IDS).logits)
    if kind == Type.IQ4_XS:  # in four bits
        assert {layer.kind for layer in model.modules() if isinstance(layer, Lut4Linear)} == {
            "iq4nl"
        }
        model.save_pretrained(tmp_path / "ours")
        assert torch.equal(load_pretrained(tmp_path / "ours")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "kind", [*K_QUANTS, *GRIDS[::2], TERNARY[0], *FP4], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
@torch.no_grad()
def test_k_quants_of_experts(tmp_path: Path, name: str, kind: Type) -> None:
    wide = WIDE | ({"moe_intermediate_size": 256} if name == "qwen3moe" else {})
    original = write_model(tmp_path / "q.gguf", CASES[name], kind, table=Type.Q6_K, **wide)
    model = load_pretrained(tmp_path / "q.gguf")
    for parameter, value in original.named_parameters():
        found = dense_of(model, parameter)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=parameter)
    assert_same(model(IDS).logits, original(IDS).logits)
    if kind == Type.Q5_K:  # in two halves
        model.save_pretrained(tmp_path / "ours")
        again = load_pretrained(tmp_path / "ours")
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_agrees_with_the_reader_of_transformers(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "q.gguf", CASES[name], Type.Q8_0, **KNOWN[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="q.gguf", dtype=torch.float32
    )
    ours = load_pretrained(tmp_path / "q.gguf")
    assert_same(ours(IDS).logits, theirs.eval()(IDS).logits)


def test_factors_of_llama_3_are_its_parameters_again(tmp_path: Path) -> None:
    write_model(tmp_path / "f.gguf", CASES["llama 3.1"])
    config = gguf_models.config_of(GGUFFile(tmp_path / "f.gguf"))
    assert config.rope_parameters == LLAMA3


@torch.no_grad()
def test_other_rotary_factors_are_kept_as_they_are(tmp_path: Path) -> None:
    factors = torch.tensor([1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 7.5, 8.0])

    def more(writer: gguf.GGUFWriter, config: Any) -> None:
        CASES["llama"].more(writer, config)
        writer.add_tensor("rope_freqs.weight", factors.numpy())

    original = write_model(tmp_path / "f.gguf", Case("llama", "LlamaForCausalLM", {}, more))
    original.model.rotary_emb.inv_freq /= factors
    model = load_pretrained(tmp_path / "f.gguf")
    ids = torch.arange(3, 203).remainder(250)[None].repeat(1, 2)  # longer than the context
    assert_same(model(ids).logits, original(ids).logits)


def changed(tmp_path: Path, name: str = "llama", **metadata: Any) -> GGUFFile:
    """A file of a model with other metadata; dots are written as two underscores."""
    write_model(tmp_path / "f.gguf", CASES[name])
    file = GGUFFile(tmp_path / "f.gguf")
    for key, value in metadata.items():
        file.metadata[key.replace("__", ".")] = value
    return file


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba' is not read; read are llama, "),
        ({"general__architecture": 3}, "'general.architecture' is 3; expected str"),
        ({"llama__block_count": 3}, "the metadata says 3 layers, there are tensors of 2"),
        ({"llama__block_count": 2**40}, "'llama.block_count' is 1099511627776; expected int"),
        ({"llama__block_count": "2"}, "'llama.block_count' is '2'; expected int"),
        ({"llama__embedding_length": 0}, "'llama.embedding_length' is 0; expected more"),
        ({"llama__embedding_length": 128}, r"token_embd\.weight has shape \(265, 64\); model\."),
        ({"llama__attention__head_count": -4}, "'llama.attention.head_count' is -4; expected int"),
        ({"llama__attention__head_count": 8}, r"attn_k\.weight has shape .*q_proj|attn_q|attn_k"),
        ({"llama__attention__head_count_kv": [2, 1]}, "differs by layer"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "is nan; expected float"),
        ({"llama__attention__value_length": 8}, "heads of 16 keys and 8 values"),
        ({"llama__attention__sliding_window": 4096}, "sliding_window' is 4096, which is not supp"),
        ({"llama__attention__causal": False}, "'llama.attention.causal' is False, which is not"),
        ({"llama__attn_logit_softcapping": 50.0}, "softcapping' is 50.0, which is not supported"),
        ({"llama__logit_scale": 0.5}, "'llama.logit_scale' is 0.5, which is not supported"),
        ({"llama__expert_count": 4}, "'llama.expert_used_count' is missing"),
        ({"llama__rope__dimension_count": 8}, "rotary embeddings of 8 of 16 values a head"),
        ({"llama__rope__freq_base": 0.0}, "'llama.rope.freq_base' is 0.0; expected more than 0"),
        ({"llama__rope__scaling__type": "yarn"}, "'llama.rope.scaling.factor' is missing"),
        ({"llama__rope__scaling__type": "odd"}, "scaled rotary embeddings of type 'odd'"),
        ({"llama__rope__scaling__factor": 2.0}, "'llama.rope.scaling.factor' is 2.0, which is not"),
        ({"llama__rope__scaling__yarn_log_multiplier": 1.0}, "log_multiplier' is 1.0, which"),
        ({"tokenizer__ggml__eos_token_id": 265}, "eos_token_id' is 265; the vocabulary has 265"),
    ],
)
def test_metadata_that_cannot_be_right_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        gguf_models.load_dense(changed(tmp_path, **metadata))


def test_experts_of_another_shape_or_type_are_named(tmp_path: Path) -> None:
    file = changed(tmp_path, "mixtral")
    file.tensors["blk.0.ffn_up_exps.weight"] = file.info("blk.0.ffn_down_exps.weight")
    message = r"ffn_gate_exps\.weight and blk\.0\.ffn_up_exps\.weight has shape \(4, 96, 64\) and "
    with pytest.raises(FormatError, match=message):
        gguf_models.load(file)
    write_model(tmp_path / "q.gguf", CASES["mixtral"], Type.Q4_0)
    mixed = GGUFFile(tmp_path / "q.gguf")
    info = mixed.tensors["blk.0.ffn_up_exps.weight"]
    mixed.tensors["blk.0.ffn_up_exps.weight"] = replace(info, type="F32")
    with pytest.raises(FormatError, match=r"ffn_up_exps\.weight are not stored alike"):
        gguf_models.load(mixed)


def test_metadata_without_an_effect_is_no_reason_to_refuse(tmp_path: Path) -> None:
    neutral = {"llama__attention__causal": True, "llama__expert_count": 0, "general__tags": ["x"]}
    gguf_models.load_dense(changed(tmp_path, **neutral))


ODD: list[Any] = [0, 1, 7, -1, 2**31 - 1, 2**62, 0.0, -1.5, 1e38, math.inf, "", "x", True, [], [1]]


@pytest.mark.parametrize(
    "name", ["llama 3.1", "mixtral", "gemma3", "phi3 longrope", "smollm3", "gpt-oss"]
)
def test_no_value_of_the_metadata_does_more_than_raise(tmp_path: Path, name: str) -> None:
    file = changed(tmp_path, name)
    rng, sound, refused = random.Random(name), dict(file.metadata), 0
    keys = [key for key in sound if not key.startswith("general.name")]
    for _ in range(60):
        file.metadata = dict(sound)
        file.metadata[rng.choice(keys)] = rng.choice(ODD)
        try:
            gguf_models.tokenizer_of(file)
            gguf_models.places(file, gguf_models.config_of(file), gguf_models.architecture_of(file))
        except FormatError:
            refused += 1
    assert refused > 30


def test_tensors_too_many_and_too_few_are_named(tmp_path: Path) -> None:
    file = changed(tmp_path)
    file.tensors["blk.1.attn_sinks.weight"] = file.tensors["blk.1.attn_norm.weight"]
    with pytest.raises(FormatError, match=r"has no use for blk\.1\.attn_sinks\.weight"):
        gguf_models.load(file)
    del file.tensors["blk.1.attn_sinks.weight"], file.tensors["blk.0.ffn_up.weight"]
    with pytest.raises(FormatError, match=r"no tensor 'blk\.0\.ffn_up\.weight'"):
        gguf_models.load(file)


def test_rotary_factors_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    file = changed(tmp_path)
    file.tensors["rope_freqs.weight"] = file.info("output_norm.weight")
    message = rf"rope_freqs\.weight is no list of 8 positive factors; it has shape \({HIDDEN},\)"
    with pytest.raises(FormatError, match=message):
        gguf_models.config_of(file)
    file.metadata["llama.rope.scaling.type"] = "yarn"
    with pytest.raises(FormatError, match="embeddings of type 'yarn' are not supported"):
        gguf_models.config_of(file)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen2", "rope_freqs.weight"),
        ("llama", "rope_factors_long.weight"),
        ("phi3 longrope", "rope_freqs.weight"),
    ],
)
def test_rotary_factors_of_other_architectures_are_refused(
    tmp_path: Path, name: str, tensor: str
) -> None:
    file = changed(tmp_path, name)
    file.tensors[tensor] = file.info("output_norm.weight")
    with pytest.raises(FormatError, match=r"embeddings of type .* with these tensors"):
        gguf_models.config_of(file)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_their_attention_by_the_width(
    tmp_path: Path, name: str, layers: int
) -> None:
    file = changed(tmp_path, name, **{f"{name}__block_count": layers})
    for number in range(layers):
        file.tensors[f"blk.{number}.attn_norm.weight"] = file.info("output_norm.weight")
    assert gguf_models.config_of(file).query_pre_attn_scalar == HIDDEN // 4
