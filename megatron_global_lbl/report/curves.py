"""Pictures over time: a metric's mean over layers, where most layers are, and the worst; and several runs beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from megatron_global_lbl.report.series import Series, over_layers
from megatron_global_lbl.report.style import BLUE, COLOURS, DASHES, QUIET, VERMILION, Picture, figure, png

WIDTH, HEIGHT = 5.2, 2.9
# What a picture shows at least, and what cannot be exceeded.
BOUNDS = {"lbl_global": (1.0, np.inf), "dead": (0.0, np.inf), "entropy": (np.inf, 1.0), "uncertainty": (np.inf, 1.0)}
PARTS = ("mean", "median", "tail", "worst")


def lbl(run: Any) -> Picture:
    """Global and micro-batch LBL in one picture."""
    whole, micro = series(run, "lbl_global"), series(run, "lbl_micro")
    drawn, axes = figure(WIDTH, HEIGHT)
    axes.axhline(1, color="#999999", linewidth=0.8)
    for values, colour, label in ((micro, VERMILION, "within micro-batches"), (whole, BLUE, "over the global batch")):
        if values.known:
            _band(axes, values, colour, label)
    _finish(axes, [whole, micro], "lbl_global")
    _legend(drawn)
    return Picture(
        "lbl",
        "Load-balancing loss",
        "1.0 is even: blue, over the global batch, should stay close to it, while orange, within micro-batches, may rise as "
        "experts specialise (line: mean of the layers; band: from the median layer to the 90th percentile; thin: the worst).",
        f"Over the global batch: {_told(whole)}. Within micro-batches: {_told(micro)}.",
        png(drawn),
    )


def max_vio(run: Any) -> Picture:
    """MaxVio over time."""
    return _one(
        run,
        "max_vio",
        "MaxVio",
        "How far the fullest expert is above its even share (1 = twice the share): low and flat is good, and a worst layer "
        "(thin line) that keeps climbing away from the mean is the one to look at.",
    )


def dead(run: Any) -> Picture | None:
    """Experts without a selection; no picture of a line at zero."""
    if not np.nanmax(run.metrics["dead"], initial=0) > 0:
        return None
    return _one(
        run,
        "dead",
        "Dead experts",
        "Experts of a layer that took no token in an interval (line: mean of the layers, thin: the worst): it should fall "
        "to 0 after the start and stay there.",
    )


def entropy(run: Any) -> Picture:
    """Entropy of the load."""
    return _one(
        run,
        "entropy",
        "Entropy of the load",
        "1 is an even load over all experts of a layer: a worst layer (thin line) that sinks is using fewer and fewer of them.",
    )


def uncertainty(run: Any) -> Picture | None:
    """Mean entropy of the router's scores."""
    if not series(run, "uncertainty").known:
        return None
    return _one(
        run,
        "uncertainty",
        "Uncertainty of the router",
        "1 is a router that finds all experts alike for every token: it sinks as the router learns to choose, and a layer near "
        "0 hardly compares experts any more.",
    )


def comparison(runs: list[tuple[str, Any]], name: str, title: str, caption: str) -> Picture | None:
    """The mean over layers of one metric, a line per run."""
    all_of = [(label, series(run, name)) for label, run in runs]
    all_of = [(label, values) for label, values in all_of if values.known]
    if not all_of:
        return None
    drawn, axes = figure(WIDTH, HEIGHT)
    if name.startswith("lbl"):
        axes.axhline(1, color="#999999", linewidth=0.8)
    for i, (label, values) in enumerate(all_of):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        axes.plot(values.iterations, values.mean, label=label, **_points(values), **style)
    _finish(axes, [values for _, values in all_of], name, only_means=True)
    _legend(drawn)
    alt = "; ".join(f"{label}: {_told(values)}" for label, values in all_of)
    return Picture(f"compare-{name}", title, caption, f"{alt}.", png(drawn))


def series(run: Any, name: str) -> Series:
    """The metric's series; NaN throughout where the record does not have it."""
    values_NL = run.metrics.get(name)
    if values_NL is None:
        values_NL = np.full((len(run.iterations), len(run.layers)), np.nan, dtype=np.float32)
    return over_layers(run.iterations, values_NL, name)


def _one(run: Any, name: str, title: str, caption: str) -> Picture:
    values = series(run, name)
    drawn, axes = figure(WIDTH, HEIGHT)
    if values.known:
        _band(axes, values, BLUE, "mean of the layers")
    _finish(axes, [values], name)
    return Picture(name.replace("_", "-"), title, caption, f"{title}: {_told(values)}.", png(drawn))


def _band(axes: Axes, values: Series, colour: str, label: str) -> None:
    axes.fill_between(values.iterations, values.median, values.tail, color=colour, alpha=0.22, linewidth=0)
    axes.plot(values.iterations, values.worst, color=colour, linewidth=0.7, alpha=0.75, **_points(values))
    axes.plot(values.iterations, values.mean, color=colour, label=label, **_points(values))


def _points(values: Series) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5, "clip_on": False} if len(values.iterations) < 3 else {}


def _legend(drawn: Figure) -> None:
    """Above the curves: never over one of them."""
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    if handles:
        fits = 66 // (max(map(len, labels)) + 8)  # characters across the picture
        columns = max(1, min(len(labels), fits))
        drawn.legend(handles, labels, loc="outside upper left", ncols=columns, borderpad=0, columnspacing=1.4)


def _finish(axes: Axes, shown: list[Series], name: str, *, only_means: bool = False) -> None:
    """Scale, labels and legend."""
    known = [v for v in shown if v.known]
    if known:
        _scale(axes, [getattr(v, part) for v in known for part in (["mean"] if only_means else PARTS)], name)
    else:
        axes.text(0.5, 0.5, "not in the record", transform=axes.transAxes, ha="center", color=QUIET)
        axes.set_yticks([])
    first, last = min(int(v.iterations[0]) for v in shown), max(int(v.iterations[-1]) for v in shown)
    alone = max(len(v.iterations) for v in shown) == 1
    axes.set_xlim(first - alone, last + alone)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("iteration")


def _scale(axes: Axes, curves: list[np.ndarray], name: str) -> None:
    """Limits of the y axis. The first tenth of a training may be far from all that follows: it is cut off then, and said."""
    values = np.concatenate(curves)
    settled = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    (all_low, all_high), (low, high) = _range(values), _range(settled if np.isfinite(settled).any() else values)
    floor, ceiling = BOUNDS.get(name, (np.inf, np.inf))
    low = min(low, floor)
    least = 0.005 * max(abs(low), abs(high), 0.05)  # noise in the last digit is no curve
    middle = (low + high) / 2
    low, high = min(low, middle - least), max(high, middle + least)
    span = high - low
    cut = [value for value, far in ((all_high, all_high > high + 2 * span), (all_low, all_low < low - 2 * span)) if far]
    if not cut:
        low, high = min(low, all_low), max(high, all_high)
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, min(high + margin, max(high, ceiling) + margin / 4))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=high > 50))
    axes.ticklabel_format(axis="y", useOffset=False)
    if cut:
        text = f"start cut off, {'up' if cut[0] == all_high else 'down'} to {cut[0]:.3g}"
        axes.set_title(text, loc="left", fontsize=9, color=QUIET, pad=4)


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(np.nanmin(values)), float(np.nanmax(values))


def _told(values: Series) -> str:
    """A series in words, for those who do not see it."""
    known = np.flatnonzero(np.isfinite(values.mean))
    if len(known) == 0:
        return "not in the record"
    first, last = known[0], known[-1]
    return (
        f"mean of the layers {values.mean[first]:.3g} at iteration {values.iterations[first]}, {values.mean[last]:.3g} at "
        f"iteration {values.iterations[last]}, worst layer {values.worst[last]:.3g}"
    )
