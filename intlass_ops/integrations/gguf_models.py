"""A model in a GGUF file as a transformers model whose linears keep the file's codes.

Lives here: loading; nothing is fetched. Not here: the file format (formats/gguf.py), what is known
of the architectures (gguf_architectures.py), config (gguf_config.py), which tensors a parameter
consists of (gguf_tensors.py), tokenizer (gguf_tokenizers.py), generation (static_decoding.py).

`load` gives the quantised model, `load_dense` the same weights dequantised, to compare with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..formats import FormatError
from ..formats.experts import stacked
from ..formats.gguf import INTEGERS, GGUFFile
from ..formats.layers import LayerSpec, buffers_of, write_specs
from ..nn import IntLinear
from ..ops import dequantize
from . import experts
from . import transformers_quantizer as _quantizer  # noqa: F401  (registers quant_method="intlass")
from .deferred import Deferred, State, add_layer, finish, placed
from .gguf_config import architecture_of, config_of
from .gguf_tensors import (
    EMBEDDING,
    HEAD,
    Place,
    empty,
    int_layer,
    places,
    rotary_row_order,
    stored_in,
)
from .gguf_tokenizers import tokenizer_of

__all__ = ["config_of", "load", "load_dense", "load_device_map", "tokenizer_of"]

Progress = Callable[[int, int], None]  # parameters done, parameters in all


class IntEmbedding(nn.Module):
    """Rows of a quantised table, dequantised as they are looked up.

    ``table``: the IntLinear whose weight [vocabulary, K] it reads, as a tied head has it: one copy.
    """

    def __init__(self, table: IntLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        if self.table.bits == 4:
            return self._int4(ids)
        rows = self.table.weight[ids].to(torch.float32)  # [..., K]
        scales = self.table.scales[ids].to(torch.float32)  # [..., K/group_size]
        grouped = rows.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
        embedded: Tensor = grouped.flatten(-2).to(self.dtype)
        return embedded

    def _int4(self, ids: Tensor) -> Tensor:
        table, rows = self.table, ids.reshape(-1)
        zeros = None if table.zeros is None else table.zeros[rows]
        k = table.in_features
        dense = dequantize(table.weight[rows], table.scales[rows], zeros, k=k, dtype=self.dtype)
        return dense.view(*ids.shape, k)


def load(
    file: GGUFFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The model with every quantised weight in one of our layers; ``dtype`` is of activations.

    The rows of a quantised table are looked up in integers; a tied one is stored once and serves as
    embedding and head.
    """
    checkpoint = _Checkpoint(file, dtype, progress)
    table = checkpoint.table()
    with _without_bar():
        model = _loaded(checkpoint, str(device))
    if table is not None:
        shared = model.get_submodule(HEAD) if checkpoint.tied else table.to(device)
        model.set_submodule(EMBEDDING, IntEmbedding(shared, dtype))
    return model


def load_dense(
    file: GGUFFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The same model with every weight dequantised to ``dtype``, in transformers' own modules."""
    with _without_bar():
        return _loaded(_Checkpoint(file, dtype, progress, dense=True), str(device))


def load_device_map(file: GGUFFile, device_map: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """`load` for `load_pretrained`: where transformers' ``device_map`` says, ready to be saved.

    A quantised table is looked up in ``dtype`` (default float32) and multiplied in integers.
    """
    return _loaded(_Checkpoint(file, dtype or torch.float32), device_map)


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """transformers would draw its own beside that of the caller."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _loaded(checkpoint: _Checkpoint, device_map: Any) -> PreTrainedModel:
    state, config = checkpoint.state(), checkpoint.config
    model_class = getattr(transformers, checkpoint.known.model)
    options = {"config": config, "state_dict": state, "dtype": checkpoint.dtype}
    return finish(checkpoint.file.path, *placed(model_class, None, device_map, **options))


class _Checkpoint:
    """A file as transformers' ``from_pretrained`` wants it: a config, and tensors to be read."""

    def __init__(
        self,
        file: GGUFFile,
        dtype: torch.dtype,
        progress: Progress | None = None,
        dense: bool = False,
    ) -> None:
        self.file, self.dtype, self.dense, self._progress = file, dtype, dense, progress
        self.known, self.config = architecture_of(file), config_of(file)
        self.places = places(file, self.config, self.known)
        self.tied = bool(self.config.tie_word_embeddings)
        self._specs: dict[str, LayerSpec] = {}
        self._state: State = {}
        self._done: set[str] = set()
        self._looked_up_in_integers = False

    def table(self) -> IntLinear | None:
        """The layer of a table whose rows are to be looked up in integers; None where it cannot be.

        If there is one, the model's own embedding gets no numbers: replace it.
        """
        name = "token_embd.weight"
        (place,) = (each for each in self.places if each.tensors == (name,))
        own = empty(self.file, self.config, self.known).get_submodule(place.path)
        if type(own) is not nn.Embedding or self.file.info(name).type not in INTEGERS:
            return None  # Gemma's multiplies what it looks up
        layer = int_layer(self.file.weight(name))
        self._looked_up_in_integers = isinstance(layer, IntLinear)
        return layer if isinstance(layer, IntLinear) else None

    def state(self) -> State:
        """What the model's state_dict has to hold; the config learns of our layers."""
        for place in self.places:
            quantized = [self.file.is_quantized(name) for name in place.tensors]
            if self.dense or not any(quantized):
                self._add_dense(place)
            elif place.path == EMBEDDING:
                self._add_dense(place)
                if self.tied:
                    # Looked up in floating point, multiplied in integers: two tensors from here on.
                    self._add_linear(HEAD, place)
                    self.config.tie_word_embeddings = False
            elif place.is_linear and all(quantized):
                self._add_linear(place.path, place)
            elif len(place.shape) == 3:
                self._add_experts(place)
            else:
                self._add_dense(place)
        if self._specs:
            self.config.quantization_config = write_specs(self._specs)
        self.config.dtype = self.dtype
        return self._state

    def _add_linear(self, path: str, place: Place) -> None:
        (name,) = place.tensors
        spec, buffers = buffers_of(stored_in(self.file, name, order=self._order(name)), None)
        buffers["weight"] = self._counted(place, buffers["weight"])
        self._specs[path] = add_layer(self._state, path, spec, buffers)

    def _add_experts(self, place: Place) -> None:
        for name in place.tensors:
            if not self.file.is_quantized(name):
                raise FormatError(
                    f"{self.file.path}: {' and '.join(place.tensors)} are not stored alike"
                )
        target = place.name + experts.SUFFIX
        parts = [
            [stored_in(self.file, name, number) for number in range(place.shape[0])]
            for name in place.tensors
        ]
        spec, buffers = stacked(f"{self.file.path}: {target}", parts, None, place.alternating)
        buffers["weight"] = self._counted(place, buffers["weight"])
        self._specs[target] = add_layer(self._state, target, spec, buffers)

    def _add_dense(self, place: Place) -> None:
        read = self._counted(place, lambda: self._dense(place))
        self._state[place.name] = Deferred(self.dtype, place.shape, read)
        spec = self._specs.get(place.path)
        if spec is not None and place.parameter == "bias":
            bias = ("bias", self.dtype, place.shape)
            self._specs[place.path] = replace(spec, tensors=(*spec.tensors, bias))

    def _dense(self, place: Place) -> Tensor:
        if place.path == EMBEDDING and self._looked_up_in_integers:
            return torch.zeros((), dtype=self.dtype).expand(place.shape)
        parts = []
        for name in place.tensors:
            order, values = self._order(name), self.file.dense(name)
            parts.append(values if order is None else values[order])
        if place.alternating:
            joined = torch.stack(parts, 2).flatten(1, 2)
        else:
            joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if place.transposed:
            joined = joined.transpose(1, 2)
        if place.path.endswith("norm"):
            joined = joined - self.known.norm_offset
        return joined.reshape(place.shape).to(self.dtype)

    def _order(self, name: str) -> Tensor | None:
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is None or not self.known.interleaved:
            return None
        return rotary_row_order(self.file.info(name).shape[0], heads)

    def _counted(self, place: Place, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def counting() -> Tensor:
            found = read()
            self._done.add(place.name)
            if self._progress is not None:
                self._progress(len(self._done), len(self.places))
            return found

        return counting
