"""How much of what W4A4 costs training wins back: python benchmarks/qat_recovery.py

A transformer of two blocks learns to continue English, Python's documentation, byte by byte, in
floating point. Its linears (all but the head) are then made W4A4, and trained on as they are for a
fifth of the steps; for comparison the floating model is trained on for as long. The share won back
is (untrained - trained) / (untrained - floating), with losses in nats a byte on text not trained
on and the floating model that was trained as long. A CPU takes two minutes. Writes --json.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import time
from typing import Any

import torch
from torch import Tensor, nn

import intlass_ops as ia
from intlass_ops import provenance

LENGTH, WIDTH, HEADS = 64, 128, 4
CONFIGS = {
    "largest magnitudes": ia.QATConfig("w4a4", None, "abs_max"),
    "rotated, quest": ia.QATConfig("w4a4", 32, "quest"),
    "rotated, quest, INT8 backward": ia.QATConfig("w4a4", 32, "quest", "int8"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for t in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.RMSNorm(WIDTH, eps=1e-5))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(ids) + self.place.weight))
        return logits


def not_the_head(_: nn.Module, path: str) -> bool:
    return path != "head"


class Text:
    """Windows of text; the last tenth is never trained on."""

    def __init__(self, device: str) -> None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[key] for key in sorted(topics)).encode()
        self.ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
        self.end = len(text) * 9 // 10
        self.random = torch.Generator().manual_seed(0)

    def windows(self, starts: Tensor) -> Tensor:
        return self.ids[starts[:, None].to(self.ids.device) + torch.arange(LENGTH + 1).to(self.ids)]

    def train(self, count: int) -> Tensor:
        high = self.end - LENGTH - 1
        return self.windows(torch.randint(0, high, (count,), generator=self.random))

    def held_out(self) -> Tensor:
        return self.windows(torch.arange(self.end, len(self.ids) - LENGTH - 1, LENGTH)[:512])


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, text: Text, steps: int, rate: float) -> None:
    """Adam, its rate falling to nothing."""
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimiser.zero_grad()
        loss_of(model, text.train(32)).backward()
        optimiser.step()


@torch.no_grad()
def judge(model: nn.Module, text: Text) -> float:
    return float(loss_of(model, text.held_out()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300, help="in floating point")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    text, more = Text(args.device), args.steps // 5
    model = Model().to(args.device)
    train(model, text, args.steps, 3e-3)
    on = copy.deepcopy(model)
    train(on, text, more, 1e-3)
    report: dict[str, Any] = {
        "environment": provenance.environment(torch.device(args.device)),
        "steps": args.steps,
        "steps_more": more,
        "float": judge(model, text),
        "float_trained_on": judge(on, text),
        "rows": [],
    }
    print(f"floating point {report['float']:.4f}, on {report['float_trained_on']:.4f}", flush=True)
    for name, config in CONFIGS.items():
        layers = copy.deepcopy(model)
        ia.quantize_(layers, config, filter_fn=not_the_head)
        before = judge(layers, text)
        train(layers, text, more, 1e-3)
        ia.convert_(layers)  # what inference runs
        after = judge(layers, text)
        share = (before - after) / (before - report["float_trained_on"])
        row = {"name": name, "untrained": before, "trained": after, "won_back": share}
        report["rows"].append(row)
        print(f"W4A4 {before:.4f}, trained {after:.4f}, won back {share:.0%}: {name}", flush=True)
    report["seconds"] = round(time.perf_counter() - start, 1)
    if args.json:
        provenance.write_json(args.json, report)


if __name__ == "__main__":
    main()
