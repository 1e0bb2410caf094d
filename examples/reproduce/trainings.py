"""Trains runs side by side, each a training of Megatron through the plugin's launcher; a result that is there is kept."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from reproduce.data import index_of
from reproduce.settings import Run, arguments, plugin_flags

SCRIPT = Path(__file__).resolve().parent / "train.py"
ROOT = SCRIPT.parents[2]


class Training:
    """One run: one process per rank, and a second training after it where the run switches back."""

    def __init__(self, run: Run, *, size: str, data: Path, out: Path) -> None:
        self.run, self.size, self.out = run, size, out
        self.index = index_of(data)
        self.measured = out / "measured" / f"{run.name}.json"
        self.log = out / "logs" / f"{run.name}.log"
        self.saved = out / "checkpoints" / run.name
        self.cache = out / "cache" / run.name  # Megatron's, of the samples' order: its own, for two may not write one
        for folder in (self.measured.parent, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.log.unlink(missing_ok=True)
        shutil.rmtree(self.saved, ignore_errors=True)
        base = arguments(run, size=size, data=data, index=self.index, out=out)
        base += ["--reproduce-out", str(self.measured)]
        setting = run.setting
        if setting.back_at:
            at = str(setting.back_at)
            first = ["--save", str(self.saved), "--save-interval", at, "--exit-interval", at, *plugin_flags(setting)]
            second = ["--load", str(self.saved), "--moe-lbl-scope", "micro"]
            self.parts = [base + first, base + second]
        else:
            self.parts = [base + plugin_flags(setting)]
        self._start()

    def _start(self) -> None:
        ranks = self.run.setting.ranks
        python = [sys.executable]
        if ranks > 1:
            python += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            python += ["--standalone", "--local-addr", "127.0.0.1"]  # on a port that it finds free
        mode = ["--cpu"] if self.size == "cpu" else []
        command = [*python, "-m", "megatron_global_lbl", *mode, str(SCRIPT), *self.parts.pop(0)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # any that is free, for one process needs to tell nobody
        }
        # The processes of this one machine talk over loopback, whatever the machine's name resolves to.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        with self.log.open("a", encoding="utf-8") as log:
            log.write(" ".join(command) + "\n")
            log.flush()
            # A session of its own, so that a stop reaches every rank.
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether nothing of it runs any more; starts the second part after the first."""
        if self.process.poll() is None:
            return False
        if self.process.returncode == 0 and self.parts:
            self.measured.unlink(missing_ok=True)
            self._start()
            return False
        return True

    def stop(self) -> None:
        """End it: it will start anew."""
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)

    def keep(self) -> bool:
        """Write the result, complete or not at all; False if the training failed."""
        shutil.rmtree(self.saved, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        if self.process.returncode != 0 or not self.measured.exists():
            return False
        result = {
            "setting": self.run.setting.__dict__,
            "seed": self.run.seed,
            "size": self.size,
            "data": self.index["digest"],
            "domains": [domain["name"] for domain in self.index["domains"]],
            "seconds": round(time.monotonic() - self.began, 1),
            "machine": {"processor": _processor("model name"), "cores": os.cpu_count(), "model": _model()},
            "versions": _versions(),
            **json.loads(self.measured.read_text(encoding="utf-8")),
        }
        path = result_path(self.out, self.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
        partial.replace(path)
        return True


def result_path(out: Path, run: Run) -> Path:
    """Where the result of a run is."""
    return out / "results" / f"{run.name}.json"


def train_all(runs: list[Run], *, size: str, data: Path, out: Path, jobs: int, limit: float | None) -> int:
    """Trains the runs that have no result; returns 1 if one failed, else 0."""
    began = time.monotonic()
    waiting = [run for run in runs if not result_path(out, run).exists()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done before; {jobs} at once", flush=True)
    running: list[Training] = []
    took: list[float] = []  # seconds of the runs that ended
    failed, done = 0, len(runs) - len(waiting)
    try:
        while waiting or running:
            left = float("inf") if limit is None else limit - (time.monotonic() - began)
            if left <= 0:
                break
            while waiting and left > (mean(took) if took else 0):
                used = sum(training.run.setting.ranks for training in running)
                fits = next((run for run in waiting if not running or used + run.setting.ranks <= jobs), None)
                if fits is None:
                    break
                waiting.remove(fits)
                running.append(Training(fits, size=size, data=data, out=out))
            if not running:
                break
            for training in [training for training in running if training.ended()]:
                running.remove(training)
                seconds = time.monotonic() - training.began
                took.append(seconds)
                if training.keep():
                    done += 1
                    print(f"{done}/{len(runs)} {training.run.name}: {seconds:.0f} s", flush=True)
                else:
                    failed += 1
                    print(f"FAILED {training.run.name}: {training.log}", flush=True)
            time.sleep(0.5)
    finally:
        for training in running:
            training.stop()
    print(f"{done} of {len(runs)} runs have a result under {out / 'results'}; {failed} failed", flush=True)
    return 1 if failed else 0


def _versions() -> dict[str, str]:
    import importlib.metadata

    found = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "a source tree"
    return found


def _processor(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _model() -> str:
    """What tells processors apart whose names a virtual machine shortens."""
    return f"family {_processor('cpu family')}, model {_processor('model')}"
