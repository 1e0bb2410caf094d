"""How the pictures look: Okabe and Ito's colours (told apart with any colour vision), quiet axes, PNG without a display.

No pyplot: a report must not touch the settings or the figures of a notebook that makes one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, QUIET, LINES = "#1a1a1a", "#555555", "#dddddd"
# Several runs: also told apart without colours.
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, AMBER, SKY)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), "-", (0, (5, 1.5)))
# Orange and purple differ for every colour vision. The middle is grey, so that even rows are no gap between layers.
LOADS = LinearSegmentedColormap.from_list(
    "loads", ["#8c4a00", "#e08214", "#fdc57f", "#e6e6e6", "#b9a8d6", "#7b5aa6", "#3a0a66"]
)
UNEVEN = LinearSegmentedColormap.from_list("uneven", ["#e9eef2", "#9ecae1", "#3182bd", "#08306b", "#021026"])
DEAD, UNKNOWN = "#000000", "#ffffff"

DPI = 200
SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINES,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A PNG with what is said about it; `name` is the stem of its file, `alt` what it shows in words; a `wide` one has a row to
    itself.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes
    wide: bool = False


def styled() -> Any:
    """The context in which figures are made and drawn."""
    return rc_context(SETTINGS)


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """One panel of that size in inches."""
    result = Figure(figsize=(width, height), layout="constrained")
    return result, result.subplots()


def png(drawn: Figure) -> bytes:
    """The figure's bytes, the same for the same data: without the date and the version of what drew it."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
