"""Whether a product with INT4 weights is faster with INT8 activations as lanes (packing.py).

Whoever quantises for known products asks here: nn.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import batch_invariance, config
from ..cuda import plans
from .problem import INT4, check_parameters

_FEW = 8  # tokens that hopper.cu never has with such weights (config/choice.py)


def takes_lanes(
    m: Any,
    k: int,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_dtype: torch.dtype,
) -> bool:
    """Whether x [M, K] times ``weight`` [N, K/2] is. Others put lanes in order."""
    if type(m) is not int or m <= _FEW:  # a traced M is no int; few tokens wait for their host
        return False
    known = {scales.dtype, out_dtype} <= plans.TYPE.keys() and not batch_invariance.enabled()
    gpu = _gpu(weight.device) if known else None
    if gpu is None:
        return False
    n = weight.shape[0]
    groups = max(
        check_parameters(INT4, "scales", scales, n, k),
        check_parameters(INT4, "zeros", zeros, n, k),
    )
    zero_type = None if zeros is None else plans.ZERO_TYPE.get(zeros.dtype, "float")
    types = plans.TYPE[scales.dtype], zero_type, plans.TYPE[out_dtype]
    return _picked_takes_them(gpu, *types, m, n, k, k // groups)


def _gpu(device: torch.device) -> config.Device | None:
    if device.type != "cuda" or not torch.cuda.is_initialized():  # the latter of fake tensors
        return None
    return plans.device_of(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=4096)
def _picked_takes_them(
    gpu: config.Device,
    scale_type: str,
    zero_type: str | None,
    out_type: str,
    m: int,
    n: int,
    k: int,
    group_size: int,
) -> bool:
    shape = config.Shape(
        x_kind="s8",
        w_kind="s4" if zero_type is None else "u4",
        scale_type=scale_type,
        zero_type=zero_type or "float",
        out_type=out_type,
        has_zeros=zero_type is not None,
        has_a_zero=False,
        aligned=True,  # as weights of modules are
        m=m,
        n=n,
        k=k,
        group_size=group_size,
    )
    return config.takes_lanes(gpu, shape)
