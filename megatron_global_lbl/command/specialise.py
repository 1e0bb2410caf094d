"""Shows what a checkpoint's experts specialise in, from the specialisation.json of a measurement, and draws its pictures.
The measurement runs the training's own script: torchrun ... -m megatron_global_lbl.specialise SCRIPT ARGS --load DIR
--moe-lbl-domains NAME=DATA ... --moe-lbl-metrics-dir DIR (docs/specialisation.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_global_lbl.command.extra import missing_extra
from megatron_global_lbl.command.files import reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which measurements, and whether to draw."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="DIR", help="a directory with specialisation.json, or such a file"
    )
    parser.add_argument("--no-pictures", action="store_true", help="print only")


def run(args: argparse.Namespace) -> int:
    """Print and draw: 0, or 2 for a file that cannot be used or written."""
    if missing := missing_extra("numpy", *([] if args.no_pictures else ["matplotlib"])):
        print(f"megatron-lbl specialise: error: {missing}", file=sys.stderr)
        return 2
    from megatron_global_lbl.specialise.result import NotASpecialisation, read
    from megatron_global_lbl.specialise.summary import lines

    try:
        for path in args.paths:
            result = read(path)
            print("\n".join([f"{path}:", *lines(result)]))
            if not args.no_pictures:
                from megatron_global_lbl.report import experts
                from megatron_global_lbl.report.paper import write_pngs

                for file in write_pngs(experts.charts([("", result)]), path if path.is_dir() else path.parent):
                    print(f"written to {file}")
    except (NotASpecialisation, OSError) as error:
        print(f"megatron-lbl specialise: error: {reason(error)}", file=sys.stderr)
        return 2
    return 0
