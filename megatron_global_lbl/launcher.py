"""Runs an unmodified Megatron script with flags added to Megatron's own parser.

The script is what `python SCRIPT ARGS` would be (same `sys.argv`, `sys.path[0]`, `__main__`). What the flags turn on is
installed once Megatron has validated its arguments.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path


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
        raise SystemExit(0 if asked_for_help else 2)
    script = Path(argv[0])
    if not script.is_file():
        raise SystemExit(f"megatron_global_lbl: no such script: {script} (allowed: the path of a Megatron training script)")

    # A Megatron-LM source tree is found through its script's folder, so this comes before any import of Megatron.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = argv
    if cpu_mode:
        import megatron_cpu

        megatron_cpu.install()
    from megatron_global_lbl.hook import arguments
    from megatron_global_lbl.hook.versions import UnsupportedMegatron

    try:
        arguments.install(add_arguments, activate, prepare)
    except UnsupportedMegatron as error:  # an error of its imports keeps its traceback
        raise SystemExit(f"megatron_global_lbl: error: {error}") from None
    runpy.run_path(str(script), run_name="__main__")
