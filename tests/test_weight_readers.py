"""Models that read a linear's weight instead of calling the linear work, or are told why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from small_models import each_scheme
from strategies import SCHEMES
from torch import Tensor, nn

import intlass_ops as ia

QAT = ia.QATConfig("w8a8", rotation=None, method="abs_max")


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers).eval()


def padded() -> dict[str, Any]:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    return {"src": x, "src_key_padding_mask": torch.tensor([[False] * 3 + [True] * 2, [False] * 5])}


def by_calls(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Without the operator that PyTorch has for a whole layer."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        y: Tensor = model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return y


@each_scheme
def test_encoder_layers_of_pytorch_call_their_linears_in_inference(scheme: str) -> None:
    model, inputs = encoder(), padded()
    ia.quantize_(model, SCHEMES[scheme])
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs), by_calls(model, inputs))
        del inputs["src_key_padding_mask"]
        torch.testing.assert_close(model(**inputs), by_calls(model, inputs))


def test_encoder_layers_in_training_are_evaluated_quantised() -> None:
    """The operator would take the floating weights that a `QATLinear` has, too."""
    model, inputs = encoder(1), padded()
    ia.quantize_(model, QAT)
    with torch.no_grad():
        before = model(**inputs)
        ia.convert_(model)
        torch.testing.assert_close(model(**inputs), before)


def test_encoder_layers_left_alone_keep_their_fast_path() -> None:
    model = encoder()
    ia.quantize_(model, SCHEMES["w8a16"], lambda _, name: name.startswith("layers.1"))
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 0]
    assert not model.use_nested_tensor
    ia.quantize_(untouched := encoder(), SCHEMES["w8a16"], lambda *_: False)
    assert untouched.use_nested_tensor
    assert untouched.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("config", [SCHEMES["w4a16"], QAT], ids=["w4a16", "qat"])
def test_what_a_model_keeps_in_fp32_stays(config: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1}
    t5 = transformers.T5EncoderModel(transformers.T5Config(num_heads=4, **sizes)).eval()
    model, ids = nn.ModuleDict({"text": t5}), torch.arange(6)[None]
    y = t5(ids).last_hidden_state
    ia.quantize_(model, config)
    dense = t5.encoder.block[0].layer[1].DenseReluDense
    assert type(dense.wo) is nn.Linear
    assert type(dense.wi) is not nn.Linear
    error = (t5(ids).last_hidden_state - y).norm() / y.norm()
    assert error < 0.2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
@each_scheme
def test_an_input_cast_to_the_dtype_of_the_codes_is_refused(
    scheme: str, dtype: torch.dtype
) -> None:
    layer = nn.Sequential(nn.Linear(64, 8))
    ia.quantize_(layer, SCHEMES[scheme])
    with pytest.raises(TypeError, match=rf"^IntLinear: x is {dtype}; .* leave this layer out"):
        layer(torch.ones(2, 64).to(dtype))


@pytest.mark.parametrize("config", [SCHEMES["w8a16"], QAT], ids=["w8a16", "qat"])
def test_weights_of_other_libraries_are_sent_to_prepare(config: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    torchao.quantize_(layers, torchao.Int8WeightOnlyConfig(), lambda _, name: name == "1")
    before = list(layers)
    with pytest.raises(TypeError, match=r"^quantize_: 1: the weight is a Int8Tensor; .*prepare_"):
        ia.quantize_(layers, config)
    assert list(layers) == before


@pytest.mark.parametrize("config", [SCHEMES["w8a16"], SCHEMES["w4a16"], QAT], ids=str)
def test_hooks_stay(config: Any) -> None:
    layers = nn.Sequential(nn.Linear(64, 32))
    handle = layers[0].register_forward_hook(lambda module, args, y: y + 100)
    layers[0].register_forward_pre_hook(
        lambda module, args, named: ((2 * args[0],), named), with_kwargs=True
    )
    x = torch.randn(3, 64)
    y = layers(x)
    for change in (lambda: ia.quantize_(layers, config), lambda: ia.convert_(layers)):
        change()
        assert (layers(x) - y).norm() < 0.1 * (y - 100).norm()
    handle.remove()
    assert (layers(x) - (y - 100)).norm() < 0.1 * (y - 100).norm()


def test_hooks_that_make_weights_go() -> None:
    layers = nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 32)))
    nn.utils.prune.random_unstructured(nn.Sequential(linear := nn.Linear(32, 64))[0], "weight", 0.5)
    layers.append(linear)
    y = layers(x := torch.randn(3, 64))
    ia.quantize_(layers, SCHEMES["w8a16"])
    assert (layers(x) - y).norm() < 0.05 * y.norm()
