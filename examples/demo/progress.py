"""Progress that is visible all the time: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from demo.launch import Step
from demo.megatron_args import Size

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows one training; use as a context manager."""

    def __init__(self, console: Console, title: str, size: Size, domains: int) -> None:
        self._console = console
        self._title = title
        self._steps = size.steps
        self._domains = domains
        self._start_note = f"starting {size.processes} processes"
        self._last_line = 0.0
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=self._steps + self._domains, note=self._start_note)
        self._say(self._start_note, force=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bar.stop()

    def step(self, step: Step) -> None:
        """A training step has ended."""
        self._bar.update(self._task, completed=step.iteration, note=f"loss {step.loss:.3f}")
        line = f"step {step.iteration}/{self._steps}  loss {step.loss:.3f}  {step.milliseconds:.0f} ms"
        self._say(line, force=step.iteration in (1, self._steps))

    def domain(self, name: str) -> None:
        """The checkpoint has been evaluated on a domain."""
        self._bar.update(self._task, advance=1, note=f"experts on {name}")
        self._say(f"experts on {name}", force=False)

    def _say(self, what: str, force: bool) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and (force or now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            self._console.print(f"{self._title:>7}  {now - self._began:5.0f} s  {what}", highlight=False)
