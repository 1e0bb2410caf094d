"""examples/plain_core_loop.py: a loop without `megatron.training`, with both ways of saying that a step is over."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from launch import ROOT, TIMEOUT_SECONDS

STEPS = 3


def losses(*arguments: str) -> list[tuple[float, float]]:
    """(loss, load-balancing loss) of each step on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_global_lbl", "--cpu", str(ROOT / "examples" / "plain_core_loop.py")]
    command += ["--distributed-backend", "gloo", "--steps", str(STEPS), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_SECONDS, env=environment
    )
    assert result.returncode == 0, result.stdout[-6000:]
    found = re.findall(r"^step \d+: loss (\S+), load balancing (\S+)$", result.stdout, re.MULTILINE)
    assert len(found) == STEPS, result.stdout[-6000:]
    return [(float(loss), float(balance)) for loss, balance in found]


def test_both_ends_of_a_step_are_the_same_and_the_scope_is_on():
    window = ["--scope", "window", "--window-steps", "2"]
    by_finalize = losses(*window)
    assert losses(*window, "--own-step-end") == by_finalize
    # Uniform f, so no loss, until a step has been completed; Megatron's own loss starts near 1.
    (_, first), *rest = by_finalize
    assert first == 0 and all(0.9 < balance < 1.1 for _, balance in rest)
