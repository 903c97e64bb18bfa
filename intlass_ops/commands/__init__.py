"""The larger commands of `intlass`: one file each, and what needs transformers only when run.

Here: their command lines. Each `run_*` returns an exit code: 0 done, 1 something did not hold, 2
could not start.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .. import arguments
from ..calibrated import METHODS
from ..demo import quiet
from ..errors import IntlassError
from ..integrations.schemes import SCHEMES

QUANTIZE = """\
Quantise a transformers checkpoint and write it in our layout (safetensors and a config.json that
says how each layer is stored). The result is read back by

    intlass_ops.load_pretrained(DST)
    AutoModelForCausalLM.from_pretrained(DST)    after: from intlass_ops import IntlassConfig

Embeddings, norms and the output head stay as they are. rtn, mse and hqq quantise each weight as it
is read, so memory stays near the size of the result; gptq and awq need the whole model and text.
"""
EXAMPLES = """\
examples:
  intlass quantize ./llama ./llama-int4                      groups of 128, round to nearest
  intlass quantize ./llama ./llama-int4 --method mse --group-size 64
  intlass quantize ./llama ./llama-int4 --method gptq --calibration my.txt --device cuda
  intlass quantize ./llama ./llama-int8 --scheme w8a8
"""
CONVERT = """\
Rewrite a GPTQ, AWQ or compressed-tensors checkpoint directory, or a GGUF file, in our
layout. Codes, scales and zero points are kept as they are: nothing is quantised again.
"""
EXPLAIN = """\
Load a checkpoint (any that `intlass_ops.load_pretrained` reads), run some tokens through it and
list which kernel multiplied which layer, and why that one. Exit code 1 if a layer fell back to a
slow path.
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`quantize`, `convert` and `explain`."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "quantize", help="a checkpoint directory to INT4 or INT8", description=QUANTIZE,
        epilog=EXAMPLES, formatter_class=raw,
    )  # fmt: skip
    command.add_argument("src", metavar="SRC", help="directory with config.json and safetensors")
    command.add_argument("dst", metavar="DST", help="directory to write, new or empty")
    command.add_argument(
        "--scheme", choices=SCHEMES, default="w4a16",
        help="bits of weights and activations (%(default)s); a16: activations stay floating point",
    )  # fmt: skip
    command.add_argument(
        "--group-size", type=int, default=128, metavar="G",
        help="INT4 weights along K that share a scale, a multiple of 16 (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--method", choices=METHODS, default="rtn",
        help="rtn: nearest; mse: scales of least squared error; hqq: floating zero points; gptq: "
        "errors fed back through the statistics of real inputs, best and slowest; awq: inputs of "
        "large channels rounded more finely (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--symmetric", action="store_true", help="w4a16 without zero points: smaller, less exact"
    )
    command.add_argument(
        "--keep", action="append", default=[], metavar="MODULE",
        help="leave this module as it is (may be given several times)",
    )  # fmt: skip
    command.add_argument(
        "--calibration", metavar="FILE",
        help="gptq, awq: plain text like what the model will see (default: Python's documentation)",
    )  # fmt: skip
    command.add_argument(
        "--samples", type=arguments.positive, default=64,
        help="gptq, awq: windows of text (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--window", type=arguments.positive, default=512,
        help="gptq, awq: tokens of each (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--device", type=arguments.device, default="cpu", help="where to compute (%(default)s)"
    )
    command.set_defaults(run=run_quantize)

    command = commands.add_parser(
        "convert", help="another library's quantised checkpoint to our layout",
        description=CONVERT, formatter_class=raw,
    )  # fmt: skip
    command.add_argument("src", metavar="SRC", help="checkpoint directory or GGUF file")
    command.add_argument("dst", metavar="DST", help="directory to write, new or empty")
    command.add_argument(
        "--checkpoint-format", choices=("gptq", "gptq_v2"),
        help="for GPTQ files that contradict themselves about their zero points",
    )  # fmt: skip
    command.set_defaults(run=run_convert)

    command = commands.add_parser(
        "explain", help="which kernel runs which layer of a checkpoint, and why",
        description=EXPLAIN, formatter_class=raw,
    )  # fmt: skip
    command.add_argument("src", metavar="SRC", help="checkpoint directory or GGUF file")
    command.add_argument(
        "--tokens", type=arguments.positive, default=1, help="M of the products (%(default)s)"
    )
    command.add_argument(
        "--device", type=arguments.device, default="cpu", help="cpu, cuda, cuda:1 (%(default)s)"
    )
    command.set_defaults(run=run_explain)


def run_quantize(options: argparse.Namespace) -> int:
    return _run("quantize", options)


def run_convert(options: argparse.Namespace) -> int:
    return _run("convert", options)


def run_explain(options: argparse.Namespace) -> int:
    return _run("explain", options)


def _run(name: str, options: argparse.Namespace) -> int:
    quiet()
    try:
        module = importlib.import_module(".checkpoints", __name__)
    except ImportError as error:
        print(
            f"intlass {name} needs {error.name}: pip install 'intlass-ops[demo]'", file=sys.stderr
        )
        return 2
    try:
        code: int = getattr(module, name)(options)
    except (OSError, ValueError, IntlassError) as error:
        print(f"intlass {name}: {error}", file=sys.stderr)
        return 2
    return code
