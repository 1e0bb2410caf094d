"""Does the load of the experts swing? Its autocorrelation says so: clearly negative at half a period.

A correction that comes late overshoots: experts that were too full are pushed away until they are too empty. Noise has no
autocorrelation, and what drifts slowly has a positive one at the lags that are looked at. Swings shorter than two intervals are
averaged away before they are recorded, and those of two intervals here: a blend that goes round more domains than a step has
sequences makes the load jump to and fro whatever the loss does.
Shape suffixes: N intervals, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_INTERVALS = 256
LEAST_INTERVALS = 128  # before, the start of a training is most of it
# Lags up to N / 8. Random walks and decays of N intervals are at +0.1 or more there, but down to -0.5 at N / 4 (simulated).
LARGEST_LAG = 1 / 8
# Beyond what real Megatron showed in any 128 or 256 of 800 steps, the lower of two layers (docs/operations.md): micro -0.39,
# global -0.33, window -0.36, -0.39 and -0.34 with 1, 4 and 16 steps. A load that swings as a whole comes near -1.
AUTOCORRELATION = -0.5
# Smaller departures than a tenth of an even share do no harm.
LEAST_SIZE = 0.1


@dataclass(frozen=True)
class Swing:
    """`period` in intervals; `size`: root mean square of the loads' departure from their trend, 1.0 = an even share."""

    period: int
    size: float


def swings(load_NLE: np.ndarray) -> list[Swing | None]:
    """Per layer, over N consecutive intervals of loads relative to an even one; None where the load does not swing."""
    return [_swing(load_NLE[:, layer]) for layer in range(load_NLE.shape[1])]


def autocorrelation(load_NE: np.ndarray) -> tuple[np.ndarray, float]:
    """Of the experts' loads without their linear trend, means over two intervals in a row; experts that vary more weigh more;
    lags 0 to N/8, and their size."""
    load_NE = (load_NE[1:] + load_NE[:-1]) / 2
    count = len(load_NE)
    known_NE = np.isfinite(load_NE)
    mean_E = np.where(known_NE, load_NE, 0).sum(axis=0) / np.maximum(known_NE.sum(axis=0), 1)
    load_NE = np.where(known_NE, load_NE, mean_E)[:, known_NE.any(axis=0)].astype(np.float64)
    time_N = np.linspace(-1, 1, count)
    load_NE = load_NE - load_NE.mean(axis=0)
    load_NE -= np.outer(time_N, time_N @ load_NE / (time_N @ time_N))
    power = (np.abs(np.fft.rfft(load_NE, n=2 * count, axis=0)) ** 2).sum(axis=1)
    lags = np.arange(int(count * LARGEST_LAG) + 1)
    covariance = np.fft.irfft(power)[lags] / (count - lags)
    size = float(np.sqrt(max(covariance[0], 0) / max(load_NE.shape[1], 1)))
    return covariance / max(covariance[0], 1e-30), size


def _swing(load_NE: np.ndarray) -> Swing | None:
    correlation, size = autocorrelation(load_NE)
    half = int(np.argmin(correlation))
    return Swing(2 * half, size) if size >= LEAST_SIZE and correlation[half] <= AUTOCORRELATION else None
