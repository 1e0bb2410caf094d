"""Megatron's parser and its validation (`megatron.training.arguments`, 0.14 to 0.19): where the launcher adds the flags.

`validate_args` is imported by name elsewhere (by `initialize` until 0.17), so every module that holds it is told.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron, installed_version, require_supported

ARGUMENTS = "megatron.training.arguments"


@dataclass
class Use:
    """What a script did with Megatron's parser."""

    built: bool = False
    validated: bool = False


def install(add_arguments: Callable, activate: Callable, prepare: Callable | None = None) -> Use:
    """Add flags to Megatron's own parser, and turn on what they ask for once Megatron has validated its arguments.

    Lasts for the process: the launcher is its only caller.

    Args:
        add_arguments: takes the parser, gives it back with the flags.
        activate: takes the validated arguments.
        prepare: takes the arguments before Megatron validates them (those of a checkpoint included), and may change them.

    Returns:
        Says later whether the script has used the parser.

    Raises:
        UnsupportedMegatron: no Megatron-Core, an unsupported release, no training loop beside it, or a symbol missing.
    """
    require_supported()
    try:
        arguments = importlib.import_module(ARGUMENTS)
    except ModuleNotFoundError as error:
        raise UnsupportedMegatron(
            f"{error.name or ARGUMENTS} is missing beside Megatron-Core {installed_version()}: the launcher needs Megatron's "
            "training loop; allowed: a script in a Megatron-LM source tree, a tree on PYTHONPATH, or the wheel of "
            "megatron-core >= 0.17 (Python >= 3.12)"
        ) from error
    original_add = _symbol(arguments, "add_megatron_arguments")
    original_validate = _symbol(arguments, "validate_args")
    use = Use()

    @functools.wraps(original_add)
    def add_megatron_arguments(parser):
        use.built = True
        parser = original_add(parser)
        _mend_help(parser)
        return add_arguments(parser)

    @functools.wraps(original_validate)
    def validate_args(args, defaults={}):
        use.validated = True
        if prepare is not None:
            prepare(args)
        # Megatron returns the arguments; whoever drops its result has the same object.
        validated = original_validate(args, defaults)
        activate(args)
        return validated

    vars(arguments)["add_megatron_arguments"] = add_megatron_arguments
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.startswith("megatron."):
            if vars(module).get("validate_args") is original_validate:
                vars(module)["validate_args"] = validate_args
    return use


def data_parallel_size(args: Any) -> int:
    """Data-parallel ranks of Megatron's validated arguments: with sharded weights (`--tensor-parallel-num-weight-shards`, 0.19)
    `args.data_parallel_size` is the number of replicas, each of which is trained on that many micro-batches at a time."""
    return args.data_parallel_size * getattr(args, "gtp_weight_remat_size", 1)


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Escape what argparse cannot format: `--help` of Megatron 0.19 stops with a traceback at a stray percent sign (in
    `--moe-paged-stash-buffer-size-factor-cuda`), and would never get to the group of these flags."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, KeyError, TypeError):
            assert action.help is not None
            action.help = action.help.replace("%", "%%")


def _symbol(module: ModuleType, name: str):
    if not hasattr(module, name):
        raise UnsupportedMegatron(
            f"{module.__name__}.{name} is not where it should be in Megatron-Core {installed_version()}; supported: {SUPPORTED}"
        )
    return getattr(module, name)
