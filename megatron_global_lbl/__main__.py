"""The launcher: `torchrun ... -m megatron_global_lbl [--cpu] SCRIPT ARGS` runs an unmodified Megatron script.

It is what `python SCRIPT ARGS` would be (same `sys.argv`, `sys.path[0]`, `__main__`), after the flags have been added to
Megatron's own parser. The hook itself is installed once Megatron has validated its arguments (see `flags.py`).
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = """usage: python -m megatron_global_lbl [--cpu] SCRIPT [ARGS ...]

Runs a Megatron-LM training script with the flags --moe-lbl-* added to Megatron's own parser.
  --cpu    real Megatron on gloo without a GPU, to try a launch script on any machine
  SCRIPT   for example pretrain_gpt.py; `SCRIPT --help` lists the flags
"""


def main(argv: list[str]) -> None:
    """Run SCRIPT as `__main__` with ARGS; exits with 2 on a bad call of the launcher itself."""
    cpu_mode = argv[:1] == ["--cpu"]
    argv = argv[1:] if cpu_mode else argv
    if not argv or argv[0].startswith("-"):
        asked_for_help = argv[:1] in (["-h"], ["--help"])
        print(USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr)
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
    from megatron_global_lbl import flags
    from megatron_global_lbl.hook import arguments

    try:
        arguments.install(flags.add_arguments, flags.activate)
    except ImportError as error:
        raise SystemExit(f"megatron_global_lbl: error: {error}") from None
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
