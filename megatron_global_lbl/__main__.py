"""The launcher: `torchrun ... -m megatron_global_lbl [--cpu] SCRIPT ARGS` runs an unmodified Megatron script.

It is `python SCRIPT ARGS` (`launcher.py`) with the flags of the load-balancing loss (`flags.py`).
"""

from __future__ import annotations

import sys

from megatron_global_lbl import flags, launcher

USAGE = """usage: python -m megatron_global_lbl [--cpu] SCRIPT [ARGS ...]

Runs a Megatron-LM training script with the flags --moe-lbl-* added to Megatron's own parser.
  --cpu    real Megatron on gloo without a GPU, to try a launch script on any machine
  SCRIPT   for example pretrain_gpt.py; `SCRIPT --help` lists the flags
"""


def main(argv: list[str]) -> None:
    """Run SCRIPT as `__main__` with ARGS; exits with 2 on a bad call of the launcher itself."""
    launcher.run(argv, USAGE, flags.add_arguments, flags.activate)


if __name__ == "__main__":
    main(sys.argv[1:])
