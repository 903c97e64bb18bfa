"""The command line: `python -m intlass_ops` (or `intlass`) with a subcommand.

Lives here: the list of subcommands, and a small one, `cache`. Not here: the demo (demo/),
benchmarks (bench/), the others (commands/). Exit codes: 0 done, 1 something did not hold, 2 could
not start (argparse's too).
"""

from __future__ import annotations

import argparse
import sys
import time

from . import __version__, arguments, bench, demo
from .commands import add_commands, tune, warmup
from .commands.info import info
from .cuda.cache import CubinCache, default_directory
from .errors import IntlassError


def main(words: list[str] | None = None) -> int:
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
        help="compile the CUDA kernels of your layers ahead",
        description=warmup.WARMUP,
        epilog=warmup.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    warmup.add_arguments(command)
    command.set_defaults(run=warmup.run)

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
        "--days",
        type=arguments.duration,
        help="prune: also what was written more than DAYS days ago",
    )
    command.set_defaults(run=cache)

    options = parser.parse_args(words)
    if options.command == "cache" and options.days is not None and options.action != "prune":
        parser.error(f"cache {options.action}: --days belongs to prune")
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except IntlassError as error:
        print(f"intlass {options.command}: {error}", file=sys.stderr)
        return 2
    return code


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
