"""A rank that fails between the start of a reduction and its wait ends the training; none waits for it for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ranks

PATIENCE_SECONDS = 120


def test_a_failing_rank_ends_the_training():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("failing_rank.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS)
    assert result.returncode == 1
    assert "RuntimeError: this rank fails" in result.stderr


def test_a_failing_fork_ends_the_others(tmp_path):
    """Else a test with forks (ranks.py) would wait for its time limit, or take a failure for a result."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print(sys.argv[1:], os.environ['RANK'], flush=True)\n"
        "sys.exit('gone') if os.environ['RANK'] == '1' else time.sleep(600)\n"
    )
    status, output = ranks.run([str(script), "--flag"], processes=2, timeout=60)
    assert status == 1
    assert output.splitlines() == ["['--flag'] 0", "['--flag'] 1", "gone"]
