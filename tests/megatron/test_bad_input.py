"""Bad flags end a real launch before training, with one line in all."""

from __future__ import annotations

import re

import pytest
from launch import train


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            ["--moe-lbl-scope", "global", "--moe-aux-loss-coeff", "0"],
            "--moe-lbl-scope global has nothing to act on: --moe-aux-loss-coeff is 0 for aux_loss; allowed: a number > 0",
        ),
        (
            ["--moe-lbl-scope", "global", "--moe-lbl-group-size", "3"],
            "--moe-lbl-group-size 3: not allowed; allowed: a divisor of the data-parallel size 2",
        ),
    ],
)
def test_refused_before_training(tmp_path, arguments, line):
    run = train(tmp_path, *arguments, check=False, by_torchrun=True)
    assert run.returncode != 0
    # Once: rank 0 said it and exited, and torchrun ended the other rank before its 20 seconds were over.
    assert run.output.count(f"megatron_global_lbl: error: {line}\n") == 1, run.output[-3000:]
    assert run.output.count("megatron_global_lbl: error:") == 1
    assert "Traceback" not in run.output.split("megatron_global_lbl: error:")[0]
    assert not re.search(r"iteration +1/", run.output)
