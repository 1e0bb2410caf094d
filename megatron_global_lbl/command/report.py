"""Draws the balance records of one or more runs: one self-contained HTML page."""

from __future__ import annotations

import argparse
import sys

from megatron_global_lbl.command.extra import missing_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The records, and where the report goes."""
    text = "a directory given to --moe-lbl-metrics-dir, or a run's folder that holds it as 'balance'"
    parser.add_argument("directories", metavar="DIR", nargs="+", help=text)
    parser.add_argument("--out", metavar="DIR", help="where the report goes; default: DIR/report (of the first DIR)")
    parser.add_argument("--png", action="store_true", help="write every chart as a PNG beside the page, too (Matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is: 0, or 2 if a record cannot be read or the report not written."""
    from megatron_global_lbl.metrics.record import printable

    if missing := missing_extra("numpy", "plotly", "jinja2", *(["matplotlib"] if args.png else [])):
        print(f"megatron-lbl report: error: {missing}", file=sys.stderr)
        return 2
    from megatron_global_lbl.metrics import RecordError
    from megatron_global_lbl.report.page import write_report
    from megatron_global_lbl.specialise.result import NotASpecialisation

    try:
        print(printable(write_report(args.directories, args.out, png=args.png)))
    except (RecordError, NotASpecialisation, OSError) as error:
        print(printable(f"megatron-lbl report: error: {error}"), file=sys.stderr)
        return 2
    return 0
