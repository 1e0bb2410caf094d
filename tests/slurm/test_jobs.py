"""The job scripts themselves, on a real SLURM but without training: containers, the sweep, giving up, bad settings."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60
FOLDER = "examples/slurm"


def flag(words: list[str], name: str) -> str:
    """The value of the last `name VALUE`, as Megatron reads it."""
    return words[len(words) - words[::-1].index(name)]


def run_script(cluster, tmp_path, commands: str, *, nodes: int, attempts: int) -> tuple[dict, str]:
    """A job whose launch script is `commands`, once it has ended: what SLURM says of it, and its output."""
    script = tmp_path / "launch.sh"
    script.write_text(f"#!/usr/bin/env bash\n{commands}")
    environment = {"RUN_DIR": f"{tmp_path}/run", "MAX_ATTEMPTS": str(attempts)}
    output = f"--output={tmp_path}/job.out"
    number = cluster.submit(f"--nodes={nodes}", output, f"{FOLDER}/multi_node.sbatch", str(script), **environment)
    return cluster.wait(number, SECONDS), (tmp_path / "job.out").read_text()


def dry_run(cluster, tmp_path, *arguments: str, **environment: str) -> str:
    """What a job prints with DRY_RUN=1."""
    number = cluster.submit(f"--output={tmp_path}/%j.out", *arguments, DRY_RUN="1", RUN_DIR=f"{tmp_path}/run", **environment)
    job = cluster.wait(number, SECONDS)
    text = (tmp_path / f"{number}.out").read_text()
    assert job["ExitCode"] == "0:0", text
    return text


def test_one_node(cluster, tmp_path):
    text = dry_run(cluster, tmp_path, f"{FOLDER}/one_node.sbatch", "examples/data_parallel.sh", "--seed", "7")
    assert "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=2 --kill-on-bad-exit=1" in text
    assert "--standalone" in text and "--nproc-per-node 8" in text and "--seed 7" in text
    assert f"--save {tmp_path}/run/checkpoints" in text and f"--load {tmp_path}/run/checkpoints" in text


def test_rendezvous_on_the_first_node(cluster, tmp_path):
    text = dry_run(cluster, tmp_path, "--nodes=2", f"{FOLDER}/multi_node.sbatch", "examples/expert_data.sh")
    assert "nodes n1 n2; rendezvous at 127.0.0.1:2" in text
    assert "--nnodes 2" in text and "--node-rank 0" in text and "--master-addr 127.0.0.1" in text


def test_container(cluster, tmp_path):
    image = {"CONTAINER_IMAGE": "images/megatron.sqsh", "MEGATRON_LM_DIR": str(tmp_path / "Megatron-LM")}
    (tmp_path / "Megatron-LM").mkdir()
    (tmp_path / "Megatron-LM" / "pretrain_gpt.py").touch()
    text = dry_run(cluster, tmp_path, f"{FOLDER}/one_node.sbatch", "examples/data_parallel.sh", SRUN_ARGS="--no-kill", **image)
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    mounts = ",".join(f"{folder}:{folder}" for folder in (ROOT, tmp_path / "run", tmp_path / "Megatron-LM"))
    assert "--container-image=images/megatron.sqsh" in words and f"--container-mounts={mounts}" in words
    assert f"--container-workdir={ROOT}" in words and "--no-kill" in words
    assert f"{tmp_path}/Megatron-LM/pretrain_gpt.py" in text


SWEPT = {
    "dp-1": ["--moe-lbl-scope", "dp", "--moe-lbl-group-size", "1"],
    "dp-2": ["--moe-lbl-scope", "dp", "--moe-lbl-group-size", "2"],
    "dp-4": ["--moe-lbl-scope", "dp", "--moe-lbl-group-size", "4"],
    "dp": ["--moe-lbl-scope", "dp"],
    "global": ["--moe-lbl-scope", "global"],
}
ASKED_FOR = {"dp-16": ["--moe-lbl-scope", "dp", "--moe-lbl-group-size", "16"]}


@pytest.mark.parametrize("array, environment, expected", [([], {}, SWEPT), (["--array=0"], {"BALANCE": "dp-16"}, ASKED_FOR)])
def test_sweep_is_one_training_per_setting(cluster, tmp_path, array, environment, expected):
    output = f"--output={tmp_path}/%a.out"
    run = f"{tmp_path}/run"
    arguments = [output, *array, f"{FOLDER}/sweep.sbatch", "examples/data_parallel.sh"]
    number = cluster.submit(*arguments, DRY_RUN="1", RUN_DIR=run, **environment)
    jobs = [cluster.wait(f"{number}_{index}", SECONDS) for index in range(len(expected))]
    assert [job["ExitCode"] for job in jobs] == ["0:0"] * len(expected)
    for index, (setting, flags) in enumerate(expected.items()):
        text = (tmp_path / f"{index}.out").read_text().replace("\\\n", " ")
        words = text.split()
        first = words.index("--moe-lbl-scope")
        assert words[first : first + len(flags) + 2] == [*flags, "--moe-lbl-metrics-dir", f"{run}/{setting}/balance"]
        assert flag(words, "--save") == f"{run}/{setting}/checkpoints"


def test_refuses_bad_settings(cluster, tmp_path):
    cases = {
        "no-run-dir": (["one_node.sbatch", "examples/data_parallel.sh"], {}, "RUN_DIR is not set"),
        "no-script": (["one_node.sbatch"], {"RUN_DIR": f"{tmp_path}/run"}, "no launch script"),
        "wrong-script": (
            ["one_node.sbatch", "nowhere.sh"],
            {"RUN_DIR": f"{tmp_path}/run"},
            "no such launch script: nowhere.sh",
        ),
        "setting": (["sweep.sbatch", "x"], {"BALANCE": "dp-x"}, "BALANCE has dp-x; allowed: micro, dp-N, dp, global"),
    }
    jobs = {}
    for name, (arguments, environment, _) in cases.items():
        array = ["--array=0"] if name == "setting" else []
        script, *rest = arguments
        jobs[name] = cluster.submit(f"--output={tmp_path}/{name}.out", *array, f"{FOLDER}/{script}", *rest, **environment)
    for name, number in jobs.items():
        job = cluster.wait(number, SECONDS)
        text = (tmp_path / f"{name}.out").read_text()
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), text
        assert cases[name][2] in text


def test_gives_up_without_progress(cluster, tmp_path):
    """A launch script that fails at once is tried again, MAX_ATTEMPTS times in all, and its exit code is the job's.

    On one node: with two, a node that is ended before its task has started may give the exit code (255).
    """
    job, text = run_script(cluster, tmp_path, "echo it fails here\nexit 3\n", nodes=1, attempts=2)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "1"), text
    assert "2 attempts in a row without a new checkpoint: not requeued" in text
    logs = "".join(log.read_text() for log in (tmp_path / "run" / "logs").glob("*node0*.log"))
    assert logs.count("it fails here") == 2


def test_a_failed_node_ends_the_others(cluster, tmp_path):
    """The first node waits without hearing any signal, as ranks in a collective do whose peer is gone."""
    job, text = run_script(
        cluster, tmp_path, "[[ $NODE_RANK == 1 ]] && exit 3\ntrap '' TERM\nexec sleep 600\n", nodes=2, attempts=1
    )
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", text
    assert "srun: error: n2: task 1: Exited with exit code 3" in text
