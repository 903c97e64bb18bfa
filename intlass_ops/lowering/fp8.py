"""Codes that are floats of 8 bits: which types are read, and which are told apart and declined.

Lives here: what the types mean to the matcher. Not here: how codes are found and proved
(probing.py, weights.py), which are values of a slice like integers but for having no zero points.
"""

from __future__ import annotations

import torch

CODES = torch.float8_e4m3fn
# Of weights and activations too; no kernel of ours decodes them.
UNREAD = (torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def is_code_type(dtype: torch.dtype) -> bool:
    """Whether tensors of a type hold codes: integers, or floats of 8 bits."""
    if dtype in (CODES, *UNREAD):
        return True
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def unread(dtype: torch.dtype) -> str:
    """Why codes of one of the other types are left alone."""
    return f"codes of {str(dtype).removeprefix('torch.')}: of FP8, float8_e4m3fn is read"
