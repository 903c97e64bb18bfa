"""store_rows.cu: rows of a weight, proved and packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class StoreRows:
    """store_rows.cu: a block takes a row."""

    source: ClassVar[str] = "store_rows.cu"
    entry: ClassVar[str] = "store_rows"

    w_type: str  # of the weight as its graph rounds it
    threads: int = 256

    def __str__(self) -> str:
        return "store_rows"

    def expected_sass(self, arch: str) -> tuple[str, ...]:
        return ()


def pick_store_rows(w_type: str) -> StoreRows:
    """The configuration for a type of weights."""
    return StoreRows(w_type)
