"""What is known of each architecture of GGUF files: its model, its tensors' names, its metadata.

Tables only, after llama.cpp's converter (its folder conversion/) and loader. Not here: what every
architecture has, and how the tables are read (gguf_config.py, gguf_tensors.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Metadata key (after the architecture's name) -> config field and its type.
Fields = Mapping[str, tuple[str, type]]
# Path in a layer of the model -> tensors in a layer of the file, whose rows follow one another.
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Architecture:
    """A ``general.architecture`` and the transformers model that it is.

    ``layer``: a parameter of a module of experts, or of no module of its own, has its name with it.

    ``required`` and ``optional`` metadata besides what all have; ``fixed``: config fields that no
    key states. ``biases``: config fields that are true where the first layer has a bias of a name.
    """

    model: str
    layer: Names
    required: Fields
    optional: Fields = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    # llama.cpp rotates neighbours of a head here: rows of q and k are stored in another order.
    interleaved: bool = False
    # Norms multiply by 1 + weight in transformers, the file has the sum.
    norm_offset: float = 0.0
    # The number of layers of the one model whose attention is scaled by hidden size / heads.
    scaled_by_width: int | None = None
    # A rotary part of a head may be smaller than the head.
    partial_rotary: bool = False
    # YaRN's ramp begins and ends between two frequencies; llama.cpp rounds that everywhere.
    exact_yarn: bool = False
    # Tokens that end a text besides EOS, as the model's generation_config.json has them.
    stops: tuple[str, ...] = ()


_ATTENTION: Names = {
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
}
_MLP: Names = {
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
}
_NORMS: Names = {
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("ffn_norm",),
}
_QK_NORMS: Names = {
    "self_attn.q_norm": ("attn_q_norm",),
    "self_attn.k_norm": ("attn_k_norm",),
}
_FOUR_NORMS: Names = {
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("post_attention_norm",),
    "pre_feedforward_layernorm": ("ffn_norm",),
    "post_feedforward_layernorm": ("post_ffw_norm",),
}
_EXPERTS: Names = {
    "mlp.gate": ("ffn_gate_inp",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
_EXPERTS_WITH_BIASES: Names = {
    "mlp.router": ("ffn_gate_inp",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
    "mlp.experts.down_proj_bias": ("ffn_down_exps",),
}
_SHARED_EXPERT: Names = {
    "mlp.shared_expert_gate": ("ffn_gate_inp_shexp",),
    "mlp.shared_expert.gate_proj": ("ffn_gate_shexp",),
    "mlp.shared_expert.up_proj": ("ffn_up_shexp",),
    "mlp.shared_expert.down_proj": ("ffn_down_shexp",),
}

_RMS: Fields = {"attention.layer_norm_rms_epsilon": ("rms_norm_eps", float)}
_WIDTH: Fields = {"feed_forward_length": ("intermediate_size", int)}
_DENSE: Fields = {**_RMS, **_WIDTH}
_MIXTURE: Fields = {
    "expert_count": ("num_experts", int),
    "expert_used_count": ("num_experts_per_tok", int),
    "expert_feed_forward_length": ("moe_intermediate_size", int),
    **_RMS,
}
_BIASES = {"attention_bias": "attn_q"}
_EVERY_LAYER_MIXED = {"decoder_sparse_step": 1, "mlp_only_layers": []}

_LLAMA = Architecture(
    "LlamaForCausalLM",
    {**_ATTENTION, **_MLP, **_NORMS},
    _DENSE,
    biases={**_BIASES, "mlp_bias": "ffn_up"},
    interleaved=True,
)
_QWEN3 = Architecture(
    "Qwen3ForCausalLM", {**_ATTENTION, **_QK_NORMS, **_MLP, **_NORMS}, _DENSE, biases=_BIASES
)
_GEMMA = Architecture(
    "GemmaForCausalLM",
    {**_ATTENTION, **_MLP, **_NORMS},
    _DENSE,
    fixed={"hidden_act": "gelu_pytorch_tanh"},
    norm_offset=1.0,
)

ARCHITECTURES: dict[str, Architecture] = {
    # Also Mistral, whose first version has a window of 4096 that no file tells.
    "llama": _LLAMA,
    "smollm3": replace(_LLAMA, model="SmolLM3ForCausalLM", fixed={"no_rope_layer_interval": 4}),
    "qwen2": Architecture("Qwen2ForCausalLM", {**_ATTENTION, **_MLP, **_NORMS}, _DENSE),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        {**_ATTENTION, **_EXPERTS, **_SHARED_EXPERT, **_NORMS},
        {
            **_MIXTURE,
            "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", int),
        },
        optional=_WIDTH,
        fixed={"norm_topk_prob": False, **_EVERY_LAYER_MIXED},
    ),
    "qwen3": _QWEN3,
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_QK_NORMS, **_EXPERTS, **_NORMS},
        _MIXTURE,
        optional=_WIDTH,
        fixed={"norm_topk_prob": True, **_EVERY_LAYER_MIXED},
        biases=_BIASES,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        model="Gemma2ForCausalLM",
        layer={**_ATTENTION, **_MLP, **_FOUR_NORMS},
        required={
            **_DENSE,
            "attention.sliding_window": ("sliding_window", int),
            "attn_logit_softcapping": ("attn_logit_softcapping", float),
            "final_logit_softcapping": ("final_logit_softcapping", float),
        },
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        scaled_by_width=46,
    ),
    "gemma3": replace(
        _GEMMA,
        model="Gemma3ForCausalLM",
        layer={**_ATTENTION, **_QK_NORMS, **_MLP, **_FOUR_NORMS},
        optional={
            "attention.sliding_window": ("sliding_window", int),
            "final_logit_softcapping": ("final_logit_softcapping", float),
        },
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        scaled_by_width=62,
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        {
            "self_attn.qkv_proj": ("attn_qkv",),
            "self_attn.o_proj": ("attn_output",),
            "mlp.gate_up_proj": ("ffn_up",),
            "mlp.down_proj": ("ffn_down",),
            **_NORMS,
        },
        _DENSE,
        # As the original models have it; llama.cpp reads the key but attends to everything.
        optional={"attention.sliding_window": ("sliding_window", int)},
        partial_rotary=True,
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM",
        {**_ATTENTION, "mlp.c_fc": ("ffn_up",), "mlp.c_proj": ("ffn_down",), **_NORMS},
        {"attention.layer_norm_epsilon": ("norm_epsilon", float), **_WIDTH},
        biases={"use_bias": "attn_q"},
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {
            **_ATTENTION,
            "self_attn.sinks": ("attn_sinks",),
            **_EXPERTS_WITH_BIASES,
            "input_layernorm": ("attn_norm",),
            "post_attention_layernorm": ("post_attention_norm",),
        },
        {
            **_DENSE,  # of its width the file has two keys, of which this one counts:
            "expert_feed_forward_length": ("intermediate_size", int),
            "expert_count": ("num_local_experts", int),
            "expert_used_count": ("num_experts_per_tok", int),
            "attention.sliding_window": ("sliding_window", int),
        },
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        biases=_BIASES,
        exact_yarn=True,
        stops=("<|endoftext|>", "<|call|>"),
    ),
}

# Mixtral and its kin say "llama" too, and how many experts they have.
LLAMA_OF_EXPERTS = replace(
    _LLAMA,
    model="MixtralForCausalLM",
    layer={**_ATTENTION, **_EXPERTS, **_NORMS},
    required={
        **_DENSE,
        "expert_count": ("num_local_experts", int),
        "expert_used_count": ("num_experts_per_tok", int),
    },
    biases={},
)
