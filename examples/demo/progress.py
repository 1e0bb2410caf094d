"""Progress that is visible all the time: a bar per training in a terminal, plain lines in a log file."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from demo.launch import Training
from demo.megatron_args import Run

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows the trainings; use as a context manager."""

    def __init__(self, console: Console, runs: list[Run], steps: int, domains: int) -> None:
        self._console, self._steps = console, steps
        columns = (
            *(TextColumn("[bold]{task.description:<12}"), BarColumn(bar_width=28), MofNCompleteColumn()),
            *(TextColumn("{task.fields[note]:<22}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        for run in runs:
            self._bars.add_task(run.name, total=steps + domains, note="waits", start=False)
        self._printed = dict.fromkeys((run.name for run in runs), -SECONDS_BETWEEN_LINES)  # at which of its seconds

    def __enter__(self) -> TrainingProgress:
        self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bars.stop()

    def show(self, training: Training, ended: bool) -> None:
        """How far a training is."""
        name, note = training.run.name, "starts"
        if ended:
            note = "done"
        elif training.domains:
            note = f"experts on {training.domains[-1]}"
        elif training.losses:
            step, loss = training.losses[-1]
            note = f"step {step}/{self._steps}  loss {loss:.3f}"
        (task,) = (task for task in self._bars.tasks if task.description == name)
        self._bars.start_task(task.id)
        self._bars.update(task.id, completed=len(training.losses) + len(training.domains), note=note)
        seconds = task.elapsed or 0
        if not self._console.is_terminal and (ended or seconds - self._printed[name] >= SECONDS_BETWEEN_LINES):
            self._printed[name] = seconds
            self._console.print(f"{name:>12}  {seconds:4.0f} s  {note}", highlight=False)
