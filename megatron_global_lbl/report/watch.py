"""Looks at a record again and again: only when its files have changed, and then only at what is new."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_global_lbl.metrics import RecordError, Run, read
from megatron_global_lbl.metrics.alarms import Alarm, alarms
from megatron_global_lbl.metrics.record import printable
from megatron_global_lbl.report.terminal import view
from megatron_global_lbl.report.text import labels, record_directory

HEALTHY, ALARM = 0, 1
OTHER_LINES = 7  # of a view that are not layers: head, column names, all layers, caption, status
PIPE_WIDTH = 160
ABSENT = ("no such directory", "no balance record")  # in what `read` says
LOOK_SECONDS = 1.0  # how often a record that is not there yet is looked for


class Watched:
    """The runs of a directory and their alarms as they are now."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._seen: object = None
        self._scans: dict[Path, Any] = {}
        self.runs: list[tuple[str, Run, list[Alarm]]] = []

    def refresh(self) -> bool:
        """Whether there was anything new. Raises as `read` does."""
        directory = record_directory(self._directory)
        seen = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in directory.glob("*.balance"))
        if seen == self._seen and self.runs:
            return False
        runs = read(directory, scans=self._scans)
        self.runs = list(zip(labels(runs), runs, map(alarms, runs)))
        self._seen = seen
        return True

    def wait(self, seconds: float) -> None:
        """Wait for the first interval, at most so long. Raises as `read` does."""
        end, told = time.monotonic() + seconds, False
        while not self.runs:
            try:
                self.refresh()
            except RecordError as error:
                if not any(text in str(error) for text in ABSENT) or time.monotonic() >= end:
                    raise
                if not told:
                    print(printable(f"waiting: {error}"), file=sys.stderr, flush=True)
                told = True
                time.sleep(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))

    @property
    def status(self) -> int:
        """The exit status: ALARM if any run has one."""
        return ALARM if any(found for _, _, found in self.runs) else HEALTHY


def once(directory: str | Path, wait: float) -> int:
    """Print every layer of every run; the exit status. Raises as `read` does."""
    watched = Watched(directory)
    watched.wait(wait)
    _write([view(*of_run) for of_run in watched.runs])
    return watched.status


def live(directory: str | Path, seconds: float, wait: float) -> int:
    """Show the runs until interrupted, to a pipe a block per change; the exit status of the last. Raises as `read` does."""
    watched = Watched(directory)
    try:
        watched.wait(wait)
        (_screen if sys.stdout.isatty() else _blocks)(watched, seconds)
    except KeyboardInterrupt:
        pass
    return watched.status


def _screen(watched: Watched, seconds: float) -> None:
    console = Console()
    with Live(console=console, auto_refresh=False, screen=True) as screen:
        while True:
            alarm_lines = sum(4 * len(found) + len(run.notes) for _, run, found in watched.runs)
            rows = (console.height - alarm_lines) // len(watched.runs) - OTHER_LINES
            footer = Text(f"{time.strftime('%H:%M:%S')}, every {seconds:g} s; Ctrl-C ends", style="dim")
            screen.update(Group(*(view(*of_run, rows=max(3, rows)) for of_run in watched.runs), footer), refresh=True)
            time.sleep(seconds)
            watched.refresh()


def _blocks(watched: Watched, seconds: float) -> None:
    """Until nobody reads them any more."""
    reader = select.poll()
    reader.register(sys.stdout, 0)  # errors only: that of a pipe whose reader has gone
    while _write([Text(time.strftime("%Y-%m-%d %H:%M:%S")), *(view(*of_run) for of_run in watched.runs)]):
        while not (gone := reader.poll(1000 * seconds)) and not watched.refresh():
            pass
        if gone:
            break


def _write(shown: list[Any]) -> bool:
    """Print, with colours only for a terminal; False if nobody reads any more."""
    terminal, drawn, encoding = sys.stdout.isatty(), io.StringIO(), sys.stdout.encoding or "utf-8"
    # Drawn into memory: rich itself ends the process, with an alarm's exit status, if the reader has gone.
    console = Console(file=drawn, width=Console().width if terminal else PIPE_WIDTH, force_terminal=terminal)
    for one in shown:
        console.print(one)
    try:
        sys.stdout.write(drawn.getvalue().encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return False
    return True
