"""A long record in as many points as a picture can show: the mean over intervals, then over layers, and the worst.

Shape suffixes: N intervals, L layers, B points of a picture, at most POINTS.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from megatron_global_lbl.metrics.measures import WORST_IS_LEAST

POINTS = 300


@dataclass(frozen=True)
class Series:
    """One metric over time; `iterations` are the last of each point. [B]

    `mean`, `median` and `tail` (the 90th percentile towards the bad end) are over the layers' means within a point, `worst` is
    the worst single interval of any layer.
    """

    iterations: np.ndarray
    mean: np.ndarray
    median: np.ndarray
    tail: np.ndarray
    worst: np.ndarray

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.mean).any())


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
    extreme = np.fmin if low else np.fmax
    with warnings.catch_warnings():  # a point of which nothing is known is NaN, and a gap in the picture
        warnings.simplefilter("ignore", RuntimeWarning)
        return Series(
            last_iterations(iterations, starts_B),
            np.nanmean(layers_BL, axis=1),
            np.nanmedian(layers_BL, axis=1),
            np.nanpercentile(layers_BL, 10 if low else 90, axis=1),
            extreme.reduceat(extreme.reduce(values_NL, axis=1), starts_B),
        )


def late(values_NL: np.ndarray) -> np.ndarray:
    """Means over the last tenth of the intervals, per layer: where the run is, without the noise of one interval. [L]"""
    return binned(values_NL, np.array([len(values_NL) - max(1, len(values_NL) // 10)]))[0] if len(values_NL) else values_NL
