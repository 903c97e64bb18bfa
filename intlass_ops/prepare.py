"""`prepare_(model)`: replace quantised linears of any library by packed ones, in place.

Lives here: which modules are looked at, the order, and what is reported. Not here: layouts that
graphs do not show (formats/), reading a graph (lowering/capture.py).
"""

from __future__ import annotations

import gc
import itertools

import torch
from torch import Tensor, nn

from . import side_by_side
from .formats import bitsandbytes_modules
from .formats import modules as formats
from .integrations import weight_readers
from .lowering import capture, fp8_modules
from .lowering.fp8 import is_code_type
from .lowering.records import DECLINED, SWAPPED, Decision
from .nn import PackedWeight, Stored
from .ops._library import require_module

_QUANTISED = {  # by the activation of an `IntLinear`
    "int8": ", with our own quantiser",
    "int8_full_range": ", with our quantiser in the library's arithmetic (full_range)",
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def prepare_(model: nn.Module, *, same_codes: bool = True) -> list[Decision]:
    """Convert every quantised linear of ``model``, in place, one after the other.

    For linears of torchao, HQQ, optimum-quanto, GPTQ, AWQ, compressed-tensors, bitsandbytes (4
    bits), GGUF, BitLinear and hand-written modules: their codes, scales, zero points and biases are
    packed into an `IntLinear`, an `Fp8Linear` or a `Lut4Linear` (or, with quantised activations,
    act-order or 8-bit zero points, a module that keeps the library's own activation arithmetic),
    and the original is released before the next one is read. The result needs no library, runs
    eager and under any torch.compile, and holds each weight once. What a module computes is found
    by tracing it and proved on its own values, as under ``torch.compile(backend="intlass")``; a
    module that cannot be proved stays as it is. bitsandbytes' are read by the tensors they hold.

    Where the library's own arithmetic is that of ``quantize_int8(full_range=True)``, as that of
    torchao's int8 is, the module is an `IntLinear` too, and the codes are the same bit for bit.
    ``same_codes=False`` lets plain `quantize_int8` take the place of all int8 quantisers that give
    each token a symmetric scale at every call. Libraries differ in what they divide by and in what
    they round on the way, so codes may differ by 1; ours is computed together with an RMS norm or
    SwiGLU before it, and lets the product start early.
    It also converts FP8 layers whose library quantises activations to FP8 (transformers'
    FP8Linear, compressed-tensors): theirs stay floats, on any GPU; ``reason`` says so.

    Returns one `Decision` per module looked at: ``path``, ``outcome`` ("swapped" or "declined"),
    ``scheme`` and ``reason``. Plain floating-point layers are not looked at.

    >>> import torch
    >>> prepare_(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    []
    """
    require_module("prepare_", model)
    found: list[tuple[nn.Module, str, str, nn.Module]] = []
    for parent_path, parent in model.named_modules():
        for name, child in parent._modules.items():
            path = f"{parent_path}.{name}" if parent_path else name
            if child is not None and is_quantised(child):
                found.append((parent, name, path, child))
    if not found and is_quantised(model):
        raise TypeError(
            f"prepare_: the model is a {type(model).__name__} and cannot be replaced in place"
        )
    dtype = next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.bfloat16)
    done: dict[nn.Module, tuple[nn.Module, Decision]] = {}
    decisions = []
    with capture.session() as session:
        while found:
            parent, name, path, child = found.pop(0)
            if child not in done:
                done[child] = _convert(session, child, path, dtype, same_codes)
            new, decision = done[child]
            decisions.append(decision)
            setattr(parent, name, new)
            if not any(child is other for *_, other in found):
                # A module used in several places is released after the last one.
                done.pop(child)
            del child
    side_by_side.lay_siblings(model)
    weight_readers.announce(model)
    gc.collect()
    return decisions


def _convert(
    session: capture.Session, module: nn.Module, path: str, dtype: torch.dtype, same_codes: bool
) -> tuple[nn.Module, Decision]:
    kind = type(module).__name__
    if bitsandbytes_modules.is_4bit(module):
        found = bitsandbytes_modules.converted(module)
        if isinstance(found, str):
            return module, _declined(path, kind, found)
        found.train(module.training)
        return found, Decision(path, path, kind, SWAPPED, f"{found.kind}a16", "packed in place")
    k = formats.input_size(module)
    if k is None:
        return module, _declined(path, kind, "its number of input features is unknown")
    x = torch.randn(1, 32, k, dtype=_dtype(module, dtype), device=_tensors(module)[0].device)
    reason = ""
    fp8 = fp8_modules.spelled_out(module)
    if fp8 is not None and fp8.activations and same_codes:
        return module, _declined(path, kind, fp8_modules.ACTIVATIONS)
    makers = formats.spellings(module) if fp8 is None else [fp8.make]
    # Three dimensions as in a model; some libraries' functions know two only.
    for make, example in itertools.product(makers, (x, x[0])):
        try:
            new, scheme = session.convert(make(), example, same_codes=same_codes)
        except capture.NotConverted as problem:
            reason = reason or str(problem)
            continue
        new.train(module.training)
        reason = "packed in place" + _QUANTISED.get(getattr(new, "activation", ""), "")
        if fp8 is not None and fp8.activations:
            reason += ", activations left as floats where the library's are FP8"
        return new, Decision(path, path, kind, SWAPPED, scheme, reason)
    return module, _declined(path, kind, reason)


def _declined(path: str, kind: str, reason: str) -> Decision:
    return Decision(path, path, kind, DECLINED, "quantised", reason)


def _tensors(module: nn.Module) -> list[Tensor]:
    """The tensors a module holds itself: parameters, buffers, and what HQQ keeps in a dict."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for value in vars(module).values():
        if isinstance(value, dict):
            own.extend(each for each in value.values() if type(each) is Tensor)
        elif type(value) is Tensor:
            own.append(value)
    return own


def is_quantised(module: nn.Module) -> bool:
    """Whether a module itself holds a matrix of codes or a quantised tensor, as linears do."""
    if (
        isinstance(module, (PackedWeight, Stored, nn.Embedding))
        or "Embedding" in type(module).__name__
    ):
        return False
    return formats.input_size(module) is not None and any(
        type(each) not in (Tensor, nn.Parameter) or (is_code_type(each.dtype) and each.dim() >= 2)
        for each in _tensors(module)
    )


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    named = getattr(module, "compute_dtype", None)
    scales = (getattr(module, name, None) for name in ("scales", "weight_scale"))
    candidates = [named, *(each.dtype for each in scales if isinstance(each, Tensor))]
    return next((each for each in candidates if each in FLOATS), default)
