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
    assert losses("--scope", "global", "--own-step-end") == losses("--scope", "global")
