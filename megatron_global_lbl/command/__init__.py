"""The command `megatron-lbl`: one module per subcommand.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status. It is imported only to build
the parser, so it imports Megatron, torch and matplotlib inside `run`: `megatron-lbl --help` works without any of them.
"""

from __future__ import annotations

import argparse
import importlib

from megatron_global_lbl import __version__

PURPOSE = """Checks, patches and shows MoE load balancing over the global batch in Megatron-Core.

The loss itself is turned on in the training: --moe-lbl-scope global with `python -m megatron_global_lbl SCRIPT`, or
MEGATRON_GLOBAL_LBL="scope=global" in the environment."""
SUBCOMMANDS = {
    "doctor": "check this environment: is it ready, where does the plugin attach, which defects does upstream's loss have",
    "patch": "patch a Megatron-LM source tree of a pinned release, so that its own scripts take the flags",
    "watch": "show a run's balance in the terminal, live or once; the exit status says whether it is healthy",
    "report": "draw the balance of one or more runs on one HTML page",
    "specialise": "show and draw what a checkpoint's experts specialise in",
}
ALIASES = {"specialise": ["specialize"]}


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return f"{PURPOSE}\n\n{super().format_help()}"


def main(argv: list[str] | None = None) -> int:
    """Entry point of `megatron-lbl`; the exit status."""
    parser = _Parser(prog="megatron-lbl", usage="megatron-lbl COMMAND ...")
    parser.add_argument("--version", action="version", version=f"megatron_global_lbl {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, text in SUBCOMMANDS.items():
        module = importlib.import_module(f"megatron_global_lbl.command.{name}")
        command = subparsers.add_parser(
            name, aliases=ALIASES.get(name, []), prog=f"megatron-lbl {name}", help=text, description=module.__doc__
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)
