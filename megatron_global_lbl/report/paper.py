"""Charts as PNG files, with Matplotlib and without pyplot, so that the figures and settings of a notebook stay as they are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_global_lbl.report.chart import COLOURS, DASHES, Chart, on_scale, stops
from megatron_global_lbl.report.text import slugs

SETTINGS: Any = {
    **{"font.family": "DejaVu Sans", "font.size": 10, "figure.facecolor": "white", "lines.linewidth": 1.6},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999", "axes.grid": True},
    **{"axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.6},
    **{"legend.frameon": False, "legend.fontsize": 9, "text.parse_math": False},  # a "$" in a name is one
}


def write_pngs(charts: list[Chart], out: Path) -> list[Path]:
    """A file per chart, named after it; where several are called alike, also after what they are of."""
    names = [chart.name for chart in charts]
    stems = [c.name if names.count(c.name) == 1 else f"{c.name}-{c.title.rpartition(', ')[2]}" for c in charts]
    files = [out / f"{stem}.png" for stem in slugs(stems)]
    for file, chart in zip(files, charts):
        file.write_bytes(png(chart))
    return files


def png(chart: Chart) -> bytes:
    """The same bytes for the same data: without the date and the version of what drew it."""
    with rc_context(SETTINGS):
        drawn = _panels(chart) if chart.panels else _lines(chart)
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _lines(chart: Chart) -> Figure:
    named = [line for line in chart.lines if not line.thin]
    longest = max((len(line.label) for line in named), default=1)
    columns = max(1, min(len(named), 66 // (longest + 8)))
    drawn = Figure(figsize=(5.2, 2.7 + 0.2 * -(-len(named) // columns)), layout="constrained")
    axes = drawn.subplots()
    if chart.reference is not None:
        axes.axhline(chart.reference, color="#999999", linewidth=0.8)
    handles = []
    for line in chart.lines:
        look: dict[str, Any] = {"color": COLOURS[line.look % len(COLOURS)], "linestyle": _dash(line.look)}
        look |= {"marker": "o", "markersize": 3.5} if len(line.x) < 3 else {}
        look |= {"linewidth": 0.7, "alpha": 0.75} if line.thin else {}
        (drawn_line,) = axes.plot(line.x, line.y, **look)
        handles += [] if line.thin else [drawn_line]
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.2, linewidth=0)
    axes.set_ylim(chart.y_range)
    axes.set_xlabel(chart.x_title)
    axes.xaxis.set_major_locator(MaxNLocator(12 if chart.x_title == "layer" else 6, integer=True))
    if chart.x_title != "layer":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # Matplotlib leaves out names that begin with "_".
    names = [f"\u200b{line.label}" if line.label.startswith("_") else line.label for line in named]
    drawn.legend(handles, names, loc="outside upper left", ncols=columns, borderpad=0, columnspacing=1.4)
    return drawn


def _dash(look: int) -> Any:
    dash = DASHES[(look + look // len(COLOURS)) % len(DASHES)]
    return "-" if dash == "solid" else (0, tuple(float(part.removesuffix("px")) / 1.5 for part in dash.split(",")))


def _panels(chart: Chart) -> Figure:
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    height = max(1.6, min(3.6, 0.9 + 0.1 * max(len(panel.rows) for panel in chart.panels)))
    drawn = Figure(figsize=(10.8 if columns > 1 else 5.4, height * rows + 0.6), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False)
    colours = LinearSegmentedColormap.from_list(chart.scale, stops(chart.scale), N=1024)  # what is not known is no colour
    for axes, panel in zip(grid.flat, chart.panels):
        shown = on_scale(panel.values) if chart.scale == "load" else panel.values / chart.high
        axes.imshow(shown, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(chart.x_title)
        axes.set_ylabel(chart.y_title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        every = -(-len(panel.rows) // 12)
        axes.set_yticks(range(0, len(panel.rows), every), [str(row) for row in panel.rows[::every]])
        names, last = isinstance(panel.columns[0], str), len(panel.columns) - 1
        at = np.unique(np.linspace(0, last, last + 1 if names else min(5, last + 1)).astype(int))
        at = at if panel.experts is None else at[:0]  # the place of an expert says nothing
        axes.set_xticks(at, [str(panel.columns[i]) for i in at], rotation=35 if names else 0, ha="right")
    for axes in grid.flat[len(chart.panels) :]:
        axes.set_axis_off()
    bar = drawn.colorbar(ScalarMappable(cmap=colours), ax=grid, pad=0.01, aspect=30)
    bar.set_ticks(list(chart.ticks.values()), labels=list(chart.ticks))
    bar.outline.set_visible(False)  # type: ignore[operator]
    return drawn
