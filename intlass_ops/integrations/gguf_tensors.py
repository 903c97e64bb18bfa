"""Which tensors of a GGUF file each parameter of its model consists of, and in which order of rows.

Not here: the names (gguf_architectures.py), putting layers into a model (gguf_models.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..formats import CanonicalWeight, FormatError
from ..formats.fp4 import StoredFp4
from ..formats.gguf import GGUFFile
from ..formats.layers import buffers_of, layer_of
from ..formats.lut4 import StoredLut4
from ..formats.stored import StoredWeight
from . import gguf_rope
from .gguf_architectures import Architecture

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_NAMES = {EMBEDDING: ("token_embd",), "model.norm": ("output_norm",), HEAD: ("output",)}
_ROPE = (gguf_rope.FACTORS, gguf_rope.LONG_FACTORS, gguf_rope.SHORT_FACTORS)


@dataclass(frozen=True)
class Place:
    """A parameter of the model, and the tensors of the file whose rows are its rows.

    Of experts (modules that say so): ``transposed``: they are [experts, K, N] in the model;
    ``alternating``: rows of the tensors take turns, where else one tensor follows the other.
    """

    path: str
    parameter: str  # weight, bias, or the parameter's name in a module of experts
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    is_linear: bool
    transposed: bool = False
    alternating: bool = False

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}"


def places(file: GGUFFile, config: Any, known: Architecture) -> list[Place]:
    """Every parameter of the model; FormatError for tensors that it lacks or has no use for."""
    model = empty(file, config, known)
    found = []
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        tensors = tuple(_tensors_of(path, last, known))
        module, shape = model.get_submodule(path), tuple(parameter.shape)
        place = Place(
            path,
            last,
            tensors,
            shape,
            is_linear=type(module) is nn.Linear and last == "weight",
            transposed=len(shape) == 3 and bool(getattr(module, "is_transposed", False)),
            alternating=len(tensors) > 1 and not getattr(module, "is_concatenated", True),
        )
        _check_shape(file, place)
        found.append(place)
    used = {*_ROPE, *(tensor for place in found for tensor in place.tensors)}
    used |= {each for name in used & file.tensors.keys() for each in file.sidecars(name)}
    unused = sorted(name for name in file.tensors if name not in used)
    if unused:
        raise FormatError(
            f"{file.path}: {known.model} has no use for {', '.join(unused[:3])}"
            f"{f' and {len(unused) - 3} more' if len(unused) > 3 else ''}; such a model is not "
            "supported"
        )
    return found


def _tensors_of(path: str, last: str, known: Architecture) -> Iterator[str]:
    if path in _NAMES:
        yield f"{_NAMES[path][0]}.{last}"
        return
    number, _, part = path.removeprefix("model.layers.").partition(".")
    if f"{part}.{last}" in known.layer:  # a parameter that is no weight of a module
        part, last = f"{part}.{last}", "bias" if last.endswith("_bias") else "weight"
    for tensor in known.layer[part]:
        yield f"blk.{number}.{tensor}.{last}"


def empty(file: GGUFFile, config: Any, known: Architecture) -> PreTrainedModel:
    """The model on the meta device: names, modules and shapes, no memory."""
    try:
        with torch.device("meta"):
            return getattr(transformers, known.model)(config)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as problem:
        raise FormatError(
            f"{file.path}: {known.model} does not take the file's metadata: {problem}"
        ) from None


def _check_shape(file: GGUFFile, place: Place) -> None:
    shapes = [file.info(name).shape for name in place.tensors]
    joined = shapes[0]
    if len(shapes) > 1:  # of experts
        alike = len({(len(each), *each[:1], *each[2:]) for each in shapes}) == 1
        if not alike or len(joined) < 2 or (place.alternating and len({*shapes}) > 1):
            joined = ()
        else:
            joined = (joined[0], sum(each[1] for each in shapes), *joined[2:])
    if place.transposed and len(joined) == 3:
        joined = (joined[0], joined[2], joined[1])
    # The gate of a shared expert has one row, stored as a vector.
    if place.shape not in (joined, (1, *joined)):
        raise FormatError(
            f"{file.path}: {' and '.join(place.tensors)} has shape "
            f"{' and '.join(map(str, shapes))}; {place.name} of the model has {place.shape}"
        )


def rotary_row_order(rows: int, heads: int) -> Tensor:
    """Row of the file that belongs at each row of transformers' q_proj or k_proj.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head, transformers (i, i + head_dim / 2).
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def stored(weight: CanonicalWeight, read: Callable[[], CanonicalWeight]) -> StoredWeight:
    """A weight of the file, whose codes ``read`` brings (again)."""
    zeros = weight.zeros
    # Of 8 bits with zeros (Q5_1, Q5_K) they are not signed: `StoredWeight` has 128 less. Decided
    # here: a function that asks ``weight`` later would keep all of its codes.
    wide = weight.bits == 8 and zeros is not None

    def codes() -> Tensor:
        return read().codes ^ -128 if wide else read().codes

    return StoredWeight(weight.name, weight.bits, weight.shape, weight.scales, zeros, None, codes)


def stored_in(
    file: GGUFFile, name: str, expert: int | None = None, order: Tensor | None = None
) -> StoredWeight | StoredFp4 | StoredLut4:
    """A quantised weight of the file, its rows in ``order``. Experts are in no table's codes."""
    in_table = expert is None and file.is_lut4(name)
    if in_table or file.is_fp4(name):
        found = file.lut4(name) if in_table else file.fp4(name, expert)
        if order is None:
            return found
        return replace(
            found,
            read=lambda: found.read()[order],
            read_scales=lambda: found.read_scales()[order],
        )

    def read() -> CanonicalWeight:
        weight = file.weight(name, expert)
        return weight if order is None else weight.take_rows(order)

    return stored(read(), read)


def int_layer(weight: CanonicalWeight) -> nn.Module:
    """The layer of a weight that has been read."""
    spec, buffers = buffers_of(stored(weight, lambda: weight), None)
    tensors = {name: get() for name, get in buffers.items()}
    return layer_of(spec.kind, spec.in_features, None, tensors)
