"""Heatmaps of layers and experts: every expert's load at the start, in the middle and at the end, and over time.

Shape suffixes: S intervals that are read, L layers, E experts, B points in time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_global_lbl.metrics.measures import end_of_run
from megatron_global_lbl.report.chart import TICKS, Chart, Panel
from megatron_global_lbl.report.series import binned, edges, last_iterations, late, values

# Intervals that are read of each window: a mean over more would look the same, and 100,000 intervals would be gigabytes.
SAMPLE = 96
TIMES, MOMENTS = 150, 60  # points in time of MaxVio by layer, and of one layer's experts
WINDOWS_OF = 3  # runs that are shown at three times, more only at the end
Runs = list[tuple[str, Any]]


def end_load(run: Any) -> np.ndarray:
    """[L, E] mean load at the end of the run; 0 only for an expert that no interval looked at gave a token."""
    return _mean_load(run, end_of_run(run.steps), len(run.iterations))


def heatmaps(runs: Runs, ends: list[np.ndarray]) -> list[Chart]:
    """Loads, MaxVio by layer, and the experts of each run's most uneven layer; `ends` as `end_load` has it."""
    return [chart for chart in (_loads(runs, ends), _max_vio(runs), _one_layer(runs, ends)) if chart.panels]


def _loads(runs: Runs, ends: list[np.ndarray]) -> Chart:
    panels, told = [], []
    for (label, run), end_LE in zip(runs, ends):
        if not np.isfinite(end_LE).any():
            continue
        count, start = len(run.iterations), end_of_run(run.steps)
        windows, width = {"end": (start, count)}, count - start
        if len(runs) <= WINDOWS_OF and count > 2 * width:
            middle = (count - width) // 2
            windows = {"start": (0, width), "middle": (middle, middle + width)} | windows
        order_LE = np.argsort(np.nan_to_num(end_LE, nan=-1), axis=1, kind="stable")
        for name, (begin, stop) in windows.items():
            mean_LE = end_LE if name == "end" else _mean_load(run, begin, stop)
            when = f"iterations {run.iterations[begin] - run.steps[begin] + 1:,} to {run.iterations[stop - 1]:,}"
            load_LE = np.take_along_axis(mean_LE, order_LE, axis=1)
            panels.append(Panel(f"{label}, {name}: {when}", load_LE, run.layers, range(load_LE.shape[1]), when, order_LE))
        layer, expert = np.unravel_index(np.nanargmax(end_LE), end_LE.shape)
        uneven = 100 * np.nanmean((end_LE > 2) | (end_LE < 0.5))
        most = f"{end_LE[layer, expert]:.2f} times an even share (layer {run.layers[layer]}, expert {expert})"
        told.append(f"{label}: at the end at most {most}; {uneven:.0f} % have less than half or more than twice")
    caption = "A row per layer, its experts in the order of their loads at the end. Black: not one token."
    hover = "layer %{y}, expert %{text}<br>%{customdata:.3g} times an even share"
    look: Any = {"x_title": "experts, the fullest on the right", "scale": "load", "ticks": TICKS, "hover": hover, "columns": 3}
    alt = f"Load of every expert. {'; '.join(told)}."
    return Chart("load", "Load of every expert", caption, alt, panels=panels, **look)


def _max_vio(runs: Runs) -> Chart:
    panels, tops, told = [], [0.5], []
    for label, run in runs:
        starts_B = edges(len(run.iterations), TIMES)
        values_BL = binned(values(run, "max_vio"), starts_B)
        if len(run.layers) < 2 or not np.isfinite(values_BL).any():
            continue
        tops.append(float(np.nanmax(values_BL[len(values_BL) // 10 :], initial=0)))
        panels.append(Panel(label, values_BL.T, run.layers, last_iterations(run.iterations, starts_B).tolist()))
        worst = int(np.nan_to_num(values_BL[-1]).argmax())
        told.append(f"{label}: in the end at most {values_BL[-1, worst]:.3g}, in layer {run.layers[worst]}")
    ticks = {f"{max(tops) * part:.2g}": part for part in (0.0, 0.5, 1.0)}
    hover = "layer %{y}<br>MaxVio %{customdata:.3g}<br>iteration %{x:,}"
    look: Any = {"scale": "uneven", "high": max(tops), "ticks": ticks, "hover": hover, "columns": 2}
    caption = "A row per layer, time to the right: a row that darkens is a layer that becomes uneven."
    return Chart("max-vio-layers", "MaxVio by layer", caption, f"MaxVio by layer. {'; '.join(told)}.", panels=panels, **look)


def _one_layer(runs: Runs, ends: list[np.ndarray]) -> Chart:
    panels = []
    for (label, run), end_LE in zip(runs, ends):
        layer = int(np.nan_to_num(late(run, "max_vio"), nan=-1).argmax())
        at_B = last_iterations(np.arange(len(run.iterations)), edges(len(run.iterations), MOMENTS))
        load_BE = run.load(at_B)[:, layer]
        if len(at_B) > 1 and np.isfinite(load_BE).any():
            order_E = np.argsort(np.nan_to_num(end_LE[layer], nan=-1), kind="stable")
            about, times = f"layer {run.layers[layer]}", run.iterations[at_B].tolist()
            panels.append(Panel(f"{label}, {about}", load_BE.T[order_E], order_E.tolist(), times, about))
    hover = "expert %{y}<br>%{customdata:.3g} times an even share<br>iteration %{x:,}"
    look: Any = {"y_title": "expert", "scale": "load", "ticks": TICKS, "hover": hover, "columns": 2}
    title = "Experts of the most uneven layer"
    caption = "A row per expert, the fullest at the end on top; single intervals, time to the right."
    return Chart("load-layer", title, caption, f"{title}: {'; '.join(p.title for p in panels)}.", panels=panels, **look)


def _mean_load(run: Any, start: int, stop: int) -> np.ndarray:
    """[L, E] of evenly spaced intervals, a few at a time."""
    indices_S = np.unique(np.linspace(start, stop - 1, min(SAMPLE, stop - start)).round().astype(np.int64))
    total_LE: np.ndarray | float = 0.0
    known_LE: np.ndarray | int = 0
    for part_S in np.array_split(indices_S, -(-len(indices_S) // 32)):
        load_SLE = run.load(part_S)
        known_SLE = np.isfinite(load_SLE)
        total_LE = total_LE + np.where(known_SLE, load_SLE, 0).sum(axis=0, dtype=np.float64)
        known_LE = known_LE + known_SLE.sum(axis=0)
    return np.where(known_LE > 0, total_LE / np.maximum(known_LE, 1), np.nan)
