"""Tables of measured configurations: what is in them, where they lie, which entry a problem gets.

`intlass tune` writes a table for a GPU into the user's kernel cache; tables/ holds those that are
shipped. An entry names one of `candidates(device, shape)`, so whatever a table says, only a legal
configuration comes of it; a table that cannot be read is left out, with one warning. An entry
counts as long as its kernel's source is what was measured. Not here: measuring (bench/tuning.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..cuda import source
from ..cuda.cache import default_directory
from .problem import LUT4, Device, Shape

SHIPPED = Path(__file__).parent / "tables"
FORMAT = 1
_LARGEST_FILE = 1 << 24  # bytes
# Fields of configurations that the problem decides; the others are the tile.
_OF_THE_PROBLEM = {
    *(field.name for field in dataclasses.fields(Shape)),
    *("tiles_m", "tokens", "whole", "groups_per_chunk", "chunks_per_group", "groups_per_tile"),
    *("resident_blocks", "segment_k", "fixed_smem", "x_unit", "x_staged"),
    *("fp16_codes", "early_tiles", "only_if", "half_tiles"),
    *("activation", "residual", "experts"),
}
Tile = tuple[tuple[str, int], ...]
# arch, kinds, has_zeros, n, k, group_size
Class = tuple[str, str, str, bool, int, int, int]


class Entry(NamedTuple):
    """The fastest configuration of one problem."""

    of: Class
    m: int
    kernel: str  # the entry point: "gemm", "skinny", ...
    source: str  # source.digest of the kernel that was measured
    tile: Tile
    us: float
    predicted_us: float  # of what would have run without the table


def class_of(device: Device, shape: Shape) -> Class | None:
    """Which entries a problem shares with others; None where nothing is measured."""
    shape = shape.on(device)
    if shape.has_a_zero or shape.batch_invariant or not (shape.aligned and shape.apart):
        return None
    if shape.zeros_in_sums:
        return None
    group_size = min(shape.group_size, shape.k)
    kinds = shape.x_kind, LUT4[0] if shape.w_kind in LUT4 else shape.w_kind, shape.has_zeros
    return device.arch, *kinds, shape.n, shape.k, group_size


def tile_of(config: Any) -> Tile:
    """What tells a configuration from the other candidates of its kernel, sorted by name."""
    fields = (field.name for field in dataclasses.fields(config))
    values = {name: getattr(config, name) for name in fields if name not in _OF_THE_PROBLEM}
    return tuple(sorted((name, int(v)) for name, v in values.items() if isinstance(v, int)))


def nearest(device: Device, shape: Shape) -> list[Entry]:
    """The entries of a problem's class that serve its M, the nearest first."""
    of = class_of(device, shape)
    if of is None or not device.name or not shape.m:
        return []

    found = [e for e in _of_gpu(device.name).get(of, ()) if _serves(e.m, shape.m)]
    return sorted(found, key=lambda entry: abs(math.log(entry.m / shape.m)))


def _serves(measured: int, m: int) -> bool:
    """Whether M is as many tiles of tokens as was measured, or within an eighth of it.

    Not further: what is the fastest for 256 tokens may be half as fast as another for 512.
    """
    tile = 8 if m <= 16 else 32 if m <= 128 else 64
    return math.ceil(measured / tile) == math.ceil(m / tile) or abs(measured - m) * 8 <= m


def forget() -> None:
    """Read the tables anew when they are next asked for."""
    _of_gpu.cache_clear()


@lru_cache
def _of_gpu(name: str) -> dict[Class, list[Entry]]:
    """The shipped entries, and the user's own in their place where there are both."""
    found: dict[tuple[Class, int], Entry] = {}
    for path in (SHIPPED / file_name(name), user_table(name)):
        if path.is_file():
            try:
                entries = read(path, name)
            except (OSError, ValueError) as error:
                warnings.warn(
                    f"{path} is left out, kernels are chosen without it: {error}. "
                    "`intlass tune` writes a new one.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            found |= {(e.of, e.m): e for e in entries if is_current(e)}
    by_class: dict[Class, list[Entry]] = defaultdict(list)
    for (of, _), entry in found.items():
        by_class[of].append(entry)
    return dict(by_class)


def is_current(entry: Entry) -> bool:
    """Whether the kernel is still the one that was measured."""
    kernel = f"{entry.kernel}.cu"
    known = entry.kernel.isidentifier() and (source.SOURCE_DIR / kernel).is_file()
    return known and source.digest(kernel) == entry.source


def file_name(device_name: str) -> str:
    return "tuned-" + re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def user_table(device_name: str) -> Path:
    """Beside the compiled kernels."""
    return default_directory() / file_name(device_name)


def read(path: Path, device_name: str) -> list[Entry]:
    """Raises OSError, or ValueError saying what is wrong with the file."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"bad table: more than {_LARGEST_FILE} bytes")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("bad table: nested too deep") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"bad table: it is not of format {FORMAT}")
    if table.get("device") != device_name:
        raise ValueError(f"bad table: of {table.get('device')!r:.50}, not {device_name!r}")
    entries = table.get("entries")
    if not isinstance(entries, list):
        raise ValueError("bad table: no list of entries")
    return [_entry(each) for each in entries]


def _entry(each: Any) -> Entry:
    def get(name: str, *kinds: type) -> Any:
        value = each.get(name)
        if type(value) not in kinds:
            raise ValueError(f"bad table: {name}={value!r:.50} in an entry")
        return value

    if not isinstance(each, dict):
        raise ValueError(f"bad table: {each!r:.50} is no entry")
    of = tuple(get(name, kind) for name, kind in _CLASS)
    tile = get("tile", dict)
    m = get("m", int)
    if not 1 <= m < 1 << 40 or any(type(value) not in (int, bool) for value in tile.values()):
        raise ValueError(f"bad table: m={m!r:.50}, tile={tile!r:.50} in an entry")
    return Entry(
        of=of,
        m=m,
        kernel=get("kernel", str),
        source=get("source", str),
        tile=tuple(sorted((name, int(value)) for name, value in tile.items())),
        us=get("us", int, float),
        predicted_us=get("predicted_us", int, float),
    )


_CLASS = (
    ("arch", str),
    ("x_kind", str),
    ("w_kind", str),
    ("has_zeros", bool),
    ("n", int),
    ("k", int),
    ("group_size", int),
)


def write(path: Path, device_name: str, entries: Iterable[Entry], about: dict[str, Any]) -> None:
    """One entry a line, sorted; ``about`` says where the figures come from."""
    lines = []
    for e in sorted(entries):
        of = dict(zip((name for name, _ in _CLASS), e.of, strict=True))
        rest = e._asdict() | {"tile": dict(e.tile)}
        del rest["of"]
        lines.append("  " + json.dumps(of | rest))
    head = json.dumps({"format": FORMAT, "device": device_name, "about": about}, indent=1)
    body = ",\n".join(lines)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "entries": [\n{body}\n ]\n}}\n', encoding="utf-8")
