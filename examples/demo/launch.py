"""Starts one training as a user would, and reads Megatron's own log lines while it runs."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo.megatron_args import WINDOW_STEPS

SCRIPT = Path(__file__).resolve().parent.parent / "pretrain_gpt_moe.py"

ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*?elapsed time per iteration \(ms\): ([0-9.]+).*?lm loss: ([0-9.E+-]+)")
VALIDATION = re.compile(r"validation-(\S+) loss at iteration (\d+)")


class TrainingFailedError(Exception):
    """The training ended with an error; the message has the end of its log and where all of it is."""


@dataclass(frozen=True)
class Step:
    """What Megatron said about one iteration."""

    iteration: int
    milliseconds: float
    loss: float


@dataclass(frozen=True)
class RunFiles:
    """Where one training writes."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.json"

    @property
    def balance(self) -> Path:
        return self.folder / "balance"


def command(scope: str, arguments: list[str], files: RunFiles, processes: int) -> list[str]:
    """The command line of one training; the flags of the plugin are its last ones."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    plugin = ["--moe-lbl-scope", scope, "--moe-lbl-metrics-dir", str(files.balance)]
    if scope == "window":
        plugin += ["--moe-lbl-window-steps", str(WINDOW_STEPS)]
    report = ["--validation-report", str(files.validation)]
    return [sys.executable, *launcher, "-m", "megatron_global_lbl", "--cpu", str(SCRIPT), *arguments, *report, *plugin]


def train(
    scope: str,
    arguments: list[str],
    files: RunFiles,
    *,
    processes: int,
    on_step: Callable[[Step], None],
    on_stage: Callable[[str], None],
) -> list[Step]:
    """Runs one training to its end; `on_step` and `on_stage` are called while it runs.

    Raises:
        TrainingFailedError: if it does not end well.
    """
    shutil.rmtree(files.folder, ignore_errors=True)  # the balance record would be continued
    files.folder.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # The processes of this one machine talk over loopback, whatever the machine's name resolves to.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    line_of_command = command(scope, arguments, files, processes)
    steps: list[Step] = []
    with files.log.open("w", encoding="utf-8") as log:
        log.write(" ".join(line_of_command) + "\n")
        log.flush()
        with subprocess.Popen(
            line_of_command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    if found := ITERATION.search(line):
                        steps.append(Step(int(found[1]), float(found[2]), float(found[3])))
                        on_step(steps[-1])
                    elif found := VALIDATION.search(line):
                        on_stage(f"validation: {found[1]}")
            except BaseException:
                process.terminate()  # Ctrl-C, or an error of ours: leave no rank behind
                raise
    if process.returncode != 0 or not files.validation.exists():
        tail = files.log.read_text(encoding="utf-8").splitlines()[-40:]
        raise TrainingFailedError(
            "\n".join(tail) + f"\n\nThe training with scope {scope} ended with exit code {process.returncode}. "
            f"Above: the end of its log. All of it: {files.log}"
        )
    return steps


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
