# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. torch.compile on a model that another library quantised
#
# Libraries store quantised weights in their own ways and unpack them in plain PyTorch before every product.
# `backend="intlass"` finds those products in the compiled graph, proves what weight they use, and swaps in an integer
# GEMM. The model stays the library's.
#
# The libraries used here are those of `requirements-zoo.txt`; a missing one is skipped.

# %%
import copy
import logging
import warnings

import torch
from transformers.utils.logging import disable_progress_bar

import intlass_ops as iq

disable_progress_bar()
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)  # the libraries', about optional parts they miss
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
dense = torch.nn.Sequential(
    torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256, bias=False)
)
dense = dense.to(device, torch.bfloat16).eval().requires_grad_(False)
x = torch.randn(8, 256, device=device, dtype=torch.bfloat16)

# %% [markdown]
# ## One library, step by step: torchao
#
# Quantise as torchao's documentation says, compile with our backend, and ask `explain` what became of each linear.

# %%
import torchao.quantization as ao

model = copy.deepcopy(dense)
ao.quantize_(model, ao.Int8WeightOnlyConfig(version=2))
fast = torch.compile(model, backend="intlass")
with torch.inference_mode(), iq.strict():
    explanation = iq.explain(fast, x)
    difference = (explanation.result.float() - model(x).float()).norm() / model(x).float().norm()
print(explanation)
print(f"\nrelative difference from torchao's own result: {float(difference):.1e}")

# %% [markdown]
# Both round once to bf16, at different places; a difference of a few thousandths is bf16's own grain.
#
# `error <=` is the bound that the rewrite proved for the linear, and `why` says which rule it was. A linear that cannot
# be proved stays as it was, and is listed as declined with the reason. Inside `strict()` it is an error instead. `strict()`
# also compiles anew: graphs from PyTorch's caches do not know any more what was decided.
#
# ## All of them
#
# HQQ keeps floating zero points, optimum-quanto wraps tensors in subclasses, torchao has integer activations too. PT2E
# leaves quantise and dequantise nodes in an exported graph, here for x86. The last entry is no library at all: a module
# that someone wrote by hand, which unpacks two codes a byte in its `forward`. The loop below is the same two lines for each.


# %%
def torchao(name, **options):
    def make(model):
        ao.quantize_(model, getattr(ao, name)(**options))
        return model, x

    return make


def hqq(model):
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    for i in (0, 2):
        config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        model[i] = HQQLinear(model[i], config, compute_dtype=torch.bfloat16, device=device)
    return model, x


def quanto(model):
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model, x


def pt2e(model):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    inputs = x.cpu().float()
    exported = torch.export.export(model.cpu().float(), (inputs,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    prepared = prepare_pt2e(exported, quantizer)
    prepared(inputs)
    return convert_pt2e(prepared), inputs


class Handwritten(torch.nn.Module):
    """4-bit codes with a scale and a zero point for each group of 64, even columns in the low nibble."""

    def __init__(self, linear):
        super().__init__()
        w = linear.weight.float().unflatten(1, (-1, 64))
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        scale = (high - low) / 15
        codes = ((w - low) / scale).round().flatten(1).to(torch.uint8)
        self.bias = linear.bias
        self.register_buffer("packed", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", (-low / scale).round())

    def forward(self, x):
        codes = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1)
        w = (codes.unflatten(1, (-1, 64)) - self.zero) * self.scale
        return torch.nn.functional.linear(x, w.flatten(1).to(x.dtype), self.bias)


def handwritten(model):
    model[0], model[2] = Handwritten(model[0]), Handwritten(model[2])
    return model, x


LIBRARIES = {
    "torchao, int8 weights and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "HQQ, 4 bits": hqq,
    "optimum-quanto, 8 bits": quanto,
    "PT2E for x86, int8": pt2e,
    "hand-written, 4 bits": handwritten,
}
print(f"{'library':<38} {'swapped':<8} {'schemes':<8} difference")
for name, make in LIBRARIES.items():
    torch._dynamo.reset()
    try:
        model, inputs = make(copy.deepcopy(dense))
    except ImportError as error:
        print(f"{name:<38} not installed: {error.name}")
        continue
    with torch.no_grad(), iq.strict():
        theirs = model(inputs).float()
        explanation = iq.explain(torch.compile(model, backend="intlass"), inputs)
    swapped = [each for each in explanation.linears if each.outcome == "swapped"]
    difference = (explanation.result.float() - theirs).norm() / theirs.norm()
    schemes = ", ".join(sorted({each.scheme for each in swapped}))
    print(
        f"{name:<38} {f'{len(swapped)} of {len(explanation.linears)}':<8} {schemes:<8} "
        f"{float(difference):.1e}"
    )

# %% [markdown]
# The full list of library forms, and which of them are declined and why, is a committed table:
# `benchmarks/results/lowering-cpu.md`, and `lowering-cuda.md` for a GPU.
#
# ## Without torch.compile: `prepare_`
#
# Some modules hide their weight behind a kernel of their own, as GPTQ and AWQ layers do, so no graph shows it.
# `prepare_` converts modules in place instead, one after the other. It works on any of the above too, holds each weight
# once, and the result runs eagerly.

# %%
model, _ = LIBRARIES["HQQ, 4 bits"](copy.deepcopy(dense))
theirs = model(x).float()
for decision in iq.prepare_(model):
    print(decision)
print(model)
ours = model(x).float()
print(f"difference: {float((ours - theirs).norm() / theirs.norm()):.1e}")

# %% [markdown]
# ## Checkpoints: GPTQ, AWQ, compressed-tensors
#
# Most quantised models come as files, and their libraries need not be there to read them: `load_pretrained` puts the codes
# of a checkpoint on our layers as they are. To show it without a download, the next cell writes one small random Llama in
# three layouts. They hold the same 4-bit codes, scales and zero points; only the order of the bits differs.

# %%
import json
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 32
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, pad_token_id=0,
    architectures=["LlamaForCausalLM"], dtype="float32",
)  # fmt: skip
expected = LlamaForCausalLM(config).eval()


def words(codes):
    """Eight codes to an int32, the first lowest."""
    fields = codes.unflatten(-1, (-1, 8)) << 4 * torch.arange(8)
    return fields.sum(-1).to(torch.uint32).view(torch.int32)


def gptq(q, zero, scale):  # [K/8, N] and [groups, N/8]; zero points minus one
    groups = torch.arange(q.shape[1], dtype=torch.int32) // GROUP
    return {
        "qweight": words(q).T, "qzeros": words(zero.T - 1), "scales": scale.T, "g_idx": groups,
    }  # fmt: skip


def awq(q, zero, scale):  # eight outputs to a word, in this order
    def pack(t):
        return words(t.T.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2))

    return {"qweight": pack(q), "qzeros": pack(zero), "scales": scale.T}


def compressed_tensors(q, zero, scale):
    return {
        "weight_packed": words(q), "weight_shape": torch.tensor(q.shape), "weight_scale": scale,
        "weight_zero_point": words(zero.T).T,
    }  # fmt: skip


weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
LAYOUTS = {
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}),
    "compressed-tensors": (
        compressed_tensors,
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    ),
}  # fmt: skip
codes = {}
for path, linear in expected.model.named_modules(prefix="model"):
    if isinstance(linear, torch.nn.Linear):
        n, k = linear.weight.shape
        q, zero = torch.randint(0, 16, (n, k)), torch.randint(1, 16, (n, k // GROUP))
        scale = (0.02 + 0.02 * torch.rand(n, k // GROUP)).half()
        codes[path] = q, zero, scale
        dequantised = (q.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale[..., None].float()
        linear.weight.data = dequantised.flatten(1)

# %% [markdown]
# `expected` now has the dequantised weights. Each checkpoint must give the same logits, and write the same tokens.

# %%
folder = tempfile.TemporaryDirectory()
prompt = torch.tensor([[1, 7, 23, 42, 5]])
written = expected.generate(prompt, max_new_tokens=12, do_sample=False)
for name, (layout, description) in LAYOUTS.items():
    path = Path(folder.name, name)
    path.mkdir()
    tensors = dict(expected.state_dict())
    for module, stored in codes.items():
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": tensor for part, tensor in layout(*stored).items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors")
    saved = {**config.to_dict(), "quantization_config": description}
    (path / "config.json").write_text(json.dumps(saved))

    model = iq.load_pretrained(path)
    with torch.no_grad():
        difference = (model(prompt).logits - expected(prompt).logits).abs().max()
    same = torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), written)
    count = sum(isinstance(module, iq.IntLinear) for module in model.modules())
    print(
        f"{name:<20} {count} linears, logits differ by {float(difference):.0e}, same text: {same}"
    )

# %% [markdown]
# Under torch.compile there is nothing left to find: the layers call our ops already. `load_pretrained(path,
# device_map="cuda")` puts them on a GPU, and the model's own `save_pretrained` writes our layout.

# %%
print(model.model.layers[0].mlp)

# %% [markdown]
# ## GGUF
#
# The same function reads GGUF files. The one here is the demo's SmolLM2-135M, whose blocks of 32 weights have a
# scale and a minimum each (Q4_1), and whose embedding has 8 bits (Q8_0).

# %%
from intlass_ops.demo.course import find_model
from intlass_ops.errors import IntlassError

try:
    model = iq.load_pretrained(find_model(), dtype=torch.bfloat16)
    with torch.no_grad():
        explanation = iq.explain(model, input_ids=prompt)
    print("\n".join(str(explanation).splitlines()[:6]))
    print(f"... {len(explanation.dispatches)} products, {len(explanation.fallbacks)} fell back")
except (IntlassError, OSError) as error:
    print(f"no model here: {error}")

# %% [markdown]
# ## Our own quantiser
#
# No library at hand? `quantize_` has the same shape as torchao's, and its layers run eagerly and compiled.

# %%
model = copy.deepcopy(dense)
iq.quantize_(model, iq.Int4WeightOnly(group_size=64))
print(model)
