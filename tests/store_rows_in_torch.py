"""What store_rows.cu computes, in PyTorch: the kernel's oracle, and its stand-in on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from intlass_ops.cuda.launch_store_rows import Planes, Stored

FLAGS = {"scales": 1, "zeros": 3, "high_scales": 5}


def store_rows(
    planes: Planes, order: Tensor | None, low: int, num_codes: int, into: Stored, flags: Tensor
) -> None:
    columns = slice(None) if order is None else order
    at_zero, at_one, at_code, w = (
        each[:, columns].double()
        for each in (planes.at_zero, planes.at_one, planes.at_code, planes.weight)
    )
    rows, k = w.shape
    scale = at_one - at_zero
    slope = torch.where(scale == 0, 1.0, scale)
    zero, exact = -at_zero / slope, (at_code - at_zero) / slope
    zero = torch.where(
        (zero - zero.round()).abs() <= 1e-12 * zero.round().abs(), zero.round(), zero
    )
    scale = torch.where((scale == 0) & (at_zero != 0), 1.0, scale)
    codes = exact.round()
    holds = (exact - codes).abs() <= 1e-6 * (codes.abs() + 1)
    size = (codes.abs() + zero.abs()) * scale.abs()
    kind = planes.precision
    bound = 0 * size if kind is None else 2 * kind.eps * (size + kind.smallest_normal)
    holds &= ((codes - zero) * scale - w).abs() <= bound + 1e-12 * w.abs()
    scales, zeros = (t.view(rows, into.scales.shape[1], -1) for t in (scale, zero))
    for each in (scales, zeros):
        holds &= (each == each[:, :, :1]).reshape(rows, k)
    if into.zeros is None:
        holds &= (zero == zero.round()) & (zero.abs() < 512)
        codes = codes - zero
    holds &= (codes >= low) & (codes < low + num_codes)
    flags |= int(not bool(holds.all()))
    stored = torch.where(holds, codes, 0).to(torch.int16) - (0 if into.zeros is None else low)
    if into.weight.shape[1] < k or into.high is not None:
        stored = torch.nn.functional.pad(stored, (0, k % 2))
        into.weight[:] = (stored[:, ::2] & 15) | ((stored[:, 1::2] & 15) << 4)
        if into.high is not None:
            into.high[:] = (stored[:, ::2] >> 4) | (stored[:, 1::2] >> 4 << 4)
    else:
        into.weight[:] = stored
    parameters = {"scales": scales[:, :, 0], "zeros": zeros[:, :, 0] - low}
    for name, values in (*parameters.items(), ("high_scales", 16 * scales[:, :, 0])):
        to = getattr(into, name)
        if to is not None:
            to[:] = values
            for i, dtype in enumerate((torch.bfloat16, torch.float16)):
                exactly = torch.equal(values.to(dtype).double(), values)
                flags |= 0 if exactly else 1 << (FLAGS[name] + i)
