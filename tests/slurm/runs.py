"""A small training, as the jobs and the reference run it, and what it left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cluster import ROOT

LAUNCH_SCRIPT = "examples/expert_data.sh"
STEPS = 12
SAVE_INTERVAL = 4
# EP 2 over the two nodes; the scope whose state has to survive a restart.
TRAINING = {
    "CPU": "1",
    "PYTHON": sys.executable,
    "GLOBAL_BATCH": "4",
    "TRAIN_ITERS": str(STEPS),
    "SAVE_INTERVAL": str(SAVE_INTERVAL),
    "LBL_SCOPE": "global",
}


def train_without_slurm(folder: Path) -> None:
    """The same launch script, two processes on this machine."""
    environment = {**os.environ, **TRAINING, "GPUS_PER_NODE": "2", "RUN_DIR": str(folder)}
    result = subprocess.run(
        ["bash", LAUNCH_SCRIPT],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-5000:]


def curve(folder: Path) -> dict[int, set[tuple[float, float]]]:
    """All (lm loss, gradient norm) that were logged for a step, at float32's precision; a step done twice is logged twice."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    logged: dict[str, dict[int, list[float]]] = {"lm loss": {}, "grad-norm": {}}
    for file in sorted((folder / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in logged:
                    logged[value.tag].setdefault(event.step, []).append(value.tensor.float_val[0])
    return {step: set(zip(losses, logged["grad-norm"][step], strict=True)) for step, losses in logged["lm loss"].items()}


def checkpoint(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    text = tracker.read_text().strip() if tracker.exists() else ""
    return int(text or 0)


def steps_in_log(folder: Path) -> list[int]:
    """The steps that the nodes' logs name, in order (Megatron logs on the last rank)."""
    text = "".join(log.read_text(errors="replace") for log in sorted((folder / "logs").glob("*.log")))
    return [int(step) for step in re.findall(r"\] iteration +(\d+)/", text)]
