"""A balance record in the terminal: a table of the layers with their trends, and the alarms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_global_lbl.metrics.alarms import Alarm
from megatron_global_lbl.metrics.reader import Run
from megatron_global_lbl.report.facts import summary
from megatron_global_lbl.report.series import binned, edges

BARS = "▁▂▃▄▅▆▇█"
TREND_POINTS = 20
# The trend is of the last intervals: the start would make all that follows a flat line.
TREND_INTERVALS = 400
COLUMNS = (
    *(("LBL global", "lbl_global", 3), ("LBL micro", "lbl_micro", 3), ("MaxVio", "max_vio", 2)),
    *(("entropy", "entropy", 4), ("dead", "dead", 0)),
)


def view(run: Run, found: Sequence[Alarm], *, rows: int | None = None) -> RenderableType:
    """What there is to see of a run; with `rows`, only so many layers, those with an alarm and the highest MaxVio first."""
    head = Text.assemble((run.name, "bold"), f"  scope {run.header.get('scope', 'not known')}, ", f"Balance BSZ {_bsz(run)}; ")
    return Group(
        head.append(summary(run)), table(run, found, rows), *(Text(f"note: {note}") for note in run.notes), status(found)
    )


def table(run: Run, found: Sequence[Alarm], rows: int | None = None) -> Table:
    """A row per layer: the values of the last interval and the trend of MaxVio."""
    result = Table(box=None, padding=(0, 1), header_style="dim", caption_justify="left")
    result.add_column("layer", justify="right")
    for name, _, _ in COLUMNS:
        result.add_column(name, justify="right")
    result.add_column("MaxVio, trend", no_wrap=True)
    result.add_column("alarms")
    trends = _trends(run.metrics["max_vio"][-TREND_INTERVALS:])
    causes = {layer: ", ".join(alarm.cause for alarm in found if layer in alarm.layers) for layer in run.layers}
    order = list(range(len(run.layers)))
    if rows is not None and rows < len(order):
        worst_L = np.nan_to_num(run.metrics["max_vio"][-1], nan=-1)
        order = sorted(order, key=lambda i: (not causes[run.layers[i]], -worst_L[i]))[: max(1, rows)]
        result.caption = f"the worst {len(order)} of {len(run.layers)} layers"
    for i in order:
        layer = run.layers[i]
        values = [_shown(run.metrics[name][-1, i], digits) for _, name, digits in COLUMNS]
        result.add_row(layer, *values, trends[i], causes[layer], style="bold" if causes[layer] else None)
    return result


def status(found: Sequence[Alarm]) -> RenderableType:
    """The alarms with what to do; a word that says so, not a colour alone."""
    if not found:
        return Text("healthy: no alarm", style="green")
    lines = Text()
    for alarm in found:
        lines.append(f"ALARM {alarm.cause}: ", "bold red").append(f"{alarm.finding}.\n")
        lines.append(f"  do: {alarm.advice}.\n")
    lines.rstrip()
    return lines


def _trends(values_NL: np.ndarray) -> list[str]:
    """A line of bars per layer, from 0 to the layer's own highest."""
    points_BL = binned(values_NL, edges(len(values_NL), TREND_POINTS))
    top_L = np.nanmax(points_BL, axis=0, initial=1e-9)
    levels_BL = np.nan_to_num(points_BL / top_L * (len(BARS) - 1), nan=-1).round().astype(int)
    return ["".join(" " if level < 0 else BARS[level] for level in column) for column in levels_BL.T]


def _bsz(run: Run) -> str:
    return f"{run.sequences[-1]:,g}" if np.isfinite(run.sequences[-1]) else "not known"


def _shown(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
