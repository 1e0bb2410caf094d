"""A balance record in the terminal: a table of the layers with their trends over the whole run, and the alarms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_global_lbl.metrics.alarms import Alarm
from megatron_global_lbl.metrics.record import printable
from megatron_global_lbl.report.answers import summary
from megatron_global_lbl.report.series import binned, edges, mean
from megatron_global_lbl.report.text import amount

BARS = "▁▂▃▄▅▆▇█"
TREND_POINTS = 24
COLUMNS = (
    *(("LBL global", "lbl_global", 3), ("LBL micro", "lbl_micro", 3), ("MaxVio", "max_vio", 2)),
    *(("entropy", "entropy", 4), ("dead", "dead", 0)),
)


def view(label: str, run: Any, found: Sequence[Alarm], *, rows: int | None = None) -> RenderableType:
    """What there is to see of a run; with `rows`, only so many layers, those with an alarm and the highest MaxVio first."""
    bsz = amount(float(run.sequences[-1]))
    scope = printable(run.header.get("scope", "not known"))
    head = Text.assemble((printable(label), "bold"), f"  scope {scope}, Balance BSZ {bsz}; {summary(run)}")
    return Group(head, table(run, found, rows), *(Text(f"note: {printable(note)}") for note in run.notes), status(found))


def table(run: Any, found: Sequence[Alarm], rows: int | None = None) -> Table:
    """A row per layer: the values of the last interval and the trend of MaxVio; the last row is of all layers."""
    result = Table(box=None, padding=(0, 1), header_style="dim", caption_justify="left", show_footer=True, footer_style="dim")
    last = {name: run.metrics[name][-1] for _, name, _ in COLUMNS}
    result.add_column("layer", "all", justify="right")
    for title, name, digits in COLUMNS:
        whole = np.nansum(last[name]) if name == "dead" else mean(last[name])
        result.add_column(title, _shown(whole, digits), justify="right")
    result.add_column(f"MaxVio since iteration {run.iterations[0] - run.steps[0] + 1:,}", no_wrap=True)
    result.add_column("alarms")
    trends = _trends(run.metrics["max_vio"])
    causes = {layer: ", ".join(alarm.cause for alarm in found if layer in alarm.layers) for layer in run.layers}
    order = list(range(len(run.layers)))
    if rows is not None and rows < len(order):
        worst_L = np.nan_to_num(last["max_vio"], nan=-1)
        order = sorted(order, key=lambda i: (not causes[run.layers[i]], -worst_L[i]))[: max(1, rows)]
        result.caption = f"the worst {len(order)} of {len(run.layers)} layers"
    for i in order:
        layer = run.layers[i]
        values = [_shown(last[name][i], digits) for _, name, digits in COLUMNS]
        result.add_row(Text(printable(layer)), *values, trends[i], causes[layer], style="bold" if causes[layer] else None)
    return result


def status(found: Sequence[Alarm]) -> RenderableType:
    """The alarms with what to do; a word that says so, not a colour alone."""
    if not found:
        return Text("healthy: no alarm", style="green")
    lines = Text()
    for alarm in found:
        lines.append(f"ALARM {alarm.cause}: ", "bold red").append(f"{printable(alarm.finding)}.\n")
        lines.append(f"  do: {alarm.advice}.\n")
    lines.rstrip()
    return lines


def _trends(values_NL: np.ndarray) -> list[str]:
    """Bars per layer over the whole run, from 0 to the layer's highest after the first tenth: a start may be far above."""
    points_BL = binned(values_NL, edges(len(values_NL), TREND_POINTS))
    top_L = np.nanmax(points_BL[len(points_BL) // 10 :], axis=0, initial=1e-9)
    levels_BL = np.nan_to_num((points_BL / top_L).clip(max=1) * (len(BARS) - 1), nan=-1).round().astype(int)
    return ["".join(" " if level < 0 else BARS[level] for level in column) for column in levels_BL.T]


def _shown(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
