"""Checkpoint formats: load, compute, generate, save, reload, as JSON and markdown.

    python benchmarks/format_matrix.py [--device cpu|cuda] [--only TEXT] [--out FILE]

Every row is a small model with random weights that tests/tiny_checkpoints.py or tests/tiny_gguf.py
writes in another library's layout, without that library. It is compared with the model of the
dequantised weights in float32 on the CPU: `error` is |logits - expected| / |expected|, within a
limit for the type, or half as much again as that model's own in this type (`dense`: a token whose
two best experts are close may be sent to another one). `tokens`: how many of those generated agree.
Where one differs, the two best logits are closer than the error (`tie`), or the row fails. Schemes
with INT8 activations round those: their error is that. `reload`: saved in our layout and loaded
again, the logits are the same bit for bit. Exit code 1 if a row fails. FILE gets the endings .json
and .md; by default it is in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import tiny_checkpoints  # noqa: E402
from transformers.utils import logging  # noqa: E402

import intlass_ops  # noqa: E402
from intlass_ops import provenance  # noqa: E402
from intlass_ops.integrations.load_pretrained import load_pretrained  # noqa: E402

TOKENS = 16
_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 0.03}  # of `error`
PROMPT = torch.tensor([[1, 7, 23, 42, 5]])
MIXTURES = (
    "gptq v1", "awq", "packed w4a16", "packed nvfp4", "packed mxfp4", "modelopt nvfp4",
    "fp8 blocks", "packed fp8", "modelopt fp8", "auto-round gptq", "bitsandbytes int8",
)  # fmt: skip
GGUF_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Blocks of up to 256 weights
GGUF_WIDE = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S",
    "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "NVFP4",
)  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
# Writes a checkpoint into a folder; returns its path and the model that it stands for.
Write = Callable[[Path], tuple[Path, Any]]


def rows() -> Iterator[tuple[str, Write, bool]]:
    """(name, writer, whether activations are quantised) of every row."""
    for name, form in tiny_checkpoints.FORMS.items():
        integers = "a8" in name
        yield name, lambda d, form=form: (d, tiny_checkpoints.write(d, form)), integers
    for name in MIXTURES:
        form = tiny_checkpoints.FORMS[name]
        experts = lambda d, form=form: (d, tiny_checkpoints.write_experts(d, form))  # noqa: E731
        yield f"{name}, mixture of experts", experts, False
    yield "MXFP4, gpt-oss", lambda d: (d, tiny_checkpoints.write_gpt_oss(d)), False
    for kind in GGUF_TYPES:
        yield f"GGUF {kind}", lambda d, kind=kind: gguf(d, kind), False
    for kind in GGUF_WIDE:
        yield f"GGUF {kind}", lambda d, kind=kind: gguf(d, kind, "qwen3", **WIDE), False
    for kind in ("Q5_K", "IQ3_S", "NVFP4"):
        mixture = lambda d, kind=kind: gguf(d, kind, "mixtral", **WIDE)  # noqa: E731
        yield f"GGUF {kind}, mixture of experts", mixture, False
    yield "GGUF MXFP4, gpt-oss", lambda d: gguf(d, "MXFP4", "gpt-oss"), False


def gguf(directory: Path, kind: str, model: str = "llama tied", **sizes: int) -> tuple[Path, Any]:
    """``kind``: of linears, or of gpt-oss's experts; the rest is Q8_0."""
    from gguf import GGMLQuantizationType as Type
    from tiny_gguf_models import CASES, write_model

    from intlass_ops.formats.gguf import GGUFFile
    from intlass_ops.integrations import gguf_models

    directory.mkdir()
    path = directory / "tiny.gguf"
    rest = Type.Q8_0 if model == "gpt-oss" else Type[kind]
    write_model(path, CASES[model], rest, table=Type.Q8_0, experts=Type[kind], **sizes)
    return path, gguf_models.load_dense(GGUFFile(path))


@torch.no_grad()
def measure(write: Write, integers: bool, device: str, dtype: torch.dtype) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, expected = write(Path(folder) / "theirs")
        model = load_pretrained(path, dtype=dtype, device_map=device)
        prompt = PROMPT.to(device)
        explanation = intlass_ops.explain(model, input_ids=prompt)
        logits, reference = explanation.result.logits, expected(PROMPT).logits
        error = beside(reference, logits)
        dense = beside(reference, copy.deepcopy(expected).to(dtype)(PROMPT).logits)
        options = {"max_new_tokens": TOKENS, "do_sample": False}
        ours = model.generate(prompt, **options).cpu()
        theirs = expected.generate(PROMPT, **options)
        same = int((ours == theirs).cumprod(-1).sum()) - PROMPT.shape[1]
        generated = ours.shape[1] - PROMPT.shape[1]
        model.save_pretrained(Path(folder) / "ours")
        again = load_pretrained(Path(folder) / "ours", dtype=dtype, device_map=device)
        reload = torch.equal(again(prompt).logits, logits)
        tie = same == generated or near(expected, ours, theirs, error)
    limit = 0.05 if integers else _LIMITS[dtype]
    kernels = sorted({each.kernel.split(" ")[0] for each in explanation.dispatches})
    return {
        "error": error,
        "dense": dense,
        "tokens": f"{same} of {generated}",
        "tie": tie,
        "reload": reload,
        "layers": len(explanation.dispatches),
        "fallbacks": len(explanation.fallbacks),
        "kernels": kernels,
        "passed": error < max(limit, 1.5 * dense) and reload and (integers or tie),
        "seconds": round(time.perf_counter() - start, 2),
    }


def beside(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """How far logits are from the reference's, of its norm."""
    return float((logits.cpu().float() - reference).norm() / reference.norm())


def near(expected: Any, ours: torch.Tensor, theirs: torch.Tensor, error: float) -> bool:
    """Whether the first token that differs was as good a choice, up to the error of logits."""
    length = min(ours.shape[1], theirs.shape[1])
    place = int((ours[:, :length] == theirs[:, :length]).cumprod(-1).sum())
    if place == length:
        return False
    logits = expected(theirs[:, :place]).logits[0, -1]
    gap = logits[theirs[0, place]] - logits[ours[0, place]]
    # The error is relative to the norm: of each logit about its root mean square.
    return float(gap) < 8 * error * float(logits.square().mean().sqrt())


def markdown(found: list[dict[str, Any]], title: str) -> str:
    lines = [
        f"# {title}",
        "",
        "| format | passed | error of logits | tokens agree | reloaded | layers | kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if "problem" in row:
            lines.append(f"| {row['name']} | no | {row['problem']} | | | | |")
            continue
        kernels = ", ".join(row["kernels"])
        fell = f", {row['fallbacks']} fell back" if row["fallbacks"] else ""
        lines.append(
            f"| {row['name']} | {'yes' if row['passed'] else 'no'} | {row['error']:.1e} "
            f"| {row['tokens']} | {'the same bits' if row['reload'] else 'differs'} "
            f"| {row['layers']}{fell} | {kernels} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="(by the device)"
    )
    parser.add_argument("--out", help="FILE without ending (results/formats-DEVICE)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device(options.device)
    # float32 has no kernel of ours on a GPU, and bfloat16 too few bits to compare generated text.
    by_device = "float32" if device.type == "cpu" else "float16"
    dtype = getattr(torch, options.dtype or by_device)
    found: list[dict[str, Any]] = []
    for name, write, integers in rows():
        if options.only not in name:
            continue
        try:
            row = measure(write, integers, options.device, dtype)
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}".splitlines()[0]
            row = {"problem": text, "passed": False}
        found.append({"name": name, **row})
        print(found[-1], flush=True)
    target = Path(options.out or HERE / "results" / f"formats-{device.type}")
    environment = provenance.environment(device)
    passed = sum(row["passed"] for row in found)
    title = (
        f"Formats on {environment['device']}, torch {environment['torch']}, "
        f"{str(dtype).removeprefix('torch.')}: {passed} of {len(found)} passed"
    )
    figures = {"environment": environment, "dtype": str(dtype), "rows": found}
    provenance.write_json(str(target.with_suffix(".json")), figures)
    target.with_suffix(".md").write_text(markdown(found, title))
    print(title)
    return 0 if passed == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
