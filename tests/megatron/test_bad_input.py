"""Bad flags end a real launch before training, with one line in all."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from launch import TIMEOUT_SECONDS, TINY, train


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


def test_a_near_miss_is_named_after_megatrons_usage(tmp_path):
    run = train(tmp_path, "--moe-lb-scope", "global", processes=1, check=False)
    assert run.returncode != 0 and "usage:" in run.output and "--moe-router-topk" in run.output
    assert "error: unrecognized arguments: --moe-lb-scope global; did you mean --moe-lbl-scope?\n" in run.output


def test_coefficients_that_do_not_fit_their_types(tmp_path):
    """Megatron ends with a TypeError in the router."""
    run = train(tmp_path, "--moe-aux-loss-coeff", "0.05", "0.1", "--moe-lbl-scope", "global", processes=1, check=False)
    assert run.returncode != 0 and "TypeError" not in run.output
    line = "--moe-aux-loss-coeff has 2 and --moe-router-load-balancing-type 1 values; give one coefficient for each type"
    assert run.output.count(f"megatron_global_lbl: error: {line}, in that order\n") == 1, run.output[-3000:]


def test_a_driver_that_only_parses_says_so_at_its_end(tmp_path):
    """As Ray's drivers do, whose actors train."""
    (tmp_path / "driver.py").write_text(
        "from megatron.training.arguments import parse_args, validate_args\nvalidate_args(parse_args())\nprint('end')"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_global_lbl",
        "--cpu",
        "driver.py",
        *TINY,
        "--moe-lbl-scope",
        "dp",
    ]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=TIMEOUT_SECONDS)
    assert result.returncode == 0 and result.stdout.endswith("end\n"), result.stderr
    assert "> moe-lbl: scope dp; f will be counted over the micro-batch on all data-parallel ranks\n" in result.stdout
    assert result.stderr.endswith(
        "> moe-lbl: scope dp did nothing: no MoE layer was trained in this process. If other processes train (Ray, subprocess)"
        ', set MEGATRON_GLOBAL_LBL="scope=dp" in their environment\n'
    )


def test_a_training_ends_without_such_a_line(tmp_path):
    run = train(tmp_path, "--moe-lbl-scope", "global", "--train-iters", "1", processes=1, by_torchrun=True)
    assert "did nothing" not in run.output and "never built" not in run.output
