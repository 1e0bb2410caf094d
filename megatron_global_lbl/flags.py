"""The flags `--moe-lbl-*` in Megatron's parser, and what they turn on once Megatron has validated its arguments.

Both functions are what a patched Megatron-LM and the launcher call. Every check that needs no model is made here, on every
rank, before training: a setting that cannot work ends the run with one line, which rank 0 prints.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from megatron_global_lbl import registry
from megatron_global_lbl.hook.versions import UnsupportedMegatron
from megatron_global_lbl.settings import ConfigError, Detail, Scope, Settings, did_you_mean, flag

FLAGS = [flag(name) for name in Settings.__dataclass_fields__]
NEAR = 0.8
"""Megatron's own flags are less like these."""
GROUP = "mixture-of-experts load-balancing loss"
_parsers: list[argparse.ArgumentParser] = []  # may get flags of others, too
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
    _parsers.append(parser)
    _name_near_misses(parser)
    yaml_file = _yaml_file()
    dropped = [] if yaml_file is None else [*_given(), *_keys_of(yaml_file)]
    if dropped:
        raise end_run(f"{dropped[0]} has no effect with --yaml-cfg, which replaces all arguments; remove one of the two")
    group = parser.add_argument_group(title=GROUP)
    group.add_argument(
        "--moe-lbl-scope",
        default="micro",
        metavar="{micro,dp,global}",
        help="Tokens over which the expert frequencies f of the load-balancing loss are counted: this micro-batch on this "
        "data-parallel rank (micro: Megatron's own loss, untouched), on all data-parallel ranks (dp), or the whole global "
        "batch (global). Default: micro.",
    )
    group.add_argument(
        "--moe-lbl-micro-coeff",
        metavar="A",
        default=0.0,
        help="Coefficient of a micro-batch load-balancing loss that is added, at most 1. Default: 0 (none).",
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
        "--moe-lbl-metrics",
        metavar="{brief,detailed,off}",
        help="The balance in Megatron's log, TensorBoard and W&B once per log interval, under moe_lbl/: mean and worst layer "
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
        _refuse_near_misses()
        settings = Settings.create(**{name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__})
        if settings == Settings(scope=Scope.MICRO) and not _given():
            return None
        if settings.scope is not Scope.MICRO or settings.observes:
            from megatron_global_lbl.hook import refusals  # here: `doctor` reads the flags without PyTorch

            _refuse_arguments(args, settings)
            if settings.metrics is None:
                settings = replace(settings, metrics=Detail.BRIEF)
            refusals.refuse_arguments(args, settings)
        known = registry.active()
        handle = registry.register(**{name: getattr(settings, name) for name in Settings.__dataclass_fields__})
    except (ConfigError, UnsupportedMegatron) as error:
        raise end_run(str(error)) from None
    for name in Settings.__dataclass_fields__:  # what later readers of the arguments see: checked values
        value = getattr(settings, name)
        setattr(args, f"moe_lbl_{name}", getattr(value, "value", value))
    if handle is not known and registry.is_first_rank():
        print("\n".join(f"> moe-lbl: {line}" for line in settings.in_words()), flush=True)
    return handle


def _name_near_misses(parser: argparse.ArgumentParser) -> None:
    """Let argparse's error name the flag that was meant: after a usage of hundreds of lines it is what is read."""
    original = parser.error

    def error(message: str) -> NoReturn:
        words = [word.partition("=")[0] for word in message.split()] if message.startswith("unrecognized") else []
        hints = [did_you_mean(word, FLAGS, cutoff=NEAR) for word in words if word.startswith("--")]
        if "--cpu" in words:
            hints.append("; --cpu belongs before the script")
        original(message + "".join(hints))

    parser.error = error  # type: ignore[method-assign]


def _refuse_near_misses() -> None:
    """
    Raises:
        ConfigError: a flag that is none of these, and none of Megatron's, in a script that parses only what it knows.
    """
    known = {*FLAGS, *(option for parser in _parsers for option in parser._option_string_actions)}
    for argument in sys.argv[1:]:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            hint = did_you_mean(name, FLAGS, cutoff=NEAR)
            if hint or name.startswith("--moe-lbl-"):
                raise ConfigError(f"{name}: unknown flag{hint or f'; allowed: {chr(44).join(FLAGS)}'}")


def _refuse_arguments(args: argparse.Namespace, settings: Settings) -> None:
    """
    Raises:
        ConfigError: coefficients that do not fit the types (a TypeError in Megatron), or a scope that would never begin.
    """
    kinds, coeffs = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    numbers = [len(value) if isinstance(value, (list, tuple)) else 1 for value in (kinds, coeffs)]
    if numbers[0] != numbers[1]:
        raise ConfigError(
            f"--moe-aux-loss-coeff has {numbers[1]} and --moe-router-load-balancing-type {numbers[0]} values; give one "
            "coefficient for each type, in that order"
        )
    last = getattr(args, "train_iters", None)
    if last is not None and settings.start_iter >= last > 0:
        raise ConfigError(
            f"{flag('start_iter')} {settings.start_iter}: the training ends before, with --train-iters {last}; allowed: less"
        )


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
    try:
        text = Path(yaml_file).read_text(encoding="utf-8", errors="replace")
    except OSError:  # Megatron says why
        return []
    return re.findall(r"^\s*(moe_lbl_\w+)\s*:", text, re.MULTILINE)


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


def balance_batch(settings: Settings, *, micro_batch_size: int, global_batch_size: int, data_parallel_size: int) -> list[str]:
    """The Balance BSZ of these sizes, in words: the sequences over which f would be counted."""
    micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)
    factors = [(micro_batch_size, "")]
    if settings.scope is Scope.GLOBAL:
        factors.insert(0, (micro_batches, "micro-batches"))
    if settings.scope is not Scope.MICRO:
        of_all = f" of {data_parallel_size}" if settings.group_size else ""
        factors.insert(0, (settings.group_size or data_parallel_size, f"dp ranks{of_all}"))
    total = math.prod(number for number, _ in factors)
    product = " x ".join(f"{number} {what}".strip() for number, what in factors)
    lines = [f"scope {settings.scope.value}; f would be counted over {total} sequences: {product}"]
    if settings.scope is not Scope.MICRO and total == micro_batch_size:
        lines.append(
            f"!! scope {settings.scope.value} equals micro here: f is counted over one micro-batch of one data-parallel rank; "
            f"{'scope global counts' if micro_batches > 1 else 'more micro-batches or ranks count'} over more"
        )
    return [*lines, *settings.in_words()[1:]]
