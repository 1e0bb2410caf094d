"""Runs an unmodified Megatron script with flags added to Megatron's own parser.

The script is what `python SCRIPT ARGS` would be (same `sys.argv`, `sys.path[0]`, `__main__`). What the flags turn on is
installed once Megatron has validated its arguments.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_global_lbl import registry, startup


def run(argv: list[str], usage: str, add_arguments: Callable, activate: Callable, prepare: Callable | None = None) -> None:
    """Run `[--cpu] SCRIPT ARGS` with SCRIPT as `__main__`; exits with 2 on a bad call of the launcher itself.

    Args:
        argv: the command line without the launcher's own name.
        usage: what a bad call prints.
        add_arguments: see `hook.arguments.install`, as `activate` and `prepare`.
    """
    cpu_mode = argv[:1] == ["--cpu"]
    argv = argv[1:] if cpu_mode else argv
    if not argv or argv[0].startswith("-"):
        asked_for_help = argv[:1] in (["-h"], ["--help"])
        print(usage, end="", file=sys.stdout if asked_for_help else sys.stderr)
        if argv and not asked_for_help:
            print(
                f"megatron_global_lbl: error: {argv[0]} is before the script; put the script's flags behind it", file=sys.stderr
            )
        raise SystemExit(0 if asked_for_help else 2)
    script = Path(argv[0])
    try:
        script.open().close()
    except OSError as error:
        raise SystemExit(
            f"megatron_global_lbl: error: script {script}: {error.strerror}; allowed: the path of a Megatron training script"
        ) from None

    # A Megatron-LM source tree is found through its script's folder, so this comes before any import of Megatron.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = argv
    startup.watch()
    if cpu_mode:
        import megatron_cpu

        megatron_cpu.install()
    from megatron_global_lbl.hook import arguments
    from megatron_global_lbl.hook.versions import UnsupportedMegatron

    try:
        use = arguments.install(add_arguments, activate, prepare)
    except UnsupportedMegatron as error:  # an error of its imports keeps its traceback
        raise SystemExit(f"megatron_global_lbl: error: {error}") from None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit:
        _say_if_unused(use, script, failed=exit.code not in (None, 0))
        raise
    except Exception as error:
        if not cpu_mode and hasattr(error, "add_note") and not _has_gpu():  # notes: since Python 3.11
            error.add_note(
                "megatron_global_lbl: no GPU is usable here; to try a launch script without one: --cpu before the script"
            )
        raise
    _say_if_unused(use, script, failed=False)


def _has_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is None or torch.cuda.is_available()


def _say_if_unused(use, script: Path, failed: bool) -> None:
    """On the first rank: the flags did nothing in this process. A failed script has said why, unless it never got that far."""
    if (
        registry.was_used
        or use.validated
        or (failed and use.built)
        or not registry.is_first_rank()
        or {"-h", "--help"} & {*sys.argv}
    ):
        return
    did = "parsed Megatron's arguments without `validate_args`" if use.built else "never built Megatron's argument parser"
    print(
        f"megatron_global_lbl: {script} {did}, so --moe-lbl-* did nothing in this process; if it trains in other processes or "
        f'has a parser of its own: {startup.VARIABLE}="scope=global" in the environment',
        file=sys.stderr,
        flush=True,
    )
