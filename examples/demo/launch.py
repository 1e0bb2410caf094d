"""Starts a training as a user would, then the measurement on its checkpoint, and reads Megatron's own log lines meanwhile."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo.megatron_args import RANKS, Run, Size, evaluation_arguments, training_arguments
from demo.prepare import Paths

SCRIPT = Path(__file__).resolve().parent.parent / "pretrain_gpt_moe.py"

ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ \|.*lm loss: ([0-9.E+-]+)")
EVALUATION = re.compile(r"validation loss at iteration \d+ on validation set (\S+)")


class RunFailedError(Exception):
    """A launch ended with an error; the message has the end of its log and where all of it is."""


class Launch:
    """`-m MODULE --cpu SCRIPT ARGUMENTS` on some processes of this machine, which write one log.

    The ranks are started directly: torchrun would import PyTorch once more and do nothing else. The log's first line is the
    command with torchrun.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path, ranks: int) -> None:
        self.module, self.log = module, log
        command = ["-m", module, "--cpu", str(SCRIPT), *arguments]
        log.write_text(f"torchrun --nproc-per-node {ranks} {shlex.join(command)}\n", encoding="utf-8")
        self._read_to = 0
        environment = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        # The processes talk over loopback, whatever the machine's name resolves to.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        with log.open("ab") as file:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(ranks)
            ]

    def ended(self) -> bool:
        """True once every process has ended well.

        Raises:
            RunFailedError: one has not; the others are stopped.
        """
        codes = [process.poll() for process in self._processes]
        if failed := [code for code in codes if code]:
            self.stop()
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
            raise RunFailedError(
                "\n".join(tail) + f"\n\n`-m {self.module}` ended with exit code {failed[0]}. "
                f"Above: the end of its log. All of it: {self.log}"
            )
        return all(code == 0 for code in codes)

    def new_lines(self) -> list[str]:
        """The whole lines that were logged since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read_to += len(text)
        return text.decode(errors="replace").splitlines()

    def stop(self) -> None:
        """End every process."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


class Training:
    """One run of the demo in a folder: the training, then what its experts specialise in on held-out text.

    The folder gets the balance record, specialisation.json, checkpoint/, train.log and specialise.log.
    """

    def __init__(self, run: Run, size: Size, paths: Paths, folder: Path, more: Sequence[str] = ()) -> None:
        """Start the training; `more` are further arguments, which win over the others."""
        self.run, self.size, self.paths, self.folder = run, size, paths, folder
        shutil.rmtree(folder, ignore_errors=True)  # the balance record would be continued
        folder.mkdir(parents=True)
        self.losses: list[tuple[int, float]] = []  # by iteration
        self.domains: list[str] = []  # that have been evaluated
        self._arguments = [*training_arguments(run, size, paths, folder), *more]
        self._launch = Launch("megatron_global_lbl", self._arguments, folder / "train.log", RANKS)
        self._evaluates = False

    def ended(self) -> bool:
        """Read what was logged, and start the measurement after the training; True once that has ended.

        Raises:
            RunFailedError: it will not end well.
        """
        ended = self._launch.ended()
        for line in self._launch.new_lines():
            if found := ITERATION.search(line):
                self.losses.append((int(found[1]), float(found[2])))
            elif found := EVALUATION.search(line):
                self.domains.append(found[1])
        if ended and not self._evaluates:
            self.evaluate()
            return False
        return ended

    def evaluate(self, more: Sequence[str] = (), ranks: int = 1) -> None:
        """Start the measurement. One process is enough: starting it takes longer than what it does."""
        self._evaluates = True
        arguments = [*self._arguments, *evaluation_arguments(self.size, self.paths, self.folder), *more]
        self._launch = Launch("megatron_global_lbl.specialise", arguments, self.folder / "specialise.log", ranks)

    def wait(self) -> None:
        """Until it has ended."""
        while not self.ended():
            time.sleep(0.2)

    def stop(self) -> None:
        """End its processes."""
        self._launch.stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
