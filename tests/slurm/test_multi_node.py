"""Training over two nodes of a real SLURM equals the run without it, also after a killed rank and a requeue, bit by bit."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster import processes, torchrun_of, until
from runs import LAUNCH_SCRIPT, SAVE_INTERVAL, STEPS, TRAINING, checkpoint, curve, steps_in_log, train_without_slurm

JOB = "examples/slurm/multi_node.sbatch"
PATIENCE_SECONDS = 240


def submit(cluster, folder: Path) -> str:
    arguments = ["--nodes=2", f"--output={folder}/job.out", JOB, LAUNCH_SCRIPT]
    return cluster.submit(*arguments, **TRAINING, GPUS_PER_NODE="1", RUN_DIR=str(folder))


def printed(folder: Path) -> dict[Path, str]:
    """The job's own output and the nodes' logs."""
    return {file: file.read_text() for file in [folder / "job.out", *sorted(folder.glob("logs/*.log"))]}


def ends(folder: Path) -> str:
    """For a failed test."""
    return "\n".join(f"== {file}\n{text[-4000:]}" for file, text in printed(folder).items())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    train_without_slurm(folder)
    return curve(folder)


@dataclass
class Disturbed:
    """A job that lost a rank in its first attempt and was told to save and end in its second."""

    folder: Path
    killed_after: int
    """The newest checkpoint when the rank was killed."""
    seconds_to_end: float = 0.0
    """From the kill to the moment when nothing of the job was left on any node."""
    saved_on_signal: int = 0
    """The newest checkpoint after the second attempt."""
    job: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def disturbed(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disturbed")
    number = submit(cluster, folder)
    try:
        step = SAVE_INTERVAL + 1
        until(lambda: step in steps_in_log(folder), "a step after the first checkpoint", PATIENCE_SECONDS, every=0.02)
        ranks = {process: torchrun_of(process) for rank in "01" for process in processes(SLURM_JOB_ID=number, RANK=rank)}
        attempt = {*(rank for rank, above in ranks.items() if above), *filter(None, ranks.values())}
        (rank,) = attempt & set(processes(SLURM_JOB_ID=number, SLURM_NODEID="1", RANK="1"))
        assert len(attempt) == 4, "torchrun and a training process on either node"
        os.kill(rank, signal.SIGKILL)
        run = Disturbed(folder, killed_after=checkpoint(folder))
        start = time.monotonic()
        until(lambda: not attempt & set(processes(SLURM_JOB_ID=number)), "the attempt ends on both nodes", 60, every=0.05)
        run.seconds_to_end = time.monotonic() - start

        # The second attempt, once it has trained on from the checkpoint: what SLURM does before the time limit.
        seen = len(steps_in_log(folder))
        until(lambda: len(steps_in_log(folder)) > seen, "the second attempt trains", PATIENCE_SECONDS, every=0.02)
        cluster.run("scancel", "--batch", "--signal=USR1", number)
        until(lambda: cluster.job(number)["Restarts"] == "2", "the second requeue", 60)
        run.saved_on_signal = checkpoint(folder)
        run.job = cluster.wait(number, PATIENCE_SECONDS)
    except (TimeoutError, ValueError) as error:
        raise AssertionError(f"{error}\n{ends(folder)}") from error
    return run


def test_two_nodes_train_what_one_machine_trains(cluster, reference, tmp_path):
    job = cluster.wait(submit(cluster, tmp_path), PATIENCE_SECONDS)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), ends(tmp_path)
    assert sorted(reference) == list(range(1, STEPS + 1))
    assert curve(tmp_path) == reference
    logs = sorted(file.name for file in tmp_path.glob("logs/*.log"))
    assert [name.split("-")[3] for name in logs] == ["node0", "node1"]


def test_a_killed_rank_ends_the_job_on_all_nodes_quickly(disturbed):
    assert disturbed.seconds_to_end < 45, f"{disturbed.seconds_to_end} s"
    assert "srun ended with" in (disturbed.folder / "job.out").read_text()


def test_the_job_requeues_until_it_is_done(disturbed):
    job = disturbed.job
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2"), ends(disturbed.folder)
    assert checkpoint(disturbed.folder) == STEPS


def test_the_signal_saves_before_the_end(disturbed):
    """A checkpoint that the save interval does not explain, or at least a newer one; and Megatron's own line."""
    assert disturbed.saved_on_signal > disturbed.killed_after
    text = "".join(printed(disturbed.folder).values())
    assert "USR1: the training shall save and end" in text
    assert "exiting program after receiving SIGTERM" in text


def test_resumed_training_equals_the_undisturbed_one(disturbed, reference):
    """Also the steps between the last checkpoint and the kill, which were done twice."""
    assert steps_in_log(disturbed.folder).count(SAVE_INTERVAL + 1) == 2
    assert curve(disturbed.folder) == reference
