"""Types of the arguments that several commands of `intlass` take, for argparse.

Each raises ArgumentTypeError, which argparse prints behind the argument's name; the exit code is 2.
"""

from __future__ import annotations

import argparse

import torch


def device(text: str) -> str:
    """``--device``: the CPU, or a GPU that torch sees."""
    try:
        named = torch.device(text)
    except RuntimeError:
        named = torch.device("meta")
    if named.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:1, ...")
    count = torch.cuda.device_count()
    if named.type == "cuda" and (named.index or 0) >= count:
        here = "no GPU here (see intlass info)" if not count else f"only {count} GPUs here"
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {here}")
    return text


def positive(text: str) -> int:
    """A number of things, one at least."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def duration(text: str) -> float:
    """Days, minutes or seconds, nought included."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time")
    return value
