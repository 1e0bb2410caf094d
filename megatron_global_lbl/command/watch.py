"""Looks at the balance record of a running training in the terminal: every layer's latest values, their trend, the alarms.

Exit status: 0 no alarm, 1 an alarm, 2 the record cannot be read.
"""

from __future__ import annotations

import argparse
import sys

from megatron_global_lbl.command.extra import missing_extra

FILE_WIDTH = 160  # of what goes to a file or a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The record, and how often it is looked at."""
    parser.add_argument("directory", metavar="DIR", help="a directory given to --moe-lbl-metrics-dir")
    parser.add_argument("--once", action="store_true", help="print it once and exit, for scripts")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="how often to look; default: 10")


def run(args: argparse.Namespace) -> int:
    """Show the record; the exit status says whether it is healthy."""
    problem = missing_extra("numpy", "rich")
    if problem is None and not args.every > 0:
        problem = f"--every {args.every:g}: not allowed; allowed: seconds above 0"
    if problem:
        print(f"megatron-lbl watch: error: {problem}", file=sys.stderr)
        return 2
    from rich.console import Console

    from megatron_global_lbl.metrics.reader import RecordError
    from megatron_global_lbl.report import watch

    try:
        if args.once:
            return watch.once(args.directory, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
        return watch.live(args.directory, Console(), args.every)
    except (RecordError, OSError) as error:
        print(f"megatron-lbl watch: error: {error}", file=sys.stderr)
        return 2
