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

import intlass_ops as iq

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
with torch.inference_mode():
    explanation = iq.explain(fast, x)
    difference = (explanation.result.float() - model(x).float()).norm() / model(x).float().norm()
print(explanation)
print(f"\nrelative difference from torchao's own result: {float(difference):.1e}")

# %% [markdown]
# Both round once to bf16, at different places; a difference of a few thousandths is bf16's own grain.
#
# `error <=` is the bound that the rewrite proved for the linear, and `why` says which rule it was. A linear that cannot
# be proved stays as it was, and is listed as declined with the reason. Inside `strict()` it would be an error instead.
#
# ## All of them
#
# HQQ keeps floating zero points, optimum-quanto wraps tensors in subclasses, torchao has integer activations too. The
# loop below is the same two lines for each.


# %%
def torchao(name, **options):
    def make(model):
        ao.quantize_(model, getattr(ao, name)(**options))
        return model

    return make


def hqq(model):
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    for i in (0, 2):
        config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        model[i] = HQQLinear(model[i], config, compute_dtype=torch.bfloat16, device=device)
    return model


def quanto(model):
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


LIBRARIES = {
    "torchao, int8 weights and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "HQQ, 4 bits": hqq,
    "optimum-quanto, 8 bits": quanto,
}
print(f"{'library':<38} {'swapped':<8} {'schemes':<8} difference")
for name, make in LIBRARIES.items():
    torch._dynamo.reset()
    try:
        model = make(copy.deepcopy(dense))
    except ImportError as error:
        print(f"{name:<38} not installed: {error.name}")
        continue
    with torch.inference_mode():
        theirs = model(x).float()
        explanation = iq.explain(torch.compile(model, backend="intlass"), x)
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
model = LIBRARIES["HQQ, 4 bits"](copy.deepcopy(dense))
theirs = model(x).float()
for decision in iq.prepare_(model):
    print(decision)
print(model)
ours = model(x).float()
print(f"difference: {float((ours - theirs).norm() / theirs.norm()):.1e}")

# %% [markdown]
# ## Our own quantiser
#
# No library at hand? `quantize_` has the same shape as torchao's, and its layers run eagerly and compiled.

# %%
model = copy.deepcopy(dense)
iq.quantize_(model, iq.Int4WeightOnly(group_size=64))
print(model)
