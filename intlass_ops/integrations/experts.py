"""Fused mixtures of experts, whose weights are 3-D parameters [experts, N, K] and not linears.

Lives here: how those of transformers get our layers in place of their parameters, through its own
interface of experts implementations, and which 3-D weights of a model stay as they are.
Not here: the product (ops/experts.py), how weights become codes (quantize.py).

Private API of transformers, checked on 5.23: `_experts_implementation_internal` of a config, and
the attributes that `use_experts_implementation` gives its modules.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..fp4_linear import Fp4ExpertLinear
from ..fp8_linear import Fp8ExpertLinear
from ..nn import IntExpertLinear

ExpertLinear = Fp4ExpertLinear | Fp8ExpertLinear | IntExpertLinear
IMPLEMENTATION, WATCHED = "intlass", "intlass_watched"
# Not the parameters' own names: transformers splits tensors of these names when a model is saved.
SUFFIX = "_quantized"
# What its interface calls an implementation with, or asks of the module.
_INTERFACE = ("config", "num_experts", "has_gate", "has_bias", "is_transposed")
# Position tables, class tokens and the like have a size below this in some dimension.
_SMALLEST = 16


def mixtures_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of fused experts that transformers can run by another implementation."""
    for path, module in model.named_modules():
        if len(parameters_of(module)) == 2:
            yield path, module


def parameters_of(module: nn.Module) -> list[str]:
    """Names of those parameters [experts, …] of a mixture's module that are still there."""
    if not all(hasattr(module, name) for name in _INTERFACE):
        return []
    found = [(name, getattr(module, name, None)) for name in projections(module)]
    return [name for name, p in found if isinstance(p, nn.Parameter) and p.dim() == 3]


def projections(module: Any) -> tuple[str, str]:
    """Names of the two 3-D parameters of a mixture's module."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def weights_of(module: Any, name: str) -> Tensor:
    """A projection of all experts as [experts, N, K]."""
    weight: Tensor = getattr(module, name).detach()
    return weight.transpose(1, 2) if module.is_transposed else weight


def put(module: Any, name: str, layer: ExpertLinear) -> None:
    """``layer`` in place of the parameter ``name``; the module runs by our implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    delattr(module, name)
    module.add_module(name + SUFFIX, layer)
    if hasattr(module, "dense_config"):
        return
    # A config of its own: the model's may be set to an implementation that wants the parameter.
    module.dense_config, module.config = module.config, copy.copy(module.config)
    module.config._experts_implementation_internal = IMPLEMENTATION
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    # Or transformers would, after loading, draw numbers for a parameter that is not there.
    module._is_hf_initialized = True


@contextlib.contextmanager
def watched(module: Any, see: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Within, ``see(name, expert, x)`` is told what each expert's projection is called with.

    The module still multiplies by its own weights, one expert after the other.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def multiply(name: str, x: Tensor, ends: Tensor, rows: Tensor | None) -> Tensor:
        x = x if rows is None else x[rows]
        weight, bias = weights_of(module, name), getattr(module, f"{name}_bias", None)
        y, start = x.new_zeros(x.shape[0], weight.shape[1]), 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                own = None if bias is None else bias[expert]
                see(name, expert, x[start:end])
                y[start:end] = nn.functional.linear(x[start:end], weight[expert], own)
            start = end
        return y

    before = module.config
    module.config, module.intlass_multiply = copy.copy(before), multiply
    module.config._experts_implementation_internal = WATCHED
    ALL_EXPERTS_FUNCTIONS.register(WATCHED, _watched_forward)
    try:
        yield
    finally:
        module.config = before
        del module.intlass_multiply


def _watched_forward(self: Any, *args: Tensor) -> Tensor:
    return _mix(self, self.intlass_multiply, *args)


def is_quantized(module: nn.Module) -> bool:
    """Whether `put` has been here."""
    return hasattr(module, "dense_config")


def take_back(module: Any, dtype: torch.dtype) -> None:
    """The parameters again, dequantised, and the implementation that was there before."""
    for name in projections(module):
        layer: ExpertLinear = getattr(module, name + SUFFIX)
        dense = layer.dequantize(dtype)
        dense = dense.transpose(1, 2).contiguous() if module.is_transposed else dense
        delattr(module, name + SUFFIX)
        module.register_parameter(name, nn.Parameter(dense, requires_grad=False))
    module.config = module.dense_config
    del module.dense_config


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Σ of the chosen experts' outputs, weighted: hidden_states [T, K], the others [T, top_k]."""

    def multiply(name: str, x: Tensor, ends: Tensor, rows: Tensor | None) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        y: Tensor = getattr(self, name + SUFFIX)(x, ends, bias, rows)
        return y

    return _mix(self, multiply, hidden_states, top_k_index, top_k_weights)


def _mix(
    self: Any,
    multiply: Callable[[str, Tensor, Tensor, Tensor | None], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """``multiply(name, x, ends, rows)``: a projection of rows of x, by expert."""
    top_k = top_k_index.shape[-1]
    # Tokens by expert; beyond the last are those of experts that other processes hold.
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    numbers = torch.arange(self.num_experts, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True)
    up, down = projections(self)

    y = multiply(up, hidden_states, ends, order // top_k)
    y = multiply(down, self._apply_gate(y) if self.has_gate else self.act_fn(y), ends, None)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    # A sum of one fixed order, unlike adding each row to its token's.
    y = y[back].view(hidden_states.shape[0], top_k, y.shape[-1]).sum(1)
    return y.to(hidden_states.dtype)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """3-D weights [experts, N, K] or [experts, K, N], by path."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Bilinear)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            sizes = parameter.shape
            if len(sizes) == 3 and sizes[0] > 1 and min(sizes[1:]) >= _SMALLEST:
                yield f"{path}.{name}" if path else name, parameter


def experts_left(model: nn.Module, planned: Container[str] = ()) -> str | None:
    """Which of them, but those ``planned``, a quantised model has, in words; None if none."""
    experts = [(path, weight) for path, weight in experts_of(model) if path not in planned]
    if not experts:
        return None
    left = sum(parameter.numel() for _, parameter in experts)
    share = 100 * left / sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{len(experts)} fused expert weights stay {experts[0][1].dtype} ({experts[0][0]}, …; "
        f"{share:.0f} % of the parameters not quantised): they were left out, or are not in the "
        "form that transformers runs by exchangeable implementations"
    )
