"""Draws the balance records of one or more runs: one self-contained HTML page, and its pictures as PNG files."""

from __future__ import annotations

import argparse
import sys

from megatron_global_lbl.command.extra import missing_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The records, and where the report goes."""
    parser.add_argument("directories", metavar="DIR", nargs="+", help="a directory given to --moe-lbl-metrics-dir")
    parser.add_argument("--out", metavar="DIR", help="where the report goes; default: DIR/report (of the first DIR)")


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is: 0, or 2 if a record cannot be read or the report not written."""
    if missing := missing_extra("numpy", "matplotlib", "jinja2"):
        print(f"megatron-lbl report: error: {missing}", file=sys.stderr)
        return 2
    from megatron_global_lbl.metrics.reader import RecordError
    from megatron_global_lbl.report.page import write_report
    from megatron_global_lbl.specialise.result import NotASpecialisation

    try:
        print(write_report(args.directories, args.out))
    except (RecordError, NotASpecialisation, OSError) as error:
        print(f"megatron-lbl report: error: {error}", file=sys.stderr)
        return 2
    return 0
