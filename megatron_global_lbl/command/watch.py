"""Looks at the balance record of a running training in the terminal: every layer's latest values, their trend, the alarms.

Exit status: 0 no alarm, 1 an alarm, 2 there is no record, or it cannot be read.
"""

from __future__ import annotations

import argparse
import math
import sys

from megatron_global_lbl.command.extra import missing_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The record, and how often it is looked at."""
    text = "a directory given to --moe-lbl-metrics-dir, or a run's folder that holds it as 'balance'"
    parser.add_argument("directory", metavar="DIR", help=text)
    parser.add_argument("--once", action="store_true", help="print it once and exit, for scripts")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="how often to look; default: 10")
    text = "how long to wait for a record that is not there yet; default: until Ctrl-C, with --once 0"
    parser.add_argument("--wait", type=float, metavar="SECONDS", help=text)


def run(args: argparse.Namespace) -> int:
    """Show the record; the exit status says whether it is healthy."""
    from megatron_global_lbl.metrics.record import printable

    problem = missing_extra("numpy", "rich")
    for name, value, least in (("--every", args.every, "above 0"), ("--wait", args.wait, "0 or more")):
        if value is not None and (not value >= 0 or name == "--every" and value == 0):
            problem = f"{name} {value:g}: not allowed; allowed: seconds, {least}"
    if problem:
        print(f"megatron-lbl watch: error: {problem}", file=sys.stderr)
        return 2
    from megatron_global_lbl.metrics import RecordError
    from megatron_global_lbl.report import watch

    wait = args.wait if args.wait is not None else 0.0 if args.once else math.inf
    try:
        return watch.once(args.directory, wait) if args.once else watch.live(args.directory, args.every, wait)
    except (RecordError, OSError) as error:
        print(printable(f"megatron-lbl watch: error: {error}"), file=sys.stderr)
        return 2
