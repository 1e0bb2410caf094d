"""A chart as data: drawn by page.js with Plotly on the page, by paper.py with Matplotlib for a paper.

Colours have a contrast of 3 to 1 or more on white and on the dark page; dashes tell lines apart without them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.record import printable

COLOURS = ("#2b7bba", "#d95f02", "#1b9e77", "#9a6bc4", "#e7298a", "#a6761d", "#1295a8", "#7f7f7f")
DASHES = ("solid", "6px,3px", "2px,2px", "9px,3px,2px,3px")
DEAD = "#000000"
# The middle of the loads is grey, so that even rows are no gap; orange and purple differ for every colour vision.
SCALES = {
    "load": ["#8c4a00", "#e08214", "#fdc57f", "#e6e6e6", "#b9a8d6", "#7b5aa6", "#3a0a66"],
    "uneven": ["#e9eef2", "#9ecae1", "#3182bd", "#08306b", "#021026"],
    "share": ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"],
}
# The scale of loads, in doublings of an even share, above a stripe for what is dead.
LEAST, MOST, STRIPE = -2.0, 2.0, 0.1
TICKS = {"dead": 0.0, "1/4": 0.1, "1/2": 0.325, "even": 0.55, "2x": 0.775, "4x": 1.0}


def on_scale(load: np.ndarray) -> np.ndarray:
    """Where a load is on its colour scale, 0 to 1."""
    with np.errstate(divide="ignore"):
        doublings = np.clip(np.log2(load), LEAST, MOST)
    return np.where(load == 0, 0.0, STRIPE + (1 - STRIPE) * (doublings - LEAST) / (MOST - LEAST))


def stops(scale: str) -> list[tuple[float, str]]:
    """The colours of a scale with their places, 0 to 1."""
    colours = SCALES[scale]
    begin = STRIPE if scale == "load" else 0.0
    found = [(begin + (1 - begin) * i / (len(colours) - 1), colour) for i, colour in enumerate(colours)]
    return [(0.0, DEAD), (begin / 2, DEAD), (begin / 2, colours[0]), *found] if scale == "load" else found


class _Safe:
    """Names of others are made printable as soon as they are part of a chart."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            texts = [printable(one) if isinstance(one, str) else one for one in value] if isinstance(value, list) else value
            object.__setattr__(self, name, printable(value) if isinstance(value, str) else texts)


@dataclass(frozen=True)
class Line(_Safe):
    """A curve; with `low` and `high` a band around it. `look` is its colour and dashes, `about` what the pointer is told, once
    or per point."""

    label: str
    x: Sequence[Any] | np.ndarray
    y: np.ndarray
    look: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    thin: bool = False
    about: str | list[str] = ""


@dataclass(frozen=True)
class Panel(_Safe):
    """A heatmap: values [rows, columns]; `experts` names the expert of every cell."""

    title: str
    values: np.ndarray
    rows: Sequence[Any]
    columns: Sequence[Any]
    about: str = ""
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Chart(_Safe):
    """Lines, or panels on one colour scale. `name` is the stem of its PNG, `alt` what it shows in words; `hover` is a template
    of Plotly's with %{y} row, %{x} column, %{customdata} value, %{text} expert."""

    name: str
    title: str
    caption: str
    alt: str
    lines: list[Line] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    x_title: str = "iteration"
    y_title: str = "layer"
    y_range: tuple[float, float] | None = None
    reference: float | None = None
    scale: str = "share"
    high: float = 1.0
    ticks: dict[str, float] = field(default_factory=dict)  # of the colour scale, 0 to 1
    hover: str = ""
    columns: int = 1
    left_out: int = 0  # panels, for the size of the page

    def as_json(self) -> dict[str, Any]:
        """For page.js: matrices are packed once each, and named by their places."""
        pool: dict[int, dict[str, Any]] = {}
        result = _plain(vars(self), pool)
        return result | {"stops": stops(self.scale), "matrices": list(pool.values())}


def _plain(value: Any, pool: dict[int, dict[str, Any]]) -> Any:
    if isinstance(value, (Line, Panel)):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(of_key, pool) for key, of_key in value.items()}
    if isinstance(value, np.ndarray) and value.ndim == 2:
        pool[id(value)] = pool.get(id(value)) or _packed(value)
        return list(pool).index(id(value))
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return [_plain(one, pool) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def _packed(matrix: np.ndarray) -> dict[str, Any]:
    """As 16-bit integers: exact if they are integers, else within 1/65,533 of the largest; 0 is exact, 65,535 is not known."""
    top = 65533.0 if matrix.dtype.kind in "iu" else float(np.nanmax(matrix, initial=0)) or 1.0
    known = np.isfinite(matrix)
    steps = np.where((matrix > 0) & known, np.maximum(np.nan_to_num(matrix) / top * 65533, 1).round(), 0)
    data = np.where(known, steps, 65535).astype("<u2")
    return {"shape": matrix.shape, "top": top, "data": base64.b64encode(data.tobytes()).decode()}
