"""The command `megatron-lbl`: one module per subcommand.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status. It is imported only to build
the parser, so it imports Megatron, torch and matplotlib inside `run`: `megatron-lbl --help` works without any of them.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from megatron_global_lbl import __version__

SUBCOMMANDS = {
    "doctor": "what this environment's Megatron-Core is, where the hook attaches, which upstream defects it has",
    "report": "draw the balance record of one or more runs: one HTML page, and its pictures",
    "watch": "look at the balance record of a run in the terminal, live or once; the exit status says whether it is healthy",
    "patch": "patch a Megatron-LM source tree of a pinned release, so that its own scripts take the flags",
    "specialise": "what a checkpoint's experts specialise in: shows and draws a measurement",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `megatron-lbl`; the exit status."""
    parser = argparse.ArgumentParser(prog="megatron-lbl", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"megatron_global_lbl {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="{" + ",".join(SUBCOMMANDS) + "}")
    modules = {}
    for name, text in SUBCOMMANDS.items():
        modules[name] = importlib.import_module(f"megatron_global_lbl.command.{name}")
        modules[name].add_arguments(subparsers.add_parser(name, help=text, description=modules[name].__doc__))
    args = parser.parse_args(argv)
    return modules[args.subcommand].run(args)


if __name__ == "__main__":
    sys.exit(main())
