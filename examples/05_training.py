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
# # 5. Training: QAT and QLoRA
#
# Two ways to train with quantised layers. In *quantisation-aware training* the layers multiply integers already during
# training, so the weights learn to live on the grid. In *QLoRA* the quantised weights stay as they are and a small
# floating-point side path learns. Both on a toy that trains in seconds.

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import intlass_ops as iq

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
print(f"torch {torch.__version__}, {device}")

# %% [markdown]
# ## The toy: learn a function from samples
#
# A small network learns a smooth function of 32 numbers. We train it in floating point first.

# %%
K = 64
directions = torch.randn(32, 8, device=device) / math.sqrt(32)


def batch(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 32, generator=generator).to(device)
    return x, torch.sin(2 * x @ directions)


def network():
    return nn.Sequential(nn.Linear(32, K), nn.GELU(), nn.Linear(K, K), nn.GELU(), nn.Linear(K, 8))


def train(model, steps, rate, parameters=None):
    optimizer = torch.optim.Adam(parameters or model.parameters(), rate)
    losses = []
    for step in range(steps):
        x, y = batch(256, step)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def judge(model):
    x, y = batch(4096, seed=-1)
    return float(nn.functional.mse_loss(model(x), y))


model = network().to(device)
train(model, 300, 3e-3)
print(f"floating point: {judge(model):.4f}")

# %% [markdown]
# ## Rounded after training
#
# Four bits for weights and activations, without any training. Both operands are rotated in blocks
# of 32 first (notebook 4), and the scales clip the tails a little (`method="quest"`).

# %%
config = iq.QATConfig("w4a4", rotation=32, method="quest", backward="float")
rounded = copy.deepcopy(model)
iq.quantize_(rounded, config)
print(f"W4A4, not trained: {judge(rounded):.4f}")

# %% [markdown]
# ## Trained as it will run
#
# `quantize_` with a `QATConfig` puts a `QATLinear` in place of each linear. Forward, it quantises both operands and
# multiplies integers with the GEMM that inference runs. Backward, gradients go straight through the rounding and stop
# where a value was clipped. The floating weights remain the parameters.

# %%
qat = copy.deepcopy(rounded)
losses = train(qat, 120, 1e-3)
print(f"W4A4, trained:     {judge(qat):.4f}")

figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot(losses, lw=0.8, label="training, W4A4")
axes.axhline(judge(rounded), color="C1", label="W4A4, not trained")
axes.axhline(judge(model), color="C2", label="floating point")
axes.set(xlabel="step", ylabel="loss", yscale="log")
axes.legend()
figure.tight_layout()

# %% [markdown]
# `convert_` drops the floating weights. What remains computes the same numbers, bit for bit:

# %%
final = copy.deepcopy(qat)
iq.convert_(final)
x, _ = batch(64, 0)
print(final)
print("same outputs:", torch.equal(final(x), qat(x)))

# %% [markdown]
# ## QLoRA: a side path on a frozen INT4 layer
#
# `IntLinear` is differentiable in its input, so gradients pass through the quantised layers to whatever is trainable.
# Here each one gets a low-rank path `x @ Aᵀ @ Bᵀ` that starts at zero.


# %%
class LoRA(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


base = copy.deepcopy(model).requires_grad_(False)
iq.quantize_(base, iq.Int4WeightOnly(group_size=32))
before = judge(base)
lora = copy.deepcopy(base)
for i in (0, 2, 4):
    lora[i] = LoRA(lora[i]).to(device)
trainable = [p for p in lora.parameters() if p.requires_grad]
codes = lora[2].base.weight.clone()
losses = train(lora, 120, 2e-3, trainable)
print(f"W4A16, not trained:  {before:.4f}")
print(f"W4A16 and LoRA:      {judge(lora):.4f}")
print(
    f"trained {sum(p.numel() for p in trainable)} of {sum(p.numel() for p in model.parameters())} numbers"
)
print("codes untouched:", torch.equal(codes, lora[2].base.weight))
