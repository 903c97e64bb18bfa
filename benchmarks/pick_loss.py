"""What picks lose to the best measured tile on layers that no tuned table holds.

    python benchmarks/pick_loss.py

Reads benchmarks/results/h200-layers.json (an H200; `intlass tune --json`, its own field `command`)
and needs no GPU: for each problem, the time of `config.predicted`'s tile over that of the fastest
tile which the same GPU may choose. Geometric mean and worst, by scheme and number of tokens; picks
that were not timed, since they were no candidates then, are counted and left out.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from intlass_ops import config
from intlass_ops.bench import tuning

MEASURED = Path(__file__).parent / "results" / "h200-layers.json"
TOKENS = (range(1, 17), range(17, 301), range(301, 1 << 20))
H200 = config.device_of("sm_90a")
# By what each is called: the GPU that picks, and the kernels that it has not.
GPUS = {
    "H200": (H200, ()),
    "H200 without wgmma": (config.without_wgmma(H200), ("hopper",)),
    "as an A100 picks": (replace(H200, arch="sm_80"), ("hopper", "skinny_held")),
}


def main() -> None:
    problems = json.loads(MEASURED.read_text())["problems"]
    losses: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    unknown = 0
    for scheme, n, k, m, times in problems:
        shape = tuning.SCHEMES[scheme].shape(m, n, k)
        for name, (device, lacking) in GPUS.items():
            legal = {c: us for c, us in times.items() if c.split()[0] not in lacking}
            us = legal.get(str(config.predicted(device, shape)))
            if us is None:
                unknown += 1
                continue
            column = next(i for i, tokens in enumerate(TOKENS) if m in tokens)
            losses[name, scheme, column].append(us / min(legal.values()))
    print(f"{len(problems)} problems, {unknown} of {len(GPUS) * len(problems)} picks not timed")
    heads = [f"M = {tokens[0]}..{min(tokens[-1], 2048)}" for tokens in TOKENS]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name in GPUS:
        for scheme in dict.fromkeys(problem[0] for problem in problems):
            cells = [cell(losses[name, scheme, column]) for column in range(len(TOKENS))]
            print(f"| {name}, {scheme} | {' | '.join(cells)} |")


def cell(ratios: list[float]) -> str:
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    return f"{mean:.3f}, {max(ratios, default=math.nan):.2f}"


if __name__ == "__main__":
    main()
