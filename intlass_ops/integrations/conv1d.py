"""`Conv1D` of transformers, in GPT-2 and its kin: a linear whose weight lies transposed, [K, N]."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """By name, so that nobody has to import transformers for it."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_of(module: Any) -> nn.Linear:
    """The same function as an nn.Linear; the weight is copied, the bias shared."""
    k, n = module.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    weight = module.weight.detach().t().contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear


def conv1d_of(linear: nn.Linear) -> nn.Module:
    """The other way; a missing bias becomes zeros."""
    from transformers.pytorch_utils import Conv1D

    module: nn.Module = Conv1D(linear.out_features, linear.in_features)
    weight = linear.weight.detach()
    bias = linear.bias if linear.bias is not None else weight.new_zeros(linear.out_features)
    module.weight = nn.Parameter(weight.t().contiguous(), linear.weight.requires_grad)
    module.bias = nn.Parameter(bias.detach(), linear.weight.requires_grad)
    return module
