"""What a GEMM does to complete sums before it rounds them: fields of every GEMM's configuration.

They change neither which kernel is picked nor its tile: `with_epilogue` puts them into a pick.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .choice import Matmul

    AnyMatmul = TypeVar("AnyMatmul", bound=Matmul)


class Activation(IntEnum):
    """enum Activation of epilogue.cuh; the ops know them by these names in lower case."""

    NONE = 0
    RELU = 1
    SILU = 2
    GELU = 3
    GELU_TANH = 4


def with_epilogue(c: AnyMatmul, activation: str | None, residual: bool) -> AnyMatmul:
    """The same tile, with this after its sums."""
    which = Activation.NONE if activation is None else Activation[activation.upper()]
    return replace(c, activation=which, residual=residual)


def named(c: Matmul) -> str:
    """What follows the name of a kernel that does something to its sums."""
    activation = "" if c.activation is Activation.NONE else f" {c.activation.name.lower()}"
    experts = " experts" if getattr(c, "experts", False) else ""
    return experts + activation + (" residual" if c.residual else "")
