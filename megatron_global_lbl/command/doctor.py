"""Says what the Megatron-Core of this environment is, where the hook attaches to it, and which of the known defects the
`global_aux_loss` of its release has, from a table. With the sizes of a training it also says over how many sequences f would
be counted (Balance BSZ).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
import textwrap
from pathlib import Path

from megatron_global_lbl import flags
from megatron_global_lbl.command import environment
from megatron_global_lbl.command.defects import DEFECTS, GLOBAL_AUX_LOSS_SINCE, MEASURED, as_release
from megatron_global_lbl.settings import ConfigError, Scope, Settings

SIZES = ("micro_batch_size", "global_batch_size", "data_parallel_size")
WIDTH = 120

Section = tuple[str, list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Another Megatron to look at, and the sizes of a training."""
    parser.add_argument(
        "--megatron", metavar="DIR", help="a Megatron-LM source tree to look at instead of what Python would import"
    )
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
            _look_at(Path(args.megatron))
    except ConfigError as error:
        print(f"megatron-lbl doctor: error: {error}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("torch") is None:
        print("\n".join(["this environment", *_environment()]))
        return 1
    sections, works = _megatron()
    sections.insert(0, ("this environment", _environment()))
    sections.append(("effective Balance BSZ", balance))
    print("\n\n".join("\n".join([title, *lines]) for title, lines in sections))
    return 0 if works else 1


def _entry(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {name:<20}", subsequent_indent=" " * 22, break_on_hyphens=False) or [
        f"  {name}"
    ]


def _environment() -> list[str]:
    from megatron_global_lbl import __version__

    lines = [
        *_entry("megatron_global_lbl", f"{__version__}, in {Path(__file__).parents[1]}"),
        *_entry("Python", f"{platform.python_version()}, {sys.executable}"),
    ]
    if importlib.util.find_spec("torch") is None:
        return [
            *lines,
            *_entry("PyTorch", "NOT FOUND: training needs it; `megatron-lbl patch`, `report`, `watch` and `specialise` do not"),
        ]
    import torch

    from megatron_global_lbl.registry import loss_path_on_gpu

    return [
        *lines,
        *_entry("PyTorch", torch.__version__),
        *_entry("GPU", environment.gpus()),
        *_entry("loss on a GPU", loss_path_on_gpu()),
        *_entry("Transformer Engine", environment.transformer_engine()),
        *_entry("NVIDIA Apex", environment.apex()),
    ]


def _look_at(tree: Path) -> None:
    if not (tree / "megatron" / "core").is_dir():
        raise ConfigError(f"--megatron {tree}: no megatron/core there; allowed: the folder of a Megatron-LM source tree")
    sys.path.insert(0, str(tree.resolve()))


def _megatron() -> tuple[list[Section], bool]:
    """What Megatron-Core is, where the hook attaches, and what upstream's loss has; whether the hook does attach."""
    from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron, installed_version, preview, require_supported

    title = "Megatron-Core"
    try:
        with environment.quiet():
            version = installed_version().split("+")[0]  # Megatron appends the commit of whatever git folder it lies in
    except UnsupportedMegatron as error:
        return [(title, _entry("version", f"NOT FOUND: {error}"))], False
    except Exception as error:
        return [(title, _entry("version", f"it does not import: {type(error).__name__}: {error}"))], False
    folder = Path(str(importlib.import_module("megatron.core").__file__)).parent
    lines = [*_entry("version", version), *_entry("in", str(folder))]
    try:
        release = require_supported()
    except UnsupportedMegatron:
        return [(title, [*lines, *_entry("supported", f"NO; supported: {SUPPORTED}")])], False
    lines += _entry("supported", preview(version) or f"yes (supported: {SUPPORTED})")
    lines += _entry("megatron.training", _training_loop(folder))
    hooks, attached = _hooks()
    defects = ("upstream's global_aux_loss in this release (docs/upstream.md)", _defects(release))
    return [(title, lines), ("where the hook attaches", hooks), defects], attached


def _training_loop(core: Path) -> str:
    """`megatron.training`, which the launcher needs, in words."""
    found = environment.folder_of("megatron.training")
    if found is None:
        return "not there: the launcher needs it (a Megatron-LM source tree, or the wheels from 0.17); `register` works without"
    if found.parent != core.parent:
        return f"NOT of this Megatron-Core: it is in {found}; the launcher would mix two releases. `register` works without"
    problem = environment.try_import("megatron.training.checkpointing") or environment.try_import("megatron.training.training")
    return f"there, but it does not import: {problem}" if problem else "there: the launcher works"


def _hooks() -> tuple[list[str], bool]:
    """Register, read what is replaced, undo: for the scopes that attach to different symbols."""
    from megatron_global_lbl import registered

    lines: list[str] = []
    known: list[str] = []
    for settings in ({"scope": "global"}, {"scope": "window"}):
        try:
            with environment.quiet(), registered(**settings) as handle:
                paths = list(handle.hooked)
        except Exception as error:
            lines += _entry(f"scope {settings['scope']}", f"FAILS: {type(error).__name__}: {error}")
            return lines, False
        new = [path for path in paths if path not in known]
        same = f"the same {len(known)} places" + (", and" if new else "") if known else ""
        name = "dp, global" if settings["scope"] == "global" else "window"
        for i, text in enumerate([same, *new] if same else new):
            lines += _entry(f"scope {name}" if i == 0 else "", text)
        known = paths
    lines += _entry("scope micro", "nowhere (Megatron as it is), unless --moe-lbl-metrics or -metrics-dir asks for more")
    return lines, True


def _defects(release: tuple[int, int]) -> list[str]:
    """Which of the known defects the release has, from the table; nothing is run."""
    if release < as_release(GLOBAL_AUX_LOSS_SINCE):
        return _entry("none", f"this release has no global_aux_loss (it came with {GLOBAL_AUX_LOSS_SINCE})")
    lines = []
    for defect in DEFECTS:
        lines += _entry(f"{defect.id} {'yes' if defect.is_in(release) else 'no'}", f"{defect.text} ({defect.span})")
    source = (
        f"the table of this plugin, measured on {', '.join(MEASURED)}; nothing was run now. "
        "`python benchmarks/upstream/run_all.py` in its source tree proves it on the installed Megatron-Core"
    )
    return [*lines, *_entry("from", source)]


def _balance_batch(args: argparse.Namespace) -> list[str]:
    """Over how many sequences f is counted.

    Raises:
        ConfigError: sizes or flags that cannot be.
    """
    given = {name: getattr(args, name) for name in SIZES}
    values = {name: getattr(args, f"moe_lbl_{name}") for name in Settings.__dataclass_fields__}
    if values["scope"] is not None:
        Settings.create(**values)  # a flag that cannot be is said before a size that is missing
    missing = ["--" + name.replace("_", "-") for name, value in given.items() if value is None]
    if len(missing) == len(SIZES) and values["scope"] is None:
        return _entry("", f"not asked for; give {', '.join(missing)} (and --moe-lbl-scope)")
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not given; the Balance BSZ needs all of --" + ", --".join(SIZES).replace("_", "-")
        )
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: not allowed; allowed: an integer >= 1")
    per_round = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % per_round:
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size}: not allowed; allowed: a multiple of --micro-batch-size x "
            f"--data-parallel-size = {per_round}"
        )
    chosen = [values["scope"]] if values["scope"] is not None else [scope.value for scope in Scope]
    sizes = argparse.Namespace(**vars(args), moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1.0)
    lines = []
    for scope in chosen:
        settings = Settings.create(**{**values, "scope": scope})
        settings.require_group_size_fits(args.data_parallel_size)
        for line in flags.describe(sizes, settings):
            lines += _entry("", line)
    return lines
