"""What every report starts with, and its tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(*, gpu: bool) -> str:
    """One line: what was measured on, with versions."""
    import torch  # here, as whoever only wants a table need not wait for it

    if gpu:
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        where = f"{os.cpu_count()} cores of {_cpu_model()}, no GPU"
    parts = [where, f"Python {platform.python_version()}", f"PyTorch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts) + "."


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


class OtherLoad:
    """How much of the machine's CPU time others use: a benchmark on a shared machine has to tell."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(number) for number in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        own = sum(_cpu_ticks(pid) for pid in _group_of_processes())
        return sum(ticks), sum(ticks) - idle, own

    def share(self) -> float:
        """Of all CPU time since this was made, the part used by processes that torchrun did not start with this one, or taken
        by the host of a virtual machine."""
        total, busy, own = (after - before for after, before in zip(self._now(), self._start))
        return max(0.0, busy - own) / total


def _group_of_processes() -> list[int]:
    """This process and its siblings: the ranks on this machine."""
    parent = os.getppid()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _stat(pid)[1:2] == [str(parent)]]


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # it has ended
        return []


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0
