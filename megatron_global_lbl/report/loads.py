"""Pictures of layers by experts: each expert's load in the first, middle and last third, and which layer's MaxVio grows when.

Shape suffixes: N intervals, S of them read, L layers, E experts, B points in time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_global_lbl.report.series import binned, edges, last_iterations
from megatron_global_lbl.report.style import DEAD, LOADS, QUIET, UNEVEN, UNKNOWN, Picture, figure, png

THIRDS = ("first", "middle", "last")
# Intervals that are read of each third: a mean over more would look the same, and 100,000 intervals would be gigabytes.
SAMPLE = 96
LEAST, MOST = 1 / 4, 4.0  # of the colour scale, in even shares
ROW, GAP = 6, 1  # pixels of a layer and of the line between layers


def thirds(run: Any) -> list[Picture]:
    """One picture per third of the record, the experts of a layer in the same order in all of them."""
    count = len(run.iterations)
    number = min(3, count)
    bounds = [round(count * i / number) for i in range(number + 1)]
    means_LE = [_mean_load(run, start, stop) for start, stop in zip(bounds, bounds[1:])]
    order_LE = np.argsort(np.nan_to_num(means_LE[-1], nan=-1), axis=1, kind="stable")
    names = THIRDS if number == 3 else ("first", "last") if number == 2 else ("only",)
    pictures = []
    for name, mean_LE, start, stop in zip(names, means_LE, bounds, bounds[1:]):
        first = int(run.iterations[start - 1]) + 1 if start else 1
        last = int(run.iterations[stop - 1])
        drawn = _experts(np.take_along_axis(mean_LE, order_LE, axis=1), run.layers)
        when = {"first": "First third", "middle": "Middle third", "last": "Last third", "only": "Whole record"}[name]
        when = when if number == 3 or name == "only" else f"{name.capitalize()} half"
        pictures.append(
            Picture(f"load-{name}", f"{when}: iterations {first:,} to {last:,}", "", _told(mean_LE, run.layers), png(drawn))
        )
    return pictures


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


def _experts(load_LE: np.ndarray, layers: list[str]) -> Figure:
    norm = LogNorm(LEAST, MOST, clip=True)
    shown_LEC = LOADS(norm(np.nan_to_num(load_LE, nan=1)))
    shown_LEC[load_LE == 0] = to_rgba(DEAD)
    shown_LEC[np.isnan(load_LE)] = to_rgba(UNKNOWN)
    drawn, axes = _rows(shown_LEC, layers, width=3.6)
    axes.set_xlabel(f"{load_LE.shape[1]} experts, the fullest on the right", fontsize=9)
    axes.set_xticks([])
    _scale(drawn, axes, norm, LOADS, [0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "even", "2x", "4x"])
    return drawn


def max_vio(run: Any) -> Picture:
    """A row per layer over time."""
    starts_B = edges(len(run.iterations), 200)
    values_BL = binned(run.metrics["max_vio"], starts_B)
    iterations_B = last_iterations(run.iterations, starts_B)
    settled = values_BL[len(values_BL) // 10 :]
    top = float(np.nanmax(settled)) if np.isfinite(settled).any() else 1.0
    norm = Normalize(0, max(top, 0.5), clip=True)
    shown_LBC = UNEVEN(norm(np.nan_to_num(values_BL.T)))
    shown_LBC[np.isnan(values_BL.T)] = to_rgba(UNKNOWN)
    drawn, axes = _rows(shown_LBC, run.layers, width=5.2)
    last = int(iterations_B[-1])
    ticks = MaxNLocator(6, integer=True).tick_values(int(iterations_B[0]), last)
    ticks = [tick for tick in ticks if iterations_B[0] <= tick <= last]
    axes.set_xticks([np.interp(tick, iterations_B, np.arange(len(iterations_B))) for tick in ticks])
    axes.set_xticklabels([EngFormatter(sep="")(tick) for tick in ticks])
    axes.set_xlabel("iteration")
    _scale(drawn, axes, norm, UNEVEN, None, None)
    late_L = values_BL[-1]
    worst = int(np.nanargmax(late_L)) if np.isfinite(late_L).any() else 0
    return Picture(
        "max-vio-layers",
        "MaxVio by layer",
        "One row per layer, time to the right, dark is uneven: a row that darkens is a layer that gets away.",
        f"At iteration {last} the highest MaxVio is {late_L[worst]:.3g}, in layer {run.layers[worst]}.",
        png(drawn),
    )


def _rows(shown_LXC: np.ndarray, layers: list[str], *, width: float) -> tuple[Figure, Axes]:
    """An image with a row per layer and a white line between them."""
    count = len(layers)
    drawn, axes = figure(width, min(4.4, max(2.1, 1.1 + 0.07 * count)))
    image = np.ones((count * (ROW + GAP) - GAP, *shown_LXC.shape[1:]))
    for layer in range(count):
        image[layer * (ROW + GAP) : layer * (ROW + GAP) + ROW] = shown_LXC[layer]
    axes.imshow(image, aspect="auto", interpolation="nearest", interpolation_stage="rgba")
    every = -(-count // 15)
    named = [i for i in range(count) if i % every == 0 or i == count - 1 and count % every > every / 2]
    axes.set_yticks([i * (ROW + GAP) + ROW / 2 - 0.5 for i in named], [layers[i] for i in named])
    axes.set_ylabel("layer")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return drawn, axes


def _scale(
    drawn: Figure, axes: Axes, norm: Normalize, colours: Any, ticks: list[float] | None, names: list[str] | None
) -> None:
    bar = drawn.colorbar(ScalarMappable(norm, colours), ax=axes, location="top", aspect=40, shrink=0.75, pad=0.02)
    if ticks is not None:
        bar.set_ticks(ticks, labels=names)
    bar.ax.tick_params(length=0, labelsize=9, colors=QUIET)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)  # type: ignore[operator]


def _told(load_LE: np.ndarray, layers: list[str]) -> str:
    if not np.isfinite(load_LE).any():
        return "Loads of the experts: not in the record."
    layer, expert = np.unravel_index(np.nanargmax(load_LE), load_LE.shape)
    uneven = np.mean((load_LE > 2) | (load_LE < 0.5))
    return (
        f"Loads of the experts: the fullest has {load_LE[layer, expert]:.2f} times an even share (layer {layers[layer]}, "
        f"expert {expert}); {100 * uneven:.0f} % of the experts have less than half or more than twice."
    )
