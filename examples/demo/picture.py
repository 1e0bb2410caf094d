"""The demo's picture: which experts each domain uses with either scope, and held-out loss against evenness of all runs.

Shape suffixes: D domains, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a machine without a display

import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes

from demo.results import Result

# Of the palette of Okabe and Ito, which colour-blind readers tell apart.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, QUIET = "#1a1a1a", "#555555"

COLOURS = {"micro": VERMILION, "dp": QUIET, "global": BLUE}
SETTINGS: Any = {"font.family": "DejaVu Sans", "font.size": 14, "text.color": INK, "axes.labelcolor": INK, "axes.titlesize": 17}


def draw(results: list[Result], path: Path) -> None:
    """Heat maps of the runs with the first run's coefficient, on one scale, and a point per run beside them."""
    coefficient = results[0].run.coefficient
    shown = [result for result in results if result.run.coefficient == coefficient]
    times_even = [result.experts.shares_DLE[:, -1] * result.experts.num_experts for result in shown]
    top = max(times_DE.max() for times_DE in times_even)
    widths = (4.7 * len(shown) + 1.6, 4.4)
    with plt.rc_context(SETTINGS):
        figure = plt.figure(figsize=(sum(widths), 4.8), dpi=120, layout="constrained")
        maps, points = figure.subfigures(1, 2, width_ratios=widths, squeeze=False)[0]
        panels = maps.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, result, times_DE in zip(panels, shown, times_even):
            cells = times_DE[:, _by_favourite(times_DE)]
            image = axes.pcolormesh(cells, cmap="YlGnBu", vmin=0, vmax=top, edgecolors="white", linewidth=1.5)
            axes.set_ylim(len(cells), 0)
            axes.set_title(_label(result, ", coefficient "), color=COLOURS[result.run.scope], weight="bold")
            axes.set_xlabel(f"{result.experts.num_experts} experts of layer {result.experts.layers[-1]}")
            axes.set_xticks([])
            axes.set_yticks(numpy.arange(len(cells)) + 0.5, result.experts.names)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        bar = maps.colorbar(image, ax=panels, pad=0.02, aspect=28)
        bar.set_label("load (1: even share)")
        bar.outline.set_visible(False)  # type: ignore[operator]
        _loss_against_evenness(points.subplots(), results)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def _loss_against_evenness(axes: Axes, results: list[Result]) -> None:
    for result in results:
        colour = COLOURS[result.run.scope]
        axes.plot(result.max_vio, result.loss, "o", color=colour, markersize=12)
        name = axes.annotate(_label(result), (result.max_vio, result.loss), (0, 11), textcoords="offset points")
        name.set(color=colour, weight="bold", ha="center")
    axes.margins(0, 0.3)
    axes.set_xlim(0, 1.35 * max(result.max_vio for result in results))
    axes.set_xlabel("MaxVio (0: even load)")
    axes.set_title("held-out loss")
    axes.spines[["top", "right"]].set_visible(False)
    arrow = {"arrowstyle": "->", "color": QUIET}
    axes.annotate("better", (0.02, 0.02), (0.13, 0.06), xycoords="axes fraction", color=QUIET, arrowprops=arrow)


def _label(result: Result, between: str = " ") -> str:
    return f"{result.run.scope}{between}{result.run.coefficient:g}"


def _by_favourite(shares_DE: numpy.ndarray) -> numpy.ndarray:
    """Order of the experts: by the domain that uses each the most, then by how much. Their own numbers mean nothing."""
    return numpy.lexsort((-shares_DE.max(axis=0), shares_DE.argmax(axis=0)))
