"""The command line: `python -m intlass_ops` (or `intlass`) with a subcommand.

Lives here: the list of subcommands, and the small ones: `warmup`, `cache`. Not here: the
demo (demo/), benchmarks (bench/), what reads and writes checkpoints (commands/). Exit codes: 0
done, 1 something did not hold, 2 could not start (argparse's too).
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from . import __version__, bench, config, demo
from .commands import add_commands, tune
from .commands.info import info
from .cuda import jit
from .cuda.cache import CubinCache, default_directory
from .cuda.jit import availability
from .errors import BackendUnavailableError, IntlassError, KernelCompileError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="intlass", description="INT4 and INT8 linear layers for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"intlass_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="a 4-bit language model writes text")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    command = commands.add_parser("bench", help="our kernels beside others, on this machine")
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)

    add_commands(commands)

    command = commands.add_parser(
        "tune",
        help="find the fastest kernel configurations for this GPU",
        description=tune.TUNE,
        epilog=tune.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_arguments(command)
    command.set_defaults(run=tune.run)

    command = commands.add_parser("info", help="what this machine has, lacks, and how to get it")
    command.set_defaults(run=info)

    command = commands.add_parser(
        "warmup",
        help="compile the shipped CUDA kernels ahead",
        description="Compile the shipped CUDA kernels into the kernel cache, so that no later "
        "process has to. Takes minutes; needs a GPU unless --arch names what to compile for.",
    )
    command.add_argument("--arch", help="sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120 (this GPU's)")
    command.set_defaults(run=warmup)

    command = commands.add_parser(
        "cache",
        help="list, verify or prune the compiled kernels",
        description="The compiled kernels of $INTLASS_CACHE_DIR, or ~/.cache/intlass_ops. Deleting "
        "them is safe at any time: what is missing or unsound is compiled again.",
    )
    command.add_argument(
        "action",
        choices=("list", "verify", "prune"),
        help="list: number and size; verify: name unsound entries, exit code 1 if there are any; "
        "prune: delete unsound entries, and with --days old ones",
    )
    command.add_argument(
        "--days", type=float, help="prune: also what was written more than DAYS days ago"
    )
    command.set_defaults(run=cache)

    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except IntlassError as error:
        print(f"intlass {options.command}: {error}", file=sys.stderr)
        return 2
    return code


def warmup(options: argparse.Namespace) -> int:
    """Compile what is shipped for one architecture."""
    arch = options.arch
    if arch is None:
        problem = availability().problem
        if problem is not None:
            raise BackendUnavailableError(
                f"{problem} (to compile without a GPU, name what for: --arch sm_90a)"
            )
        arch = jit.arch_of(torch.cuda.current_device())
    configs = [each for each, archs in config.shipped_configs() if arch in archs]
    if not configs:
        raise KernelCompileError(f"no kernels are shipped for {arch!r}")
    done = jit.warmup(configs, arch=arch)
    print(f"{arch}: {done.compiled} kernels compiled, {done.cached} were there before")
    return 0


def cache(options: argparse.Namespace) -> int:
    """List, verify or prune the compiled kernels."""
    kernels = CubinCache(default_directory())
    entries = kernels.entries()
    size = sum(entry.stat().st_size for entry in entries)
    print(f"{kernels.directory}: {len(entries)} kernels, {size / 1e6:.1f} MB")
    if options.action == "list":
        return 0
    unsound = [entry for entry in entries if not kernels.is_sound(entry)]
    if options.action == "verify":
        for entry in unsound:
            print(f"unsound: {entry.name}")
        return 1 if unsound else 0
    old = set(unsound)
    if options.days is not None:
        limit = time.time() - 86400 * options.days
        old |= {entry for entry in entries if entry.stat().st_mtime < limit}
    for entry in old:
        # The lock file stays: another process may hold it.
        entry.unlink(missing_ok=True)
    print(f"deleted {len(old)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
