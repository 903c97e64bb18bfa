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
# # 1. The ops, called directly
#
# Everything in this package rests on a handful of PyTorch ops. This notebook packs a weight, multiplies with it, and
# looks at where the error comes from. It runs on a CPU, and on a GPU when there is one.

# %%
import matplotlib.pyplot as plt
import torch

import intlass_ops as iq

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16
torch.manual_seed(0)
print(f"intlass_ops {iq.__version__}, torch {torch.__version__}, {device}")

# %% [markdown]
# ## Codes, and how they are stored
#
# An INT4 code is an integer in [-8, 7] (signed) or in [0, 15] (unsigned). Two codes share a byte; the one with the even
# index sits in the low half:
#
#     byte j:   | 7 6 5 4 | 3 2 1 0 |
#               | q[2j+1] |  q[2j]  |
#
# That is the only layout there is. Every device and every kernel reads these bytes as they are.

# %%
codes = torch.tensor([[1, -1, 7, -8]], dtype=torch.int8)
packed = iq.pack_int4(codes)
print("codes  ", codes.tolist())
print("bytes  ", [f"{byte:08b}" for byte in packed[0].tolist()])
print("back   ", iq.unpack_int4(packed).tolist())

# %% [markdown]
# ## Scales make numbers of codes
#
# A weight is `w = (q - zeros) * scales`. Scales and zero points belong to *groups*: `group_size` consecutive columns of
# a row share one of each. `quantize_int4` finds them from the largest and smallest value of a group.

# %%
N, K, GROUP = 512, 1024, 128
w = torch.randn(N, K, device=device)
q, scales, zeros = iq.quantize_int4(w, granularity="group", group_size=GROUP, symmetric=False)
print(f"weight  {tuple(w.shape)} float32  {w.numel() * 4:>8} bytes")
print(f"codes   {tuple(q.shape)}  uint8    {q.numel():>8} bytes")
print(f"scales  {tuple(scales.shape)}    float32  {scales.numel() * 4:>8} bytes")

# %% [markdown]
# ## The product
#
# `matmul_int4_bf16_tn` computes `x @ w.T` from the codes. The activations' type chooses the scheme: bf16 or fp16 is
# W4A16, int8 is W4A8, packed uint8 is W4A4. Sums are exact integers or fp32, and there is one rounding at the end.

# %%
x = torch.randn(8, K, device=device, dtype=dtype)
y = iq.matmul_int4_bf16_tn(x, q, scales, zeros)
w_hat = iq.dequantize(q, scales, zeros)
exact = x.double() @ w_hat.double().T
print("result", tuple(y.shape), y.dtype)
rounding = ((y.double() - exact).abs() / exact.abs().clamp(min=1e-6)).median()
print(f"median distance from the float64 product of the same weight: {rounding:.1e}")
print(f"half a step of bf16, the best any bf16 result can promise:   {2**-9:.1e}")

# %% [markdown]
# So the kernel adds next to nothing: what is lost is lost by rounding the weight (and the activations, if they are
# rounded too). The schemes compared, against the product of the weights *before* quantisation:

# %%
truth = x.double() @ w.double().T


def relative_error(y):
    return float((y.double() - truth).norm() / truth.norm())


w8, s8, _ = iq.quantize_int8(w)  # one scale a row
w4, s4, _ = iq.quantize_int4(w, granularity="group", group_size=GROUP)
x8, x8_scale, _ = iq.quantize_int8(x)  # one scale a token
x4, x4_scale, _ = iq.quantize_int4(x)
errors = {
    "w8a16": relative_error(iq.matmul_int8_bf16_tn(x, w8, None, s8)),
    "w8a8": relative_error(iq.matmul_int8_bf16_tn(x8, w8, x8_scale, s8)),
    "w4a16, zeros": relative_error(y),
    "w4a16": relative_error(iq.matmul_int4_bf16_tn(x, w4, s4)),
    "w4a8": relative_error(iq.matmul_int4_bf16_tn(x8, w4, s4, a_scale=x8_scale)),
    "w4a4": relative_error(iq.matmul_int4_bf16_tn(x4, w4, s4, a_scale=x4_scale)),
}
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.barh(list(errors), list(errors.values()))
axes.invert_yaxis()
axes.set_xlabel("relative error of the product (Gaussian weights and activations)")
figure.tight_layout()

# %% [markdown]
# Random numbers have no outliers. Real layers do, and notebook 4 shows what helps there.
#
# ## What ran?
#
# `explain` reports every op call with its kernel and the reason. `strict` refuses calls for which there is no fast
# kernel, which would otherwise run slowly without a word; float32 activations on a GPU are such a case.

# %%
print(iq.explain(iq.matmul_int4_bf16_tn, x, q, scales, zeros))

# %% [markdown]
# ## Mistakes
#
# Arguments that do not fit raise an error that begins with the op and names the values.

# %%
for wrong in (
    lambda: iq.matmul_int4_bf16_tn(x[:, :1000], q, scales, zeros),
    lambda: iq.matmul_int4_bf16_tn(x, q, scales[:, :3], zeros),
    lambda: iq.pack_int4(torch.tensor([[3, 99]])),
):
    try:
        wrong()
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Gradients
#
# The product is differentiable in floating activations and in the bias; the codes are constants. That is what a LoRA on
# a quantised layer needs (notebook 5).

# %%
x.requires_grad_()
iq.matmul_int4_bf16_tn(x, q, scales, zeros).float().sum().backward()
print(
    "dx equals the column sums of the weight:",
    torch.allclose(x.grad[0].float(), w_hat.sum(0), rtol=0.02, atol=0.1),
)
