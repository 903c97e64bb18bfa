"""Checkpoints of a random two-layer Llama in other libraries' layouts, written without their code.

`write(directory, form)` makes one and returns the model it stands for, dequantised. Every form has
the codes drawn here; packing is spelled out bit by bit, as the formats' descriptions have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fp4_case import Fp4Weight, draw_fp4
from fp8_case import Fp8Weight, draw_fp8
from nf4_case import bitsandbytes_4bit, draw_nf4
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
DIVISOR = 20.0  # of NVFP4 in compressed-tensors' files


@dataclass
class Weight:
    """w[n, k] = s[n, g[k]]·(q[n, k] - z[n, g[k]])."""

    q: Tensor  # [N, K] unsigned
    z: Tensor  # [N, G]
    s: Tensor  # [N, G] fp16
    g: Tensor  # [K]
    bits: int

    def dense(self) -> Tensor:
        return (self.q - self.z[:, self.g]).float() * self.s.float()[:, self.g]


def draw(
    n: int, k: int, seed: int, *, bits: int = 4, symmetric: bool = False, shuffled: bool = False,
    groups: int | None = None, lowest: int = 0,
) -> Weight:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    groups = groups or k // GROUP
    q = torch.randint(0, 1 << bits, (n, k), generator=rng)
    z = torch.randint(lowest, 1 << bits, (n, groups), generator=rng)
    s = (torch.rand(n, groups, generator=rng) * 0.5 + 0.5) * 0.6 / (1 << bits)
    g = torch.arange(k) // (k // groups)
    if shuffled:
        g = g[torch.randperm(k, generator=rng)]
    return Weight(q, torch.full_like(z, 1 << (bits - 1)) if symmetric else z, s.half(), g, bits)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., C] lowest first into int32 [..., ceil(C·bits/32)]."""
    if bits == 3:  # one stream of bits: 32 codes in three words
        stream = (codes.long().unsqueeze(-1) >> torch.arange(3)) & 1
        value = (stream.flatten(-2).unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
        return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)
    per = 32 // bits
    padded = nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per))
    fields = padded.unflatten(-1, (-1, per))
    value = sum(fields[..., i] << (bits * i) for i in range(per))
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)  # type: ignore[arg-type]


def gptq(w: Weight, version: int) -> dict[str, Tensor]:
    stored = words(w.z.t(), w.bits)
    if version == 1 and w.bits == 3:  # each field by itself
        stored = words((w.z.t() - 1) % 8, 3)
    elif version == 1:  # one word at a time: a zero point of 0 borrows from the next
        stored -= {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[w.bits]
    return {
        "qweight": words(w.q, w.bits).t(),
        "qzeros": stored,
        "scales": w.s.t(),
        "g_idx": w.g.int(),
    }


def ordered(w: Weight, version: int) -> dict[str, Tensor]:
    """As AutoRound stores it, whose inputs are in order."""
    return {name: t for name, t in gptq(w, version).items() if name != "g_idx"}


def awq(w: Weight) -> dict[str, Tensor]:
    def pack(x: Tensor) -> Tensor:  # [R, N]
        return words(x.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2), 4)

    return {"qweight": pack(w.q.t()), "qzeros": pack(w.z.t()), "scales": w.s.t()}


def packed(w: Weight) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(w.q, w.bits),
        "weight_shape": torch.tensor(w.q.shape),
        "weight_scale": w.s,
        "weight_zero_point": words(w.z.t(), w.bits).t(),
        "weight_g_idx": w.g.int(),
    }
    if bool((w.z == 1 << (w.bits - 1)).all()):
        del tensors["weight_zero_point"]
    return tensors


def plain(w: Weight) -> dict[str, Tensor]:
    half = 1 << (w.bits - 1)
    return {"weight": (w.q - half).to(torch.int8), "weight_scale": w.s}


def small(value: int | str) -> Tensor:
    """A number or text as HQQ stores it."""
    if isinstance(value, str):
        return torch.tensor([ord(c) for c in value], dtype=torch.uint8)
    return torch.tensor(value, dtype=torch.int32)


def hqq(w: Weight) -> dict[str, Tensor]:
    group = w.q.shape[1] // w.s.shape[1]
    rows = w.q.reshape(-1, group).to(torch.uint8)
    half = len(rows) // 2
    codes = rows if w.bits == 8 else (rows[:half] << 4) | rows[half:]
    return {
        "W_q": codes, "scale": w.s.reshape(-1, 1), "zero": w.z.reshape(-1, 1).half(),
        "nbits": small(w.bits), "group_size": small(group), "axis": small(1),
        "shape": torch.tensor(w.q.shape), "packing": small(f"{w.bits}bit_u8"),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip


def torchao(w: Weight) -> dict[str, Tensor]:
    half = 1 << (w.bits - 1)
    return {
        "_weight_qdata": (w.q - half).to(torch.int8),
        "_weight_scale": w.s,
        "_weight_zero_point": (w.z - half).to(torch.int8),
    }


@dataclass
class Int8Weight:
    """w[n, k] = q[n, k]·SCB[n] / 127."""

    q: Tensor  # int8 [N, K]
    largest: Tensor  # float32 [N]

    def dense(self) -> Tensor:
        return self.q.float() * (self.largest / 127)[:, None]


def draw_int8(n: int, k: int, seed: int) -> Int8Weight:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (n, k), generator=rng).to(torch.int8)
    return Int8Weight(q, torch.rand(n, generator=rng) * 0.5 + 0.5)


def llm_int8(w: Int8Weight) -> dict[str, Tensor]:
    form = torch.tensor(0, dtype=torch.uint8)
    return {"weight": w.q, "SCB": w.largest, "weight_format": form}


def packed_fp4(w: Fp4Weight) -> dict[str, Tensor]:
    if w.is_mx:
        return {"weight_packed": w.packed(), "weight_scale": w.s}
    return {
        "weight_packed": w.packed(),
        "weight_scale": w.s.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([1 / w.global_scale]),
        "input_global_scale": torch.tensor([300.0]),
    }


def modelopt(w: Fp4Weight) -> dict[str, Tensor]:
    return {
        "weight": w.packed(),
        "weight_scale": w.s.view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(w.global_scale),
        "input_scale": torch.tensor(0.01),
    }


def fp8(w: Fp8Weight, scale: str = "weight_scale", more: str = "") -> dict[str, Tensor]:
    """Scales under a name; of a whole tensor, where there is but one, a number."""
    s = w.s[0, 0] if w.s.numel() == 1 and w.block == w.q.shape else w.s
    tensors = {"weight": w.codes(), scale: s}
    return tensors | ({more: torch.tensor(0.01)} if more else {})


def draw_mxfp8(n: int, k: int, seed: int, **how: Any) -> Fp8Weight:
    """With scales that are powers of two."""
    w = draw_fp8(n, k, seed, **how)
    w.s = torch.exp2(w.s.log2().floor())
    return w


def mxfp8(w: Fp8Weight) -> dict[str, Tensor]:
    return {"weight": w.codes(), "weight_scale": (w.s.log2() + 127).to(torch.uint8)}


def compressed(bits: int, form: str, activation: int | None = None) -> dict[str, Any]:
    inputs = {"num_bits": activation, "type": "int", "symmetric": True, "dynamic": True,
              "strategy": "token"}  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"},
        "input_activations": inputs if activation else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
        "kv_cache_scheme": None,
    }


def compressed_fp4(group: int) -> dict[str, Any]:
    config = compressed(4, f"{'mx' if group == 32 else 'nv'}fp4-pack-quantized")
    scheme = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": group}
    config["config_groups"]["group_0"] |= {
        "weights": {**scheme, "strategy": "group" if group == 32 else "tensor_group"},
        "input_activations": {**scheme, "dynamic": True if group == 32 else "local"},
    }
    return config


def compressed_fp8(**weights: Any) -> dict[str, Any]:
    config = compressed(8, "float-quantized")
    scheme = {"num_bits": 8, "type": "float", "symmetric": True}
    config["config_groups"]["group_0"] |= {
        "weights": {**scheme, "dynamic": False, **weights},
        "input_activations": {**scheme, "dynamic": True, "strategy": "token"},
    }
    return config


def gptq_config(bits: int, version: int, symmetric: bool = False) -> dict[str, Any]:
    form = "gptq_v2" if version == 2 else "gptq"
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "sym": symmetric,
        "checkpoint_format": form,
        "desc_act": True,
        "dynamic": {},
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.1.0"]},
    }


def auto_round_config(packing: str, bits: int = 4, symmetric: bool = False) -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": bits,
        "group_size": GROUP,
        "sym": symmetric,
        "data_type": "int",
        "autoround_version": "0.8.0",
        "block_name_to_quantize": "model.layers",
        "iters": 200,
    }


@dataclass
class Form:
    """How weights are drawn and stored, and what the config says."""

    draw: dict[str, Any]
    store: Callable[[Any], dict[str, Tensor]]
    config: dict[str, Any]
    metadata: str = ""  # of each weight
    make: Callable[..., Any] = draw
    sizes: dict[str, int] = field(default_factory=dict)  # of the Llama
    # How layers are drawn whose path contains a text; the first one counts.
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)

    def draw_of(self, path: str) -> dict[str, Any]:
        more = next((rule for text, rule in self.rules.items() if text in path), {})
        return {**self.draw, **more}


def torchao_type(target: str | None) -> str:
    """What the header says of a weight: weight only, or W8A8 with symmetric activations."""
    rows = {"granularity": {"_type": "PerRow", "_data": {"dim": -1}},
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}}  # fmt: skip
    if target is None:
        kwargs = {"_type": "QuantizeTensorToInt8Kwargs", "_data": rows}
        return json.dumps({"_type": "Int8Tensor", "_data": {"act_quant_kwargs": kwargs}})
    data = {
        "target_dtype": {"_type": "torch.dtype", "_data": target},
        "activation_quantization": None,
    }
    return json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": data})


# Sizes that are multiples of 32, as 3 bits want them.
WIDE = {"intermediate_size": 64, "num_key_value_heads": 2}
# As blocks of 64 along K want them.
BLOCKS_OF_64 = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
DYNAMIC = {
    "-:.*vision.*": {},
    r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": -1, "mse": 2.4},
    ".*down_proj": {"bits": 2, "desc_act": False, "pack_dtype": "int32"},
    "+:.*(q|k|v)_proj": {"group_size": 32, "sym": True},
}
# As the rules of DYNAMIC have it.
MIXED = {
    "1.mlp.down_proj": {"bits": 8, "groups": 1},
    "down_proj": {"bits": 2},
    "q_proj": {"groups": 1, "symmetric": True},
    "k_proj": {"groups": 1, "symmetric": True},
    "v_proj": {"groups": 1, "symmetric": True},
}
EXTRA = {
    "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32, "act_bits": 16},
    ".*mlp.up_proj.*": {"bits": 2, "data_type": "int", "super_bits": None},
    "lm_head": {"bits": 16, "act_bits": 16},
}
AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": None,
}
MODELOPT_CONFIG = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
}
FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [24, 16],
    "modules_to_not_convert": ["lm_head"],
}
NF4_CONFIG = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}
FORMS = {
    "gptq v1": Form({}, lambda w: gptq(w, 1), gptq_config(4, 1)),
    "gptq v1 symmetric": Form({"symmetric": True}, lambda w: gptq(w, 1), gptq_config(4, 1, True)),
    "gptq v2 act-order": Form({"shuffled": True}, lambda w: gptq(w, 2), gptq_config(4, 2)),
    "gptq v1 2 bits": Form({"bits": 2}, lambda w: gptq(w, 1), gptq_config(2, 1)),
    "gptq v1 8 bits": Form({"bits": 8, "shuffled": True}, lambda w: gptq(w, 1), gptq_config(8, 1)),
    "gptq v2 8 bits symmetric": Form(
        {"bits": 8, "symmetric": True}, lambda w: gptq(w, 2), gptq_config(8, 2, True)
    ),
    "gptq v1 3 bits": Form({"bits": 3}, lambda w: gptq(w, 1), gptq_config(3, 1), sizes=WIDE),
    "gptq v1 3 bits symmetric": Form(
        {"bits": 3, "symmetric": True}, lambda w: gptq(w, 1), gptq_config(3, 1, True), sizes=WIDE
    ),
    "gptq v2 3 bits act-order": Form(
        {"bits": 3, "shuffled": True}, lambda w: gptq(w, 2), gptq_config(3, 2), sizes=WIDE
    ),
    "gptq v1 dynamic": Form(
        {}, lambda w: gptq(w, 1), {**gptq_config(4, 1), "dynamic": DYNAMIC}, rules=MIXED
    ),
    "auto-round gptq": Form({}, lambda w: ordered(w, 1), auto_round_config("auto_round:auto_gptq")),
    "auto-round gptq 3 bits": Form(
        {"bits": 3, "lowest": 1}, lambda w: ordered(w, 1), auto_round_config("auto_round:gptq", 3),
        sizes=WIDE,
    ),
    "auto-round asymmetric": Form({}, lambda w: ordered(w, 2), auto_round_config("auto_round")),
    "auto-round mixed": Form(
        {"symmetric": True}, lambda w: ordered(w, 1),
        {**auto_round_config("auto_round:auto_gptq", symmetric=True), "extra_config": EXTRA},
        sizes=WIDE, rules={"0.mlp.down_proj": {"bits": 8, "groups": 2}, "up_proj": {"bits": 2}},
    ),
    "auto-round awq": Form({}, awq, auto_round_config("auto_round:auto_awq")),
    "awq": Form({}, awq, AWQ_CONFIG),
    "packed w4a16": Form({"symmetric": True}, packed, compressed(4, "pack-quantized")),
    "packed w4a16 asymmetric act-order": Form(
        {"shuffled": True}, packed, compressed(4, "pack-quantized")
    ),
    "packed w8a16": Form({"bits": 8, "symmetric": True}, packed, compressed(8, "pack-quantized")),
    "int w8a8": Form(
        {"bits": 8, "symmetric": True, "groups": 1}, plain, compressed(8, "int-quantized", 8)
    ),
    "int w4a8": Form({"symmetric": True}, plain, compressed(4, "int-quantized", 8)),
    "hqq 4 bits": Form({}, hqq, {"quant_method": "hqq"}),
    "hqq 8 bits": Form({"bits": 8}, hqq, {"quant_method": "hqq"}),
    "torchao int4": Form({}, torchao, {"quant_method": "torchao"}, torchao_type("int4")),
    "torchao w8a8": Form(
        {"bits": 8, "symmetric": True, "groups": 1}, torchao, {"quant_method": "torchao"},
        torchao_type(None),
    ),
    "bitsandbytes int8": Form(
        {}, llm_int8,
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
         "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None}, make=draw_int8,
    ),
    "bitsandbytes nf4": Form(
        {"dtype": torch.bfloat16}, bitsandbytes_4bit, NF4_CONFIG, make=draw_nf4, sizes=BLOCKS_OF_64
    ),
    "bitsandbytes fp4": Form(
        {"dtype": torch.bfloat16, "kind": "fp4"}, bitsandbytes_4bit,
        {**NF4_CONFIG, "bnb_4bit_quant_type": "fp4"}, make=draw_nf4, sizes=BLOCKS_OF_64,
    ),
    "bitsandbytes nf4 double": Form(
        {"double": True}, lambda w: bitsandbytes_4bit(w, torch.bfloat16),
        {**NF4_CONFIG, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
        make=draw_nf4, sizes=BLOCKS_OF_64,
    ),
    "packed nvfp4": Form(
        {"group": 16, "global_scale": 1 / DIVISOR}, packed_fp4, compressed_fp4(16), make=draw_fp4
    ),
    "packed mxfp4": Form(
        {"group": 32}, packed_fp4, compressed_fp4(32), make=draw_fp4,
        sizes={"intermediate_size": 64},
    ),
    "modelopt nvfp4": Form(
        {"group": 16, "global_scale": 0.07}, modelopt, MODELOPT_CONFIG, make=draw_fp4
    ),
    "fp8 blocks": Form(
        {"block": (24, 16)}, lambda w: fp8(w, "weight_scale_inv"), FP8_CONFIG, make=draw_fp8
    ),
    "fp8 per tensor": Form(
        {"block": (None, None)}, lambda w: fp8(w, "weight_scale_inv", "activation_scale"),
        {"quant_method": "fp8", "activation_scheme": "static"}, make=draw_fp8,
    ),
    "fbgemm fp8": Form(
        {}, lambda w: fp8(w, "weight_scale", "input_scale_ub"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, make=draw_fp8,
    ),
    "packed fp8": Form(
        {"dtype": torch.bfloat16}, fp8, compressed_fp8(strategy="channel"), make=draw_fp8
    ),
    "packed fp8 blocks": Form(
        {"block": (24, 16), "dtype": torch.bfloat16}, fp8,
        compressed_fp8(strategy="block", block_structure=[24, 16]), make=draw_fp8,
    ),
    "packed mxfp8": Form(
        {"block": (1, 32)}, mxfp8,
        {**compressed_fp8(strategy="group", group_size=32), "format": "mxfp8-quantized"},
        make=draw_mxfp8,
    ),
    "modelopt mxfp8": Form(
        {"block": (1, 32)}, mxfp8, {**MODELOPT_CONFIG, "quant_algo": "MXFP8"}, make=draw_mxfp8
    ),
    "modelopt fp8": Form(
        {"block": (None, None)}, lambda w: fp8(w, "weight_scale", "input_scale"),
        {**MODELOPT_CONFIG, "quant_algo": "FP8"}, make=draw_fp8,
    ),
}  # fmt: skip


def tiny_llama(seed: int = 0, *, tied: bool = False, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        attention_bias=True, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, architectures=["LlamaForCausalLM"], dtype="float32",
        tie_word_embeddings=tied,
    )  # fmt: skip
    config.update(sizes)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def write_experts(directory: Path, form: Form, kind: str = "Mixtral") -> Any:
    """The checkpoint of a tiny mixture, a linear for each expert; returns it dequantised."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    torch.manual_seed(0)
    size = form.sizes.get("intermediate_size", 48)
    own: dict[str, Any] = {
        "Mixtral": {"num_local_experts": 4, "intermediate_size": size},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": size, "head_dim": 16},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts_per_tok=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, eos_token_id=None, pad_token_id=0,
        architectures=[f"{kind}ForCausalLM"], dtype="float32", **own,
    )  # fmt: skip
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    model = model_class(config)
    dense = revert_weight_conversion(model, model.state_dict())
    state = dict(dense)
    for seed, name in enumerate(name for name in dense if re.search(r"_proj|\.w[123]\.", name)):
        expert, draw = re.search(r"experts\.(\d+)", name), dict(form.draw)
        if expert is not None and "global_scale" in draw:  # each has its own
            draw["global_scale"] /= 2 ** int(expert[1])
        w = form.make(*dense[name].shape, seed, **draw)
        dense[name] = w.dense()
        del state[name]
        path = name.removesuffix(".weight")
        state |= {f"{path}.{part}": t for part, t in form.store(w).items()}
    save(directory, state, form.config, config)
    return model_class.from_pretrained(None, config=config, state_dict=dense).eval()


def write_gpt_oss(directory: Path) -> Any:
    """gpt-oss as it is published, with experts of random MXFP4; returns it dequantised."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=None, initializer_range=0.3,
        architectures=["GptOssForCausalLM"], dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        parameter = model.get_parameter(name)
        experts, k, n = parameter.shape
        blocks = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, blocks.shape[:3], dtype=torch.uint8)
        parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        del state[name]
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    left = {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    save(directory, state, {"quant_method": "mxfp4", **left}, config)
    return model


def change(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """``edit`` puts and deletes tensors of the checkpoint in ``directory``."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }


def round_to_nearest(dense: Tensor, group: int, *, bits: int = 4, symmetric: bool = False,
                     **_: Any) -> Weight:  # fmt: skip
    """Codes of a real weight instead of drawn ones."""
    n, k = dense.shape
    w, top = dense.float().view(n, -1, group), (1 << bits) - 1
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    s = ((high - low) / top).clamp(min=1e-6).half()
    z = torch.full_like(s, 1 << (bits - 1)).float() if symmetric else (-low / s.float()).round()
    q = (w / s.float() + z).round().clamp(0, top)
    index = torch.arange(k) // group
    return Weight(q.view(n, k).long(), z.view(n, -1).long(), s.view(n, -1), index, bits)


@torch.no_grad()
def write(
    directory: Path, form: Form, model: Any = None, *, group: int | None = None
) -> LlamaForCausalLM:
    """The checkpoint of one form; returns the model with the dequantised weights.

    Of a tiny Llama with drawn codes, or of ``model``, whose weights are rounded in groups of
    ``group``.
    """
    drawn, model = model is None, model or tiny_llama(**form.sizes)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for seed, (path, linear) in enumerate(linears(model).items()):
        if drawn:
            w = form.make(linear.out_features, linear.in_features, seed, **form.draw_of(path))
        else:
            w = round_to_nearest(linear.weight, group or linear.in_features, **form.draw)
        del state[f"{path}.weight"]
        state |= {f"{path}.{name}": t for name, t in form.store(w).items()}
        linear.weight.copy_(w.dense())
    metadata = {f"{path}.weight": form.metadata for path in linears(model)}
    model.config.architectures = ["LlamaForCausalLM"]
    save(directory, state, form.config, model.config, metadata if form.metadata else None)
    return model


def save(
    directory: Path,
    state: dict[str, Tensor],
    quantization: dict[str, Any],
    config: Any,
    metadata: dict[str, str] | None = None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata)
    text = json.dumps({**config.to_dict(), "quantization_config": quantization})
    (directory / "config.json").write_text(text)


def change_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))
