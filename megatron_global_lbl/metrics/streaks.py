"""Since when a condition holds, and in which layers: what the alarms have in common.

Shape suffixes: N intervals, L layers.
"""

from __future__ import annotations

import numpy as np

from megatron_global_lbl.metrics.record import Run

# A condition has to last: routers start uneven and are evened out within the first hundred steps (every scope, in the
# experiment of docs/operations.md), and a single interval may be a batch of one domain.
LASTING_INTERVALS = 10
LASTING_STEPS = 100


def since(run: Run, index: int) -> int:
    """The first iteration of an interval."""
    return int(run.first_iterations[index])


def streak(condition_N: np.ndarray) -> int | None:
    """First interval of the streak that lasts to the end; None if there is none."""
    return None if not condition_N[-1] else len(condition_N) - int(np.argmin(np.append(condition_N[::-1], False)))


def lasting(run: Run, condition_NL: np.ndarray) -> np.ndarray:
    """First interval of the streak that lasts to the end, per layer; N for a layer whose streak is too short."""
    count = len(condition_NL)
    broken_NL = ~condition_NL[::-1]
    length_L = np.where(broken_NL.any(axis=0), broken_NL.argmax(axis=0), count)
    steps_L = np.array([run.iterations[-1] - since(run, count - n) + 1 if n else 0 for n in length_L])
    lasting_L = (length_L >= LASTING_INTERVALS) & (steps_L >= LASTING_STEPS)
    return np.where(lasting_L, count - length_L, count)


def worst_first(run: Run, start_L: np.ndarray, value_L: np.ndarray) -> list[int]:
    """The layers with a lasting streak, the largest value first."""
    return sorted(np.flatnonzero(start_L < len(run.iterations)).tolist(), key=lambda layer: -value_L[layer])


def others(run: Run, layers: list[int]) -> str:
    names = [run.layers[i] for i in layers[1:]]
    return f"; also {'layers' if len(names) > 1 else 'layer'} {_listed(names)}" if names else ""


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
