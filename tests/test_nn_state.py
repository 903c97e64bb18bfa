"""What a quantised model stores, and what its weights survive: copies, files, casts."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from small_models import each_scheme, linears, quantized, tokens
from strategies import BF16, FP16
from tolerance import assert_identical
from torch import nn

import intlass_ops as ia


@each_scheme
def test_state_dict_through_safetensors(scheme: str, tmp_path: Path, device: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layers, loaded = quantized(scheme, BF16, device), quantized(scheme, BF16, device)
    safetensors.save_file(layers.state_dict(), tmp_path / "model.safetensors")
    for tensor in loaded.state_dict().values():
        tensor.zero_()
    loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors", device=device))
    for name, tensor in layers.state_dict().items():
        assert_identical(loaded.state_dict()[name], tensor)
    x = tokens(BF16, device)
    assert_identical(loaded(x), layers(x))


@each_scheme
@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_were_not_quantised_are_not_loaded(scheme: str, assign: bool) -> None:
    layers = quantized(scheme)
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0\.weight is torch\.float32, .* holds codes"):
        layers.load_state_dict(linears().state_dict(), strict=False, assign=assign)
    for name, tensor in before.items():
        if name.endswith(("weight", "scales", "zeros")):
            assert_identical(layers.state_dict()[name], tensor)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@each_scheme
def test_copies_compute_the_same(scheme: str, how: str, device: str) -> None:
    layers = quantized(scheme, device=device)
    if how == "deepcopy":
        twin = copy.deepcopy(layers)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layers))
    else:
        buffer = io.BytesIO()
        torch.save(layers, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert repr(twin) == repr(layers)
    for name, tensor in layers.state_dict().items():
        assert twin.state_dict()[name].data_ptr() != tensor.data_ptr()
    x = tokens(device=device)
    assert_identical(twin(x), layers(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "type"])
@each_scheme
def test_casting_a_model_keeps_its_weights(scheme: str, cast: str, device: str) -> None:
    layers = quantized(scheme, device=device)
    before = {n: t.clone() for n, t in layers.state_dict().items()}
    changed = {"half": FP16, "bfloat16": BF16, "double": torch.float64, "to": BF16, "type": FP16}
    args = (changed[cast],) if cast in ("to", "type") else ()
    getattr(layers, cast)(*args)
    for name, tensor in layers.state_dict().items():
        if name.endswith("bias"):
            assert tensor.dtype == changed[cast]
        elif isinstance(layers[int(name[0])], ia.IntLinear):
            assert_identical(tensor, before[name])


def test_parameters_and_buffers() -> None:
    """Nothing that an optimiser would update; no buffer for what is absent."""
    layers = quantized("w4a16")
    assert not list(layers[0].parameters())
    assert set(layers[0].state_dict()) == {"weight", "scales", "zeros", "bias"}
    assert set(quantized("w8a16")[2].state_dict()) == {"weight", "scales"}


@each_scheme
def test_quantised_models_are_smaller(scheme: str) -> None:
    def stored(layer: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in layer.state_dict().values())

    bits = 4 if scheme.startswith("w4") else 8
    assert stored(quantized(scheme)[0]) < stored(linears()[0]) * (bits / 32 + 0.15)
