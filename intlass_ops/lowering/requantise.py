"""Whether a library quantises its activations as our own quantiser does, or nearly so.

Lives here: `like_ours`, by which `prepare_(model, same_codes=False)` tells which modules may have
our quantiser instead of their own. Not here: reading the module (capture.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Libraries divide the largest |x| of a token by 127, 127.5 or 128.
_FEWEST, _MOST = 126.5, 128.5


def example(like: Tensor) -> Tensor:
    """x of the shape and dtype of `like` that tells quantisers apart: tokens of sizes far apart,
    one with an outlier, none of which a scale of its own would clip."""
    rows = like.shape[-2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator)
    x = x * torch.exp2(torch.linspace(-6, 6, rows)).unsqueeze(-1)
    x[..., rows // 2, 0] *= 64
    return x.to(like)


def like_ours(x: Tensor, codes: Tensor, scale: Tensor) -> bool:
    """Whether codes * scale is `example` x rounded to int8 per token, symmetrically.

    codes have the elements of x[.., M, K] and scale has one a token: it is max |x| / c with c about
    127, and each x is within a step of its code.
    """
    k = x.shape[-1]
    if codes.numel() != x.numel() or scale.numel() * k != x.numel():
        return False
    wide = x.double().reshape(-1, k)
    step = scale.double().reshape(-1, 1)
    steps = wide.abs().amax(-1, keepdim=True) / step
    error = (codes.double().reshape(-1, k) * step - wide).abs() / step
    alike = (steps >= _FEWEST) & (steps <= _MOST)
    return bool(alike.all() and (error <= 1).all())
