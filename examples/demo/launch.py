"""Starts one training as a user would, then the measurement on its checkpoint, and reads Megatron's own log lines meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.megatron_args import WINDOW_STEPS, Size, evaluation_arguments, training_arguments

SCRIPT = Path(__file__).resolve().parent.parent / "pretrain_gpt_moe.py"

ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*?elapsed time per iteration \(ms\): ([0-9.]+).*?lm loss: ([0-9.E+-]+)")
EVALUATION = re.compile(r"validation loss at iteration \d+ on validation set (\S+)")

Paths = dict[str, dict[str, str]]
"""By domain, then split: the prefix of a dataset."""


class RunFailedError(Exception):
    """A launch ended with an error; the message has the end of its log and where all of it is."""


@dataclass(frozen=True)
class Step:
    """What Megatron said about one iteration."""

    iteration: int
    milliseconds: float
    loss: float


@dataclass(frozen=True)
class RunFiles:
    """Where one training, and the measurement after it, write."""

    folder: Path

    @property
    def training_log(self) -> Path:
        return self.folder / "train.log"

    @property
    def specialise_log(self) -> Path:
        return self.folder / "specialise.log"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def metrics(self) -> Path:
        """Where the balance record is, and specialisation.json beside it: the report names a run by this folder."""
        return self.folder


def train(
    scope: str,
    size: Size,
    paths: Paths,
    files: RunFiles,
    *,
    data: Path,
    on_step: Callable[[Step], None] = lambda _: None,
    more: Sequence[str] = (),
) -> list[Step]:
    """Runs one training to its end; `on_step` is called while it runs. `more` are further arguments, which win over the others.

    Raises:
        RunFailedError: if it does not end well.
    """
    shutil.rmtree(files.folder, ignore_errors=True)  # the balance record would be continued
    files.folder.mkdir(parents=True)
    plugin = ["--moe-lbl-scope", scope, "--moe-lbl-metrics-dir", str(files.metrics)]
    if scope == "window":
        plugin += ["--moe-lbl-window-steps", str(WINDOW_STEPS)]
    save = ["--save", str(files.checkpoint), "--save-interval", str(size.steps), "--no-save-optim", "--no-save-rng"]
    steps: list[Step] = []

    def read(line: str) -> None:
        if found := ITERATION.search(line):
            steps.append(Step(int(found[1]), float(found[2]), float(found[3])))
            on_step(steps[-1])

    arguments = [*training_arguments(size, paths, data), *save, *plugin, *more]
    launch("megatron_global_lbl", arguments, files.training_log, size.processes, read)
    return steps


def specialise(
    size: Size,
    paths: Paths,
    files: RunFiles,
    *,
    data: Path,
    on_domain: Callable[[str], None] = lambda _: None,
    more: Sequence[str] = (),
) -> None:
    """Measures what the experts of the training's checkpoint specialise in, on held-out text.

    Args:
        size: of the demo.
        paths: of the data.
        files: of the training.
        data: the folder of the data.
        on_domain: called with the name of each domain that has been evaluated.
        more: further arguments, which win over the others.

    Raises:
        RunFailedError: if it does not end well.
    """

    def read(line: str) -> None:
        if found := EVALUATION.search(line):
            on_domain(found[1])

    arguments = [*training_arguments(size, paths, data), *evaluation_arguments(size)]
    arguments += ["--load", str(files.checkpoint), "--moe-lbl-metrics-dir", str(files.metrics)]
    arguments += ["--moe-lbl-domains", *(f"{name}={path['valid']}" for name, path in paths.items())]
    processes = size.evaluation_processes
    launch("megatron_global_lbl.specialise", [*arguments, *more], files.specialise_log, processes, read)


def launch(module: str, arguments: list[str], log_file: Path, processes: int, read: Callable[[str], None]) -> None:
    """Runs `-m MODULE SCRIPT ARGUMENTS` on so many processes; `read` is called with each line that they print.

    Raises:
        RunFailedError: if it does not end well.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--standalone", "--local-addr", "127.0.0.1"]  # on a port that it finds free
    command = [sys.executable, *launcher, "-m", module, "--cpu", str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    # The processes of this one machine talk over loopback, whatever the machine's name resolves to.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    with log_file.open("w", encoding="utf-8") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    read(line)
            except BaseException:
                process.terminate()  # Ctrl-C, or an error of ours: leave no rank behind
                raise
    if process.returncode != 0:
        tail = log_file.read_text(encoding="utf-8").splitlines()[-40:]
        raise RunFailedError(
            "\n".join(tail) + f"\n\n`-m {module}` ended with exit code {process.returncode}. "
            f"Above: the end of its log. All of it: {log_file}"
        )
