"""Charts over time: what was measured per interval, a colour per run, or for one run also where most layers are."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_global_lbl.report.chart import Chart, Line
from megatron_global_lbl.report.series import Series, edges, last_iterations, over_layers, values

# In this order; what else a record holds follows under its own name.
MEASURES = {
    "lbl_global": ("LBL over the global batch", "1.0 is even; rises if the load over whole steps becomes uneven."),
    "lbl_micro": (
        "LBL within micro-batches",
        "1.0 is even; may rise as experts specialise.",
    ),
    "max_vio": ("MaxVio", "Largest load / mean load - 1, so 1 is twice an even share. Low and flat is good."),
    "dead": ("Dead experts", "Experts without a token in an interval, sum over all layers. Should fall to 0 and stay there."),
    "entropy": ("Entropy of the load", "1 is even; a worst layer that sinks uses fewer and fewer experts."),
    "uncertainty": (
        "Uncertainty of the router",
        "Entropy of a token's scores; 1: the router does not choose.",
    ),
    "cv": ("Coefficient of variation", "Standard deviation of the load / mean load; 0 is even."),
}
# What a chart shows at least, and what cannot be exceeded.
BOUNDS = {"lbl_global": (1.0, np.inf), "lbl_micro": (1.0, np.inf), "dead": (0.0, np.inf)}
BOUNDS |= {"entropy": (np.inf, 1.0), "uncertainty": (np.inf, 1.0)}
WORST_OF = 4  # runs in one chart whose worst layers are shown, too


def curves(runs: list[tuple[str, Any]]) -> list[Chart]:
    """The Balance BSZ, and a chart per measure that any of the runs has."""
    others = sorted({name for _, run in runs for name in run.metrics} - set(MEASURES))
    return [chart for chart in (_balance_bsz(runs), *(_curve(name, runs) for name in [*MEASURES, *others])) if chart]


def _curve(name: str, runs: list[tuple[str, Any]]) -> Chart | None:
    lines, parts, told = [], [], []
    for i, (label, run) in enumerate(runs):
        series = over_layers(run.iterations, values(run, name), name)
        if not series.known:
            continue
        whole, x = name == "dead", series.iterations
        low, high = (series.median, series.tail) if len(runs) == 1 and not whole else (None, None)
        lines.append(Line(label, x, series.middle, i, low, high, about="all layers" if whole else "mean of the layers"))
        parts += [part for part in (series.middle, low, high) if part is not None]
        if len(runs) <= WORST_OF and len(run.layers) > 1:
            worst = [f"worst: layer {run.layers[at]}" for at in series.worst_layer]
            lines.append(Line(label, x, series.worst, i, thin=True, about=worst))
            parts.append(series.worst)
        told.append(f"{label}: {_told(series)}")
    if not lines or name == "dead" and not any((part > 0).any() for part in parts):
        return None
    title, caption = MEASURES.get(name, (name, ""))
    y_range, cut = _range(parts, name)
    alt, reference = f"{title}. {'; '.join(told)}.", 1.0 if name.startswith("lbl") else None
    return Chart(name.replace("_", "-"), title, caption + cut, alt, lines, y_range=y_range, reference=reference)


def _balance_bsz(runs: list[tuple[str, Any]]) -> Chart | None:
    """Of single intervals: a mean of two settings would be neither."""
    lines = []
    for i, (label, run) in enumerate(runs):
        if np.isfinite(run.sequences).any():
            at = last_iterations(np.arange(len(run.sequences)), edges(len(run.sequences)))
            lines.append(Line(label, run.iterations[at], run.sequences[at], i, about="sequences"))
    if not lines:
        return None
    told = "; ".join(f"{line.label}: {line.y[0]:g} sequences at first, {line.y[-1]:g} in the end" for line in lines)
    caption = "Sequences over which f is counted, as measured: with 32 four fifths of the gain, flat from 128 (paper)."
    top = 1.08 * max(float(np.nanmax(line.y)) for line in lines)
    return Chart("balance-bsz", "Balance BSZ", caption, f"Balance BSZ. {told}.", lines, y_range=(0, top))


def _range(parts: list[np.ndarray], name: str) -> tuple[tuple[float, float], str]:
    """Of the y axis. The first tenth of a training may be far from all that follows: it is cut off then, and said."""
    everything = np.concatenate(parts)
    settled = np.concatenate([part[len(part) // 10 :] for part in parts])
    settled = settled if np.isfinite(settled).any() else everything
    (all_low, all_high), (low, high) = ((float(np.nanmin(v)), float(np.nanmax(v))) for v in (everything, settled))
    floor, ceiling = BOUNDS.get(name, (np.inf, np.inf))
    low = min(low, floor)
    least = 0.005 * max(abs(low), abs(high), 0.05)  # noise in the last digit is no curve
    middle, span = (low + high) / 2, high - low
    low, high = min(low, middle - least), max(high, middle + least)
    cut = [value for value, far in ((all_high, all_high > high + 2 * span), (all_low, all_low < low - 2 * span)) if far]
    if not cut:
        low, high = min(low, all_low), max(high, all_high)
    margin = 0.06 * (high - low)
    text = f" The start is cut off, {'up' if cut[0] == all_high else 'down'} to {cut[0]:.3g}." if cut else ""
    return (low - margin, min(high + margin, max(high, ceiling) + margin / 4)), text


def _told(series: Series) -> str:
    """In words, for those who do not see it."""
    known = np.flatnonzero(np.isfinite(series.middle))
    at = [f"{series.middle[i]:.3g} at iteration {series.iterations[i]}" for i in (known[0], known[-1])]
    return f"{at[0]}, {at[1]}, worst layer {series.worst[known[-1]]:.3g}"
