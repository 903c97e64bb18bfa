"""Schemes by name, as configurations in files and on command lines have them: w4a16, w8a8, …"""

from __future__ import annotations

from typing import Any

from ..quantize import (
    Int4DynamicActivationInt4Weight,
    Int4WeightOnly,
    Int8DynamicActivationInt4Weight,
    Int8DynamicActivationInt8Weight,
    Int8WeightOnly,
    Scheme,
)

SCHEMES = ("w4a16", "w8a16", "w8a8", "w4a8", "w4a4")


def scheme_named(
    name: str, *, group_size: int | None = 128, symmetric: bool = False, method: str = "rtn"
) -> Scheme:
    """The configuration of `quantize_` for a scheme's name: weight bits, then activation bits.

    INT8 weights have one scale a row; ``group_size`` and ``symmetric`` are those of INT4 weights.
    """
    options: dict[str, Any] = {"method": method}
    if name == "w4a16":
        return Int4WeightOnly(group_size, symmetric, **options)
    if name == "w8a16":
        return Int8WeightOnly(None, **options)
    if name == "w8a8":
        return Int8DynamicActivationInt8Weight(**options)
    if name == "w4a8":
        return Int8DynamicActivationInt4Weight(group_size, **options)
    if name == "w4a4":
        return Int4DynamicActivationInt4Weight(group_size, **options)
    raise ValueError(f"scheme {name!r} is not one of {', '.join(SCHEMES)}")
