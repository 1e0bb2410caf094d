"""examples/plain_core_loop.py: a loop without `megatron.training`, with both ways of saying that a step is over."""

from __future__ import annotations

import re

import ranks
from launch import ROOT, TIMEOUT_SECONDS

STEPS = 3


def losses(*arguments: str) -> list[tuple[float, float]]:
    """(loss, load-balancing loss) of each step on two ranks."""
    command = ["-m", "megatron_global_lbl", "--cpu", str(ROOT / "examples" / "plain_core_loop.py")]
    command += ["--distributed-backend", "gloo", "--steps", str(STEPS), *arguments]
    status, output = ranks.run(command, 2, TIMEOUT_SECONDS)
    assert status == 0, output[-6000:]
    found = re.findall(r"^step \d+: loss (\S+), load balancing (\S+)$", output, re.MULTILINE)
    assert len(found) == STEPS, output[-6000:]
    return [(float(loss), float(balance)) for loss, balance in found]


def test_both_ends_of_a_step_are_the_same_and_the_scope_is_on():
    window = ["--scope", "window", "--window-steps", "2"]
    by_finalize = losses(*window)
    assert losses(*window, "--own-step-end") == by_finalize
    # Uniform f, so no loss, until a step has been completed; Megatron's own loss starts near 1.
    (_, first), *rest = by_finalize
    assert first == 0 and all(0.9 < balance < 1.1 for _, balance in rest)
