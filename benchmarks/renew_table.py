"""Which entries of a tuned table were measured by machine code that is still the same.

    git worktree add T/measured REV           # whose kernels the entries say they are of
    PYTHONPATH=T/measured python benchmarks/renew_table.py codes T/before.json
    python benchmarks/renew_table.py codes T/after.json
    python benchmarks/renew_table.py renew T/before.json T/after.json

An entry counts as long as its kernel's source is what was measured (config/tuned.py). A change that
leaves the compiled kernel as it was, instruction for instruction, leaves the measurement right:
`renew` gives such entries today's digest. Needs no GPU, but the NVRTC that they were measured with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from intlass_ops import config
from intlass_ops.bench.tuning import SCHEMES
from intlass_ops.config import tuned
from intlass_ops.cuda import compiler, cubin

DEVICE = "NVIDIA H200"


def entries() -> list[tuned.Entry]:
    return tuned.read(tuned.SHIPPED / tuned.file_name(DEVICE), DEVICE)


def name_of(entry: tuned.Entry) -> str:
    return json.dumps([*entry.of, entry.m])


def configurations() -> Iterator[tuple[str, config.Matmul]]:
    """What each entry asks for, of the types that the tuner gives its scheme."""
    schemes = {(s.x_kind, s.w_kind, s.group_size is None): s for s in SCHEMES.values()}
    h200 = config.device_of("sm_90a")
    for e in entries():
        arch, x, w, _, n, k, group_size = e.of
        scheme = schemes.get((x, w, group_size == k)) or schemes[x, w, group_size < k]
        shape = replace(scheme.shape(e.m, n, k), group_size=group_size)
        device = h200 if arch == h200.arch else config.without_wgmma(h200)
        for c in config.candidates(device, shape):
            if (c.entry, tuned.tile_of(c)) == (e.kernel, e.tile):
                yield name_of(e), c
                break


def codes() -> dict[str, str]:
    """A hash of each entry's machine code. sm_90's are compiled for sm_90a, as on an H200."""
    wanted = dict(configurations())

    def code(c: config.Matmul) -> str:
        return hashlib.sha256(cubin.code(compiler.compile_cubin(c, "sm_90a"))).hexdigest()

    distinct = list(dict.fromkeys(wanted.values()))
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(distinct, pool.map(code, distinct), strict=True))
    print(f"{len(wanted)} entries, {len(distinct)} configurations")
    return {name: hashes[c] for name, c in wanted.items()}


def renew(before: dict[str, str], after: dict[str, str]) -> None:
    path = tuned.SHIPPED / tuned.file_name(DEVICE)
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["about"]
    kept, counts = [], Counter[str]()
    for e in entries():
        name = name_of(e)
        same = name in before and before[name] == after.get(name)
        counts[f"{e.kernel}: {'the same' if same else 'another'}"] += 1
        today = tuned.source.digest(f"{e.kernel}.cu")
        kept.append(e._replace(source=today) if same else e)
    tuned.write(path, DEVICE, kept, about)
    print("\n".join(f"{count:5} {what}" for what, count in sorted(counts.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("codes").add_argument("out", type=Path)
    command = commands.add_parser("renew")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "codes":
        options.out.write_text(json.dumps(codes()))
    else:
        renew(*(json.loads(p.read_text()) for p in (options.before, options.after)))


if __name__ == "__main__":
    main()
