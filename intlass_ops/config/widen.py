"""widen.cu: INT4 activations as INT8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Widen:
    """widen.cu: a thread widens `vector` bytes of packed codes."""

    source: ClassVar[str] = "widen.cu"
    entry: ClassVar[str] = "widen"
    starts_early: ClassVar[bool] = True

    is_signed: bool
    vector: int
    threads: int = 256

    def __str__(self) -> str:
        return "widen"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


def pick_widen(x_kind: str, aligned: bool) -> Widen:
    """The configuration; ``aligned``: rows start and end on 16-byte boundaries."""
    return Widen(is_signed=x_kind == "s4", vector=16 if aligned else 1)
