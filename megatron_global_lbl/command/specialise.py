"""Shows what a checkpoint's experts specialise in, from the specialisation.json of a measurement, and draws its pictures.
The measurement runs the training's own script: torchrun ... -m megatron_global_lbl.specialise SCRIPT ARGS --load DIR
--moe-lbl-domains NAME=DATA ... --moe-lbl-metrics-dir DIR (docs/specialisation.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which measurements, and where the pictures go."""
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a directory with specialisation.json, or the file"
    )
    parser.add_argument("--no-pictures", action="store_true", help="print only")


def run(args: argparse.Namespace) -> int:
    """Print and draw: 0, or 2 for a file that cannot be used."""
    from megatron_global_lbl.specialise.result import NotASpecialisation, read
    from megatron_global_lbl.specialise.summary import lines

    for path in args.directories:
        try:
            result = read(path)
        except NotASpecialisation as error:
            print(f"megatron-lbl specialise: error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"megatron-lbl specialise: error: {path}: {error.strerror}", file=sys.stderr)
            return 2
        print("\n".join([f"{path}:", *lines(result)]))
        if args.no_pictures:
            continue
        if importlib.util.find_spec("matplotlib") is None:
            print(
                "megatron-lbl specialise: error: pictures need matplotlib (pip install matplotlib), or --no-pictures",
                file=sys.stderr,
            )
            return 2
        from megatron_global_lbl.specialise.pictures import draw

        for picture in draw(result, path if path.is_dir() else path.parent):
            print(f"written to {picture}")
    return 0
