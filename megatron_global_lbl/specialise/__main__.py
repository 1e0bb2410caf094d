"""The launcher of the measurement: `torchrun ... -m megatron_global_lbl.specialise [--cpu] SCRIPT ARGS --load DIR ...`

It is `-m megatron_global_lbl SCRIPT ARGS` with nothing trained: Megatron builds the model as the script and its arguments say,
loads the checkpoint, and evaluates on one domain of text after the other.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_global_lbl import launcher
from megatron_global_lbl.specialise import arguments

USAGE = """usage: python -m megatron_global_lbl.specialise [--cpu] SCRIPT [ARGS ...] --load DIR
           --moe-lbl-domains NAME=DATA [NAME=DATA ...] --moe-lbl-metrics-dir DIR

Measures what the experts of a checkpoint specialise in: which experts each domain of text uses, how alike experts are.
  --cpu    real Megatron on gloo without a GPU
  SCRIPT   the training's script, for example pretrain_gpt.py
  ARGS     the training's arguments; --eval-iters N and the batch size say how much of each domain is read,
           --ckpt-step N which checkpoint
  NAME=DATA   a domain: a name, and data as --valid-data-path takes it (code=PREFIX)
"""


class _Run:
    """One measurement, from Megatron's validated arguments to the file."""

    def __init__(self) -> None:
        self.started = False

    def prepare(self, args: argparse.Namespace) -> None:
        if not self.started:
            self.directory = arguments.prepare(args)

    def activate(self, args: argparse.Namespace) -> None:
        if self.started:  # a script may validate twice
            return
        self.started = True
        from megatron_global_lbl import flags
        from megatron_global_lbl.hook import evaluation
        from megatron_global_lbl.hook.patching import Patches
        from megatron_global_lbl.specialise.measurement import Measurement

        if int(os.environ.get("RANK", "0")) == 0:
            self._require_writable()
        self.measurement = Measurement(arguments.parse_sampled_tokens(args.moe_lbl_sampled_tokens))
        try:
            evaluation.install(Patches(), arguments.parse_domains(args.moe_lbl_domains), self.measurement)
        except ImportError as error:  # a symbol that is not where it should be
            raise flags.end_run(str(error)) from None

    def _require_writable(self) -> None:
        from megatron_global_lbl import flags

        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise flags.end_run(
                f"--moe-lbl-metrics-dir {self.directory}: {error.strerror}; allowed: a directory to write in"
            ) from None
        if not os.access(self.directory, os.W_OK):
            raise flags.end_run(f"--moe-lbl-metrics-dir {self.directory}: not writable; allowed: a directory to write in")

    def report(self) -> None:
        """Write and say what was measured, on rank 0.

        Raises:
            SystemExit: nothing was measured.
        """
        if not self.started or not self.measurement.finished:
            raise SystemExit(
                "megatron_global_lbl.specialise: error: the script ended without an evaluation; allowed: a script that calls "
                "Megatron's `pretrain`, with --eval-iters above 0"
            )
        result = self.measurement.result
        if result is None:
            return
        from megatron_global_lbl.specialise.result import write
        from megatron_global_lbl.specialise.summary import lines

        path = write(result, self.directory)
        print("\n".join([*lines(result), f"> moe-lbl: written to {path}"]), flush=True)
        print(f"> moe-lbl: `megatron-lbl specialise {self.directory}` draws it, on any machine", flush=True)


def main(argv: list[str]) -> None:
    """Run SCRIPT with nothing trained, and write what was measured; exits with 2 on a bad call."""
    run = _Run()
    launcher.run(argv, USAGE, arguments.add_arguments, run.activate, run.prepare)
    run.report()


if __name__ == "__main__":
    main(sys.argv[1:])
