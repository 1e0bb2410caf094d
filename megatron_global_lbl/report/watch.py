"""Looks at a record again and again: only when its files have changed, and then only at what is new."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_global_lbl.metrics.alarms import Alarm, alarms
from megatron_global_lbl.metrics.frames import Scan
from megatron_global_lbl.metrics.reader import Run, read
from megatron_global_lbl.report.terminal import view

HEALTHY, ALARM = 0, 1
# Lines of a view that are not layers: head, column names, caption, status.
OTHER_LINES = 6


class Watched:
    """The runs of a directory and their alarms as they are now."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._seen: object = None
        self._scans: dict[Path, Scan] = {}
        self.runs: list[tuple[Run, list[Alarm]]] = []

    def refresh(self) -> bool:
        """Whether there was anything new.

        Raises:
            RecordError, OSError: as `read`.
        """
        seen = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._directory.glob("*.balance"))
        if seen == self._seen and self.runs:
            return False
        self.runs = [(run, alarms(run)) for run in read(self._directory, scans=self._scans)]
        self._seen = seen
        return True

    @property
    def status(self) -> int:
        """The exit status: ALARM if any run has one."""
        return ALARM if any(found for _, found in self.runs) else HEALTHY


def once(directory: str | Path, console: Console) -> int:
    """Print every layer of every run; the exit status."""
    watched = Watched(directory)
    watched.refresh()
    for run, found in watched.runs:
        console.print(view(run, found))
    return watched.status


def live(directory: str | Path, console: Console, seconds: float) -> int:
    """Show the runs until interrupted; the exit status of what was shown last.

    Raises:
        RecordError, OSError: as `read`.
    """
    watched = Watched(directory)
    watched.refresh()
    try:
        with Live(console=console, auto_refresh=False, screen=True) as screen:
            while True:
                alarm_lines = sum(4 * len(found) + len(run.notes) for run, found in watched.runs)
                rows = (console.height - alarm_lines) // len(watched.runs) - OTHER_LINES
                shown = [view(run, found, rows=max(3, rows)) for run, found in watched.runs]
                footer = Text(f"{time.strftime('%H:%M:%S')}, every {seconds:g} s; Ctrl-C ends", style="dim")
                screen.update(Group(*shown, footer), refresh=True)
                time.sleep(seconds)
                watched.refresh()
    except KeyboardInterrupt:
        return watched.status
