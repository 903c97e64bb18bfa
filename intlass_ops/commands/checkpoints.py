"""What `intlass quantize`, `convert` and `explain` do, once transformers is there.

Not here: their command lines (__init__.py), quantisation (quantize.py), formats (formats/).
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging

from ..demo.show import Show
from ..explain import explain as explain_call
from ..formats.checkpoint import Checkpoint
from ..integrations.deferred import class_of, placement
from ..integrations.experts import experts_left
from ..integrations.load_pretrained import load_pretrained
from ..integrations.model_layers import specs_of
from ..integrations.schemes import scheme_named
from ..integrations.transformers_quantizer import (
    IntlassConfig,
    is_kept,
    listening,
    save_pretrained,
)
from ..quantize import quantize_

# Files of a checkpoint that are not weights and that saving a model does not write.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_NOT_COPIED = ("config.json", "quantize_config.json", "generation_config.json")


def quantize(options: argparse.Namespace) -> int:
    """A floating-point checkpoint to ours."""
    src, dst, show = Path(options.src), _empty(options.dst), Show()
    checkpoint = Checkpoint(src)
    if checkpoint.config.get("quantization_config") is not None:
        method = checkpoint.config["quantization_config"].get("quant_method")
        raise ValueError(
            f"{src} is quantised already ({method}); to keep its codes: intlass convert"
        )
    logging.disable_progress_bar()
    start = time.perf_counter()
    work = _with_data if options.method in ("gptq", "awq") else _while_loading
    model = work(src, options, show)
    _save(model, src, dst)
    _report(show, model, checkpoint, dst, time.perf_counter() - start)
    return 0


def convert(options: argparse.Namespace) -> int:
    """Another library's checkpoint to ours."""
    src, dst, show = Path(options.src), _empty(options.dst), Show()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    start = time.perf_counter()
    model = load_pretrained(src, checkpoint_format=options.checkpoint_format)
    _save(model, src, dst)
    if src.is_file():
        from ..formats.gguf import GGUFFile
        from ..integrations.gguf_tokenizers import tokenizer_of

        tokenizer_of(GGUFFile(src)).save_pretrained(dst)
    _report(show, model, None, dst, time.perf_counter() - start)
    return 0


def explain(options: argparse.Namespace) -> int:
    """The kernels of one forward pass."""
    logging.disable_progress_bar()
    model = load_pretrained(options.src, device_map=options.device)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(
            f"{type(model).__name__} takes no tokens; give intlass_ops.explain an input of its own"
        )
    ids = torch.arange(options.tokens, device=options.device)[None] % vocabulary
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        explanation = explain_call(model, **inputs)
    print(explanation)
    fallbacks = explanation.fallbacks
    if fallbacks:
        print(f"{len(fallbacks)} of {len(explanation.dispatches)} products fell back")
    return 1 if fallbacks else 0


def _while_loading(src: Path, options: argparse.Namespace, show: Show) -> Any:
    config = IntlassConfig(
        options.scheme,
        options.group_size,
        options.symmetric,
        options.method,
        options.keep,
    )
    with show.bar(f"Quantising to {options.scheme} ({options.method})") as advance:
        token = listening.set(advance)
        try:
            return _load(src, options.device, quantization_config=config)
        finally:
            listening.reset(token)


def _with_data(src: Path, options: argparse.Namespace, show: Show) -> Any:
    scheme = scheme_named(
        options.scheme,
        group_size=options.group_size,
        symmetric=options.symmetric,
        method=options.method,
    )
    show.say("Loading the model ...")
    model = _load(src, options.device)
    kept = {*get_keys_to_not_convert(model), *options.keep}
    windows = _windows(src, options)
    how = f"{options.scheme} ({options.method})"
    show.say(f"Quantising to {how} with {len(windows)} windows of text ...")
    batches = [{"input_ids": window.to(options.device)} for window in windows]
    quantize_(model, scheme, lambda _, path: not is_kept(path, kept), calibration=batches)
    return model


def _load(src: Path, where: str, **how: Any) -> Any:
    device_map, device = placement(where)
    model = class_of(AutoConfig.from_pretrained(src)).from_pretrained(
        src, dtype="auto", device_map=device_map, **how
    )
    return model.to(device)


def _windows(src: Path, options: argparse.Namespace) -> list[torch.Tensor]:
    """Token ids [1, window] of the calibration text."""
    if options.calibration is None:
        text = "\n".join(pydoc_data.topics.topics.values())
    else:
        text = Path(options.calibration).read_text(encoding="utf-8")
    try:
        tokenizer = AutoTokenizer.from_pretrained(src)
    except ValueError:
        raise ValueError(f"{src}: no tokenizer in it, which methods gptq and awq need") from None
    count, length = options.samples, options.window
    # A token is at least one character, and text costs time to tokenise.
    ids = tokenizer(text[: 16 * count * length], return_tensors="pt")["input_ids"][0]
    windows = [part[None] for part in ids[: count * length].split(length) if len(part) == length]
    if not windows:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, fewer than one window of {length}: give "
            "a longer --calibration file or a smaller --window"
        )
    return windows


def _empty(path: str) -> Path:
    directory = Path(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory; name another one")
    return directory


def _save(model: Any, src: Path, dst: Path) -> None:
    logging.disable_progress_bar()
    save_pretrained(model, dst)
    if not src.is_dir():
        return
    for pattern in _COPIED:
        for file in src.glob(pattern):
            target = dst / file.name
            other = file.name in _NOT_COPIED or file.name.endswith(".index.json")
            if not other and not target.exists():
                shutil.copy(file, target)


def _report(show: Show, model: Any, before: Checkpoint | None, dst: Path, seconds: float) -> None:
    specs = specs_of(model)
    quantised = sum(
        buffer.nbytes for path in specs for buffer in model.get_submodule(path).buffers()
    )
    written = _weights_mb(dst)
    rows = [["quantised linears", str(len(specs))], ["their size, MB", f"{quantised / 1e6:.1f}"]]
    if before is not None:
        rows.append(["checkpoint before, MB", f"{_weights_mb(before.directory):.1f}"])
    rows.append(["checkpoint now, MB", f"{written:.1f}"])
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB, macOS in bytes.
        peak_mb = peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
        rows.append(["peak memory of this process, MB", f"{peak_mb:.0f}"])
    rows.append(["seconds", f"{seconds:.1f}"])
    show.table(["", str(dst)], rows)
    left = experts_left(model)
    if left is not None:
        show.problem(left)


def _weights_mb(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6
