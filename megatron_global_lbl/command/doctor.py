"""Checks this environment: is it ready, where does the hook attach to its Megatron-Core, and, from a table, which of the known
defects the `global_aux_loss` of that release has. With the sizes of a training it also says over how many sequences f would be
counted (Balance BSZ). The last line says ready or not, and so does the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shlex
import site
import sys
import textwrap
from pathlib import Path

from megatron_global_lbl import __version__, flags, startup
from megatron_global_lbl.command import environment
from megatron_global_lbl.command.defects import DEFECTS, GLOBAL_AUX_LOSS_SINCE, MEASURED, as_release
from megatron_global_lbl.settings import ConfigError, Scope, Settings

SIZES = {name: "--" + name.replace("_", "-") for name in ("micro_batch_size", "global_batch_size", "data_parallel_size")}
WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megatron", metavar="DIR", help="a Megatron-LM source tree, instead of what Python would import")
    group = parser.add_argument_group("Balance BSZ", "all three sizes as in the launch script, and any of the flags below")
    group.add_argument("--micro-batch-size", type=int, metavar="N", help="sequences per micro-batch and data-parallel rank")
    group.add_argument("--global-batch-size", type=int, metavar="N", help="sequences per optimizer step")
    group.add_argument("--data-parallel-size", type=int, metavar="N", help="GPUs / (TP x CP x PP)")
    # The same help and the same checks as in a training. No scope given means all of them.
    flags.add_arguments(parser)
    parser.set_defaults(moe_lbl_scope=None)


def run(args: argparse.Namespace) -> int:
    """Print the findings: 0 if the plugin works here, 1 if not, 2 for arguments that cannot be."""
    try:
        balance = _balance_batch(args)
        if args.megatron is not None:
            if not (Path(args.megatron) / "megatron" / "core").is_dir():
                raise ConfigError(f"--megatron {args.megatron}: no megatron/core there; allowed: a Megatron-LM source tree")
            sys.path.insert(0, os.path.abspath(args.megatron))
    except ConfigError as error:
        print(f"megatron-lbl doctor: error: {error}", file=sys.stderr)
        return 2
    print("megatron-lbl doctor: importing PyTorch and Megatron-Core takes some seconds ...", file=sys.stderr, flush=True)
    problems = [*_environment(), *_variable()]
    if importlib.util.find_spec("torch") is not None:
        environment.import_lightly()
        problems += _megatron()
        print("\neffective Balance BSZ")
        for line in balance:
            _entry("", line)
    print(f"\nnot ready: {'; '.join(problems)}" if problems else "\nready: --moe-lbl-scope global works here")
    return 1 if problems else 0


def _entry(name: str, text: str) -> None:
    text = textwrap.fill(text, WIDTH, initial_indent=f"  {name:<20}", subsequent_indent=" " * 22, break_on_hyphens=False)
    print(text, flush=True)


def _environment() -> list[str]:
    """Prints, and gives what is wrong, as the others below."""
    print("this environment")
    _entry("megatron_global_lbl", f"{__version__}, in {Path(__file__).parents[1]}")
    _entry("Python", f"{platform.python_version()}, {sys.executable}")
    if importlib.util.find_spec("torch") is None:
        _entry("PyTorch", "NOT FOUND: training needs it; `megatron-lbl patch`, `report`, `watch` and `specialise` do not")
        return ["no PyTorch"]
    import torch

    from megatron_global_lbl.registry import loss_path_on_gpu

    _entry("PyTorch", torch.__version__)
    _entry("GPU", environment.gpus())
    _entry("loss on a GPU", loss_path_on_gpu())
    _entry("Transformer Engine", environment.transformer_engine())
    _entry("NVIDIA Apex", environment.apex())
    return []


def _variable() -> list[str]:
    """The variable, and whether anything reads it: an installation brings the file, a folder on PYTHONPATH does not."""
    text = os.environ.get(startup.VARIABLE)
    startup.stop()  # nothing that is imported here is a training
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    file = next((file for folder in folders if (file := Path(folder) / "megatron_global_lbl.pth").is_file()), None)
    reads = f"read by {file}" if file else "NOT READ, except by the launcher: the package is not installed with pip here"
    try:
        words = "; ".join(startup.parse(text).in_words()) if text else "not set"
    except ConfigError as error:
        _entry(startup.VARIABLE, str(error))
        return [f"{startup.VARIABLE} is wrong"]
    _entry(startup.VARIABLE, f"{shlex.quote(text)}: {words} ({reads})" if text else f"not set ({reads})")
    return [f"{startup.VARIABLE} is not read"] if text and not file else []


def _megatron() -> list[str]:
    from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron, installed_version, preview, require_supported

    print("\nMegatron-Core")
    try:
        with environment.quiet():
            version = installed_version().split("+")[0]  # Megatron appends the commit of whatever git folder it lies in
    except Exception as error:
        missing = isinstance(error, UnsupportedMegatron)
        _entry("version", f"NOT FOUND: {error}" if missing else f"it does not import: {type(error).__name__}: {error}")
        return ["no Megatron-Core" if missing else "Megatron-Core does not import"]
    folder = Path(str(importlib.import_module("megatron.core").__file__)).parent
    _entry("version", version)
    _entry("in", str(folder))
    try:
        release = require_supported()
    except UnsupportedMegatron:
        _entry("supported", f"NO; supported: {SUPPORTED}")
        return [f"Megatron-Core {version} is not supported"]
    _entry("supported", preview(version) or f"yes (supported: {SUPPORTED})")
    _entry("megatron.training", _training_loop(folder))
    problems = _hooks()
    _defects(release)
    return problems


def _training_loop(core: Path) -> str:
    """`megatron.training`, which only the launcher needs."""
    found = environment.folder_of("megatron.training")
    if found is None:
        return "not there: the launcher needs it (a Megatron-LM source tree, or the wheels from 0.17); `register` works without"
    if found.parent != core.parent:
        return f"NOT of this Megatron-Core: it is in {found}; the launcher would mix two releases. `register` works without"
    problem = environment.try_import("megatron.training.checkpointing") or environment.try_import("megatron.training.training")
    return f"there, but it does not import: {problem}" if problem else "there: the launcher works"


def _hooks() -> list[str]:
    from megatron_global_lbl import registered

    print("\nwhere the hook attaches")
    try:
        with environment.quiet(), registered(scope="global") as handle:
            paths = list(handle.hooked)
    except Exception as error:
        _entry("scope global", f"FAILS: {type(error).__name__}: {error}")
        return ["the hook does not attach"]
    for i, path in enumerate(paths):
        _entry("scope dp, global" if i == 0 else "", path)
    return []


def _defects(release: tuple[int, int]) -> None:
    print("\nupstream's global_aux_loss in this release (docs/upstream.md)")
    if release < as_release(GLOBAL_AUX_LOSS_SINCE):
        return _entry("none", f"this release has no global_aux_loss (it came with {GLOBAL_AUX_LOSS_SINCE})")
    for defect in DEFECTS:
        _entry(f"{defect.id} {'yes' if defect.is_in(release) else 'no'}", f"{defect.text} ({defect.span})")
    _entry(
        "from",
        f"the table of this plugin, measured on {', '.join(MEASURED)}; nothing was run now. "
        "`python benchmarks/upstream/run_all.py` in its source tree proves it on the installed Megatron-Core",
    )


def _balance_batch(args: argparse.Namespace) -> list[str]:
    """Raises ConfigError for sizes or flags that cannot be."""
    given = {name: getattr(args, name) for name in SIZES}
    values = {name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__}
    if values["scope"] is not None:
        Settings.create(**values)  # a flag that cannot be is said before a size that is missing
    missing = [SIZES[name] for name, value in given.items() if value is None]
    if len(missing) == len(SIZES) and values["scope"] is None:
        return [f"not asked for; give {', '.join(missing)} (and --moe-lbl-scope)"]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not given; the Balance BSZ needs all of {', '.join(SIZES.values())}")
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{SIZES[name]} {value}: not allowed; allowed: an integer >= 1")
    if args.global_batch_size % (per_round := args.micro_batch_size * args.data_parallel_size):
        allowed = f"allowed: a multiple of --micro-batch-size x --data-parallel-size = {per_round}"
        raise ConfigError(f"--global-batch-size {args.global_batch_size}: not allowed; {allowed}")
    lines = []
    for scope in Scope if values["scope"] is None else [values["scope"]]:
        settings = Settings.create(**{**values, "scope": scope})
        settings.require_group_size_fits(args.data_parallel_size)
        lines += flags.balance_batch(settings, **given)
    return lines
