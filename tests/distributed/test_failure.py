"""A rank that fails between the start of a reduction and its wait ends the training; none waits for it for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATIENCE_SECONDS = 120


def test_a_failing_rank_ends_the_training():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("failing_rank.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS)
    assert result.returncode == 1
    assert "RuntimeError: this rank fails" in result.stderr
