"""A long record in as many points as a chart can show.

Shape suffixes: N intervals, L layers, B points of a chart, at most POINTS.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.measures import WORST_IS_LEAST, end_of_run

POINTS = 300


@dataclass(frozen=True)
class Series:
    """One metric over time; `iterations` are the last of each point. [B]

    `middle` is the mean over layers (of dead experts the sum), `median` and `tail` (the 90th percentile towards the bad end)
    are over the layers' means within a point; `worst` is the worst interval of any layer, `worst_layer` that layer's index.
    """

    iterations: np.ndarray
    middle: np.ndarray
    median: np.ndarray
    tail: np.ndarray
    worst: np.ndarray
    worst_layer: np.ndarray

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.middle).any())


def late(run: Any, name: str) -> np.ndarray:
    """The metric's mean over the end of the run, per layer; NaN where it is not known. [L]"""
    values_NL = values(run, name)[end_of_run(run.steps) :]
    return binned(values_NL, np.zeros(1, dtype=np.int64))[0]


def mean(value_L: np.ndarray) -> float:
    """Of the known values."""
    return float(np.nanmean(value_L)) if np.isfinite(value_L).any() else np.nan


def values(run: Any, name: str) -> np.ndarray:
    """[N, L]; NaN throughout if the record does not have the metric."""
    found = run.metrics.get(name)
    return np.full((len(run.iterations), len(run.layers)), np.nan, dtype=np.float32) if found is None else found


def edges(count: int, points: int = POINTS) -> np.ndarray:
    """First interval of each point."""
    return np.unique(np.linspace(0, count, min(points, count), endpoint=False).astype(np.int64))


def last_iterations(iterations: np.ndarray, starts_B: np.ndarray) -> np.ndarray:
    """Last iteration of each point."""
    return iterations[np.append(starts_B[1:], len(iterations)) - 1]


def binned(values_NL: np.ndarray, starts_B: np.ndarray) -> np.ndarray:
    """Means of the known values of each point, [B, L]; NaN where none is known."""
    known_NL = np.isfinite(values_NL)
    sums_BL = np.add.reduceat(np.where(known_NL, values_NL, 0), starts_B, axis=0, dtype=np.float64)
    count_BL = np.add.reduceat(known_NL, starts_B, axis=0, dtype=np.int64)
    return np.where(count_BL > 0, sums_BL / np.maximum(count_BL, 1), np.nan)


def over_layers(iterations: np.ndarray, values_NL: np.ndarray, name: str) -> Series:
    """The series of a metric of that name."""
    starts_B = edges(len(iterations))
    layers_BL = binned(values_NL, starts_B)
    low = name in WORST_IS_LEAST
    parts = np.split(np.nan_to_num(-values_NL if low else values_NL, nan=-np.inf), starts_B[1:])
    at_B, worst_B = np.array([(part.argmax() % part.shape[1], part.max()) for part in parts]).T
    worst_B = np.where(np.isfinite(worst_B), -worst_B if low else worst_B, np.nan)
    with warnings.catch_warnings():  # a point of which nothing is known is NaN, and a gap in the chart
        warnings.simplefilter("ignore", RuntimeWarning)
        middle_B = np.nanmean(layers_BL, axis=1)
        if name == "dead":
            middle_B = np.where(np.isfinite(middle_B), np.nansum(layers_BL, axis=1), np.nan)
        median_B, tail_B = np.nanmedian(layers_BL, axis=1), np.nanpercentile(layers_BL, 10 if low else 90, axis=1)
    return Series(last_iterations(iterations, starts_B), middle_B, median_B, tail_B, worst_B, at_B.astype(int))
