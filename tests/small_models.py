"""Small models and their quantised forms, for the tests of nn.py and quantize.py."""

from __future__ import annotations

import pytest
import torch
from strategies import FP32, SCHEMES
from torch import Tensor, nn

import intlass_ops as ia

K, N = 64, 96
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def linears(dtype: torch.dtype = FP32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False), nn.Linear(K, N))
    return nn.Sequential(*layers).to(dtype)


def quantized(scheme: str, dtype: torch.dtype = FP32, device: str = "cpu") -> nn.Sequential:
    layers = linears(dtype)
    ia.quantize_(layers, SCHEMES[scheme])
    return layers.to(device)


def tokens(dtype: torch.dtype = FP32, device: str = "cpu") -> Tensor:
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(device)
