"""The readers against the libraries themselves, where these are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")

from safetensors.torch import save_file

from intlass_ops.formats import CanonicalWeight
from intlass_ops.formats.checkpoint import Checkpoint
from intlass_ops.formats.reader import open_reader

N, K, GROUP = 48, 64, 32


def read(
    directory: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    metadata: dict[str, str] | None = None,
) -> CanonicalWeight:
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata)
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    reader = open_reader(Checkpoint(directory))
    assert len(reader.paths) == 1
    return reader.stored(reader.paths[0]).load()


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_state_dict(tmp_path: Path, bits: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    torch.manual_seed(0)
    layer = quantize.HQQLinear(
        nn.Linear(K, N, bias=False), config, compute_dtype=torch.float32, device="cpu"
    )
    state = {f"layer.{name}": t for name, t in layer.state_dict().items()}
    weight = read(tmp_path, state, {"quant_method": "hqq"})
    torch.testing.assert_close(weight.dequantize(), layer.dequantize(), rtol=1e-4, atol=1e-5)
    assert (weight.bits, weight.group_size) == (bits, GROUP)


@pytest.mark.parametrize("kind", ["int4", "int8", "w8a8"])
def test_torchao_state_dict(tmp_path: Path, kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    config = {
        "int4": lambda: torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(GROUP)
        ),
        "int8": lambda: torchao.Int8WeightOnlyConfig(version=2),
        "w8a8": lambda: torchao.Int8DynamicActivationInt8WeightConfig(version=2),
    }[kind]()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).bfloat16()
    torchao.quantize_(model, config)
    tensors, metadata = support.flatten_tensor_state_dict(model.state_dict())
    weight = read(tmp_path, tensors, {"quant_method": "torchao"}, metadata)
    assert torch.equal(weight.dequantize(torch.bfloat16), model[0].weight.dequantize())
    reader = open_reader(Checkpoint(tmp_path))
    assert reader.activation("0") == ("int8_full_range" if kind == "w8a8" else None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packing(tmp_path: Path, symmetric: bool) -> None:
    packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch.manual_seed(0)
    q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    z = torch.randint(-8, 8, (N, K // GROUP), dtype=torch.int8)
    scale = torch.rand(N, K // GROUP).half()
    state = {
        "layer.weight_packed": packing.pack_to_int32(q, 4),
        "layer.weight_shape": torch.tensor([N, K]),
        "layer.weight_scale": scale,
    }
    if not symmetric:
        state["layer.weight_zero_point"] = packing.pack_to_int32(z, 4, packed_dim=0)
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    weight = read(tmp_path, state, config)
    codes = (q if symmetric else q - z.repeat_interleave(GROUP, 1)).float()
    assert torch.equal(weight.dequantize(), codes * scale.float().repeat_interleave(GROUP, 1))
