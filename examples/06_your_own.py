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
# # 6. Your own scheme, your own kernel configuration
#
# Two things people want to change: how a weight becomes codes, and which tile a kernel runs with. Neither needs a fork.

# %%
import dataclasses

import matplotlib.pyplot as plt
import torch

import intlass_ops as iq
from intlass_ops import config
from intlass_ops.cuda.compiler import compile_cubin

torch.manual_seed(0)
print(f"intlass_ops {iq.__version__}, torch {torch.__version__}")

# %% [markdown]
# ## A scheme of your own
#
# Anything of the form `w = (q - zeros) * scales`, with groups along the rows, runs on the kernels. Say you want scales
# that are powers of two, because a chip you target multiplies by shifting. Rounding the scale up keeps every value in
# range; trying the next smaller power as well clips some values but rounds the others more finely. Keep the better one,
# group by group.

# %%
GROUP = 32


def quantise_with_shifts(w):
    """INT4 codes and power-of-two scales of a weight [N, K]."""
    groups = w.unflatten(1, (-1, GROUP))
    exponent = (groups.abs().amax(-1, keepdim=True) / 7).log2().ceil()
    best_error = best_codes = best_scale = None
    for shift in (0, 1):
        scale = torch.exp2(exponent - shift)
        codes = (groups / scale).round().clamp(-8, 7)
        error = (codes * scale - groups).square().sum(-1, keepdim=True)
        if best_error is None:
            best_error, best_codes, best_scale = error, codes, scale
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
    return best_codes.flatten(1).to(torch.int8), best_scale.squeeze(-1)


linear = torch.nn.Linear(512, 256)
w = linear.weight.detach()
codes, scales = quantise_with_shifts(w)
layer = iq.IntLinear(iq.pack_int4(codes), scales, bias=linear.bias.detach())
layer

# %% [markdown]
# `IntLinear` holds packed codes and scales as buffers, so it saves, loads and moves like any module. Is the scheme any
# good? The least-squares scales of `int4_optimal` are the bound for symmetric codes of the same group size.

# %%
optimal_scales, optimal_codes = iq.int4_optimal(w, group_size=GROUP)
naive_scales, naive_codes = iq.int4_naive(w, group_size=GROUP)


def error_of(codes, scales):
    return float((iq.int4_dequantize(scales, codes) - w).norm() / w.norm())


errors = {
    "largest magnitude": error_of(naive_codes, naive_scales),
    "powers of two": error_of(codes, scales),
    "least squares": error_of(optimal_codes, optimal_scales),
}
figure, axes = plt.subplots(figsize=(6, 1.8))
axes.barh(list(errors), list(errors.values()))
axes.invert_yaxis()
axes.set_xlabel("relative error of the weight")
figure.tight_layout()
for name, error in errors.items():
    print(f"{name:<18} {error:.4f}")

# %% [markdown]
# Shifts cost a third more error than free scales here: a power of two can be up to twice what a group needs.
#
# ## Or leave the module as it is
#
# A module you already have, with its own arithmetic, needs no conversion either: write what it computes in plain
# PyTorch and compile it with `backend="intlass"`. The pass reads the *function* from the graph (it evaluates it on
# codes of 0 and 1), not a pattern of ops, so your spelling need not be one that it has seen.

# %%


class ShiftLinear(torch.nn.Module):
    def __init__(self, codes, scales, bias):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("exponents", scales.log2().to(torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x):
        w = self.codes.unflatten(1, (-1, GROUP)) * torch.exp2(self.exponents.to(x.dtype))[..., None]
        return torch.nn.functional.linear(x, w.flatten(1), self.bias)


mine = ShiftLinear(codes, scales, linear.bias.detach())
fast = torch.compile(mine, backend="intlass")
x = torch.randn(4, 512)
with torch.inference_mode():
    explanation = iq.explain(fast, x)
    print(explanation)
    print("largest difference from eager:", float((explanation.result - mine(x)).abs().max()))

# %% [markdown]
# ## The kernel's configuration
#
# For a GPU, `config.pick` maps a problem to a frozen dataclass: the kernel family and its tile. It is a pure function,
# so you can ask for any GPU without owning one.

# %%
shape = config.Shape(
    x_kind="bf16",
    w_kind="s4",
    scale_type="__nv_bfloat16",
    zero_type="float",
    out_type="__nv_bfloat16",
    has_zeros=False,
    has_a_zero=False,
    aligned=True,
    m=1,
    n=4096,
    k=4096,
    group_size=128,
)
for arch in config.ARCHS:
    device = config.device_of(arch)
    picks = [str(config.pick(device, dataclasses.replace(shape, m=m))) for m in (1, 256)]
    print(f"{arch:<7} M=1: {picks[0]:<32} M=256: {picks[1]}")

# %% [markdown]
# To try another tile, replace fields. `why_illegal` says what a GPU forbids before the compiler has to:

# %%
from intlass_ops.config.gemm import why_illegal

ada = config.device_of("sm_89")
picked = config.pick(ada, dataclasses.replace(shape, m=256))
print("picked:  ", picked)
for change in ({"num_stages": 9}, {"block_n": 72}, {"block_n": 64}):
    other = dataclasses.replace(picked, **change)
    print(f"{change}: ", why_illegal(other, ada) or f"legal: {other}")

# %% [markdown]
# And compile it, here for an RTX 4090: NVRTC needs neither a GPU nor a driver. The compiled kernel goes to the cache
# (`intlass cache list`), so that the second time is instant.

# %%
smaller = dataclasses.replace(picked, block_n=64)
cubin = compile_cubin(smaller, "sm_89")
print(f"{smaller}: {len(cubin)} bytes of machine code for sm_89")

# %% [markdown]
# With a GPU, `intlass_ops.cuda.jit.get(config, device_index)` loads such a kernel, and `intlass bench` measures what
# `pick` chooses beside other packages' kernels. If a tile of yours is faster, the rule to change is the kernel's file
# in `intlass_ops/config/`; the tests compile what is shipped for all architectures and check it for spills.
