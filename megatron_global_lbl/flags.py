"""The flags `--moe-lbl-*` in Megatron's parser, and what they turn on once Megatron has validated its arguments.

Both functions are what a patched Megatron-LM and the launcher call. Every check that needs no model is made here, on every
rank, before training: a setting that cannot work ends the run with one line, which rank 0 prints.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from megatron_global_lbl import registry
from megatron_global_lbl.hook.arguments import data_parallel_size
from megatron_global_lbl.hook.versions import UnsupportedMegatron
from megatron_global_lbl.settings import DEFAULT_WINDOW_STEPS, ConfigError, Detail, Scope, Settings

GROUP = "mixture-of-experts load-balancing loss"
# How much later than the others a rank may come to the flags: it imports the same files, from a disk that is shared.
START_SKEW_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group of flags to Megatron's parser. Values are checked in `activate`, where one line can say what is wrong.

    A parser that has them already is left as it is: the launcher may run a patched Megatron-LM.

    Raises:
        SystemExit: after one line on stderr, if Megatron would drop what it parses.
    """
    if "--moe-lbl-scope" in parser._option_string_actions:
        return parser
    yaml_file = _yaml_file()
    dropped = [] if yaml_file is None else [*_given(), *_keys_of(yaml_file)]
    if dropped:
        raise end_run(f"{dropped[0]} has no effect with --yaml-cfg, which replaces all arguments; allowed: without it")
    group = parser.add_argument_group(title=GROUP)
    group.add_argument(
        "--moe-lbl-scope",
        default="micro",
        metavar="{micro,dp,global,window}",
        help="Tokens over which the expert frequencies f of the load-balancing loss are counted: this micro-batch on this "
        "data-parallel rank (micro: Megatron's own loss, untouched), on all data-parallel ranks (dp), the whole global batch "
        "(global), or the last completed steps (window: experimental, many steps trained worse than global). Default: micro.",
    )
    group.add_argument(
        "--moe-lbl-window-steps",
        metavar="W",
        help=f"Optimizer steps that scope window counts over, >= 1. Default: {DEFAULT_WINDOW_STEPS}.",
    )
    group.add_argument(
        "--moe-lbl-micro-coeff",
        metavar="A",
        default=0.0,
        help="Coefficient of a micro-batch load-balancing loss that is added. Default: 0 (none).",
    )
    group.add_argument(
        "--moe-lbl-start-iter",
        metavar="N",
        default=0,
        help="Scope micro before iteration N, the chosen scope from then on. Default: 0.",
    )
    group.add_argument(
        "--moe-lbl-group-size",
        metavar="N",
        help="Count over groups of N data-parallel ranks; must divide their number. Default: all.",
    )
    group.add_argument(
        "--moe-lbl-sync",
        metavar="{overlap,blocking}",
        help="Hide the reduction of the counts behind compute, or wait for it on the spot. Default: overlap.",
    )
    group.add_argument(
        "--moe-lbl-metrics",
        metavar="{brief,detailed,off}",
        help="The balance in Megatron's log, TensorBoard and W&B once per log interval, under moe-lbl/: mean and worst layer "
        "(brief), or more measures and percentiles over layers (detailed). Default: brief, but off with scope micro and no "
        "--moe-lbl-metrics-dir, and with CUDA graphs.",
    )
    group.add_argument(
        "--moe-lbl-metrics-dir",
        metavar="DIR",
        help="Write the balance of every MoE layer, a record per log interval, to files in DIR (any scope, also without an "
        "auxiliary loss). Default: off.",
    )
    return parser


def activate(args: argparse.Namespace) -> registry.Handle | None:
    """Check the flags against Megatron's validated arguments, say on rank 0 what is on, and register the hook.

    Nothing happens in a run that does not use the flags: a patched Megatron-LM serves dense models and scripts that call
    `register` themselves, too. The second call in a process (the launcher on a patched tree) changes and says nothing.

    Raises:
        SystemExit: after one line on stderr, if anything about them cannot work.
    """
    try:
        settings = Settings.create(
            **{name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__},
        )
        if settings == Settings(scope=Scope.MICRO) and not _given():
            return None
        if settings.scope is not Scope.MICRO or settings.observes:
            from megatron_global_lbl.hook import compatibility, refusals  # here: `doctor` reads the flags without PyTorch

            if settings.metrics is None and compatibility.cuda_graphs(args) == "none":
                settings = replace(settings, metrics=Detail.BRIEF)
            refusals.refuse_arguments(args, settings)
        known = registry.active()
        handle = registry.register(**{name: getattr(settings, name) for name in Settings.__dataclass_fields__})
    except (ConfigError, UnsupportedMegatron) as error:
        raise end_run(str(error)) from None
    for name in Settings.__dataclass_fields__:  # what later readers of the arguments see: checked values
        value = getattr(settings, name)
        setattr(args, f"moe_lbl_{name}", getattr(value, "value", value))
    if handle is not known and int(os.environ.get("RANK", "0")) == 0:
        for line in describe(args, settings):
            print(f"> moe-lbl: {line}", flush=True)
    return handle


def _given() -> list[str]:
    """The flags on the command line, which Megatron's parser always reads."""
    return [argument for argument in sys.argv if argument.startswith("--moe-lbl-")]


def _yaml_file() -> str | None:
    """The file of Megatron's `--yaml-cfg`, if it is given."""
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""]):
        if argument == "--yaml-cfg" or argument.startswith("--yaml-cfg="):
            return argument.partition("=")[2] or following
    return None


def _keys_of(yaml_file: str) -> list[str]:
    """Keys of a YAML file that look like the flags, at any depth."""
    if not Path(yaml_file).is_file():  # Megatron says that it is missing
        return []
    return re.findall(r"^\s*(moe_lbl_\w+)\s*:", Path(yaml_file).read_text(encoding="utf-8"), re.MULTILINE)


def end_run(error: str) -> SystemExit:
    """Print the error, if this rank is the one to do it; the exit to raise.

    Rank 0 prints and exits at once, upon which torchrun ends the ranks of its node. The others find the same error but may be
    faster, and the first exit ends them all: so they wait for rank 0, and print if nobody has ended them meanwhile. That is
    the case on other nodes, where the first rank prints before the rest, and if the error is not rank 0's.
    """
    waits = (int(os.environ.get("RANK", "0")) > 0) + (int(os.environ.get("LOCAL_RANK", "0")) > 0)
    time.sleep(waits * START_SKEW_SECONDS)
    print(f"megatron_global_lbl: error: {error}", file=sys.stderr, flush=True)
    return SystemExit(1)


def describe(args: argparse.Namespace, settings: Settings) -> list[str]:
    """The effective setting in words: scope, Balance BSZ in sequences, and what changes by it."""
    all_ranks = data_parallel_size(args)
    ranks = settings.group_size or all_ranks
    micro_batches = args.global_batch_size // (args.micro_batch_size * all_ranks)
    factors = [(args.micro_batch_size, "")]
    if settings.scope in (Scope.GLOBAL, Scope.WINDOW):
        factors.insert(0, (micro_batches, "micro-batches"))
    if settings.scope is not Scope.MICRO:
        of_all = f" of {all_ranks}" if settings.group_size else ""
        factors.insert(0, (ranks, f"dp ranks{of_all}"))
    if settings.window_steps:
        factors.append((settings.window_steps, "steps" if settings.window_steps > 1 else "step"))
    total = 1
    for number, _ in factors:
        total *= number
    product = " x ".join(f"{number} {what}".strip() for number, what in factors)
    lines = [f"scope {settings.scope.value}; f counted over {total} sequences: {product}"]
    if settings.scope is Scope.MICRO:
        lines[0] += " (Megatron's own loss, untouched)"
    elif settings.scope is not Scope.WINDOW and total == args.micro_batch_size:
        lines.append(
            f"!! scope {settings.scope.value} equals micro here: f is counted over one micro-batch of one data-parallel rank; "
            f"{'scope global counts' if micro_batches > 1 else 'more micro-batches or ranks count'} over more"
        )
    if getattr(args, "rampup_batch_size", None):
        lines.append("the number is for the full batch; it is smaller while --rampup-batch-size ramps up")
    if settings.start_iter:
        lines.append(f"scope micro before iteration {settings.start_iter}")
    if settings.micro_coeff:
        lines.append(f"micro-batch loss added with coefficient {settings.micro_coeff:g}")
    if settings.metrics_dir:
        lines.append(f"balance record in {settings.metrics_dir}")
    return lines
