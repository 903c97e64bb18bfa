"""Whether a product with INT4 weights is faster with INT8 activations as lanes (packing.py).

Whoever quantises for known products asks here: nn.py, lowering/lanes.py.
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
    k: Any,
    weights: list[Tensor],
    scales: Tensor,
    zeros: Tensor | None,
    out_dtype: torch.dtype,
) -> bool:
    """Whether x [M, K] times ``weights`` [N, K/2], side by side or alone, is.

    Kernels that do not take them have PyTorch put them in order. ``scales``, ``zeros``: of the
    first weight, the others' are alike. M that torch.compile leaves open is no int: False.
    """
    if type(m) is not int or type(k) is not int or m <= _FEW:  # few wait for their host
        return False
    known = {scales.dtype, out_dtype} <= plans.TYPE.keys() and not batch_invariance.enabled()
    gpu = _gpu(weights[0].device) if known else None
    if gpu is None:
        return False
    sizes = [w.shape[0] for w in weights]
    groups = max(
        check_parameters(INT4, "scales", scales, sizes[0], k),
        check_parameters(INT4, "zeros", zeros, sizes[0], k),
    )
    zero_type = None if zeros is None else plans.ZERO_TYPE.get(zeros.dtype, "float")
    types = plans.TYPE[scales.dtype], zero_type, plans.TYPE[out_dtype]
    return all(_picked_takes_them(gpu, *types, m, n, k, k // groups) for n in {*sizes, sum(sizes)})


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
