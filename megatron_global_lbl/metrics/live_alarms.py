"""The alarms in the log of the training itself: one line per cause, when it begins. NumPy only; nothing is read from disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.alarms import alarms
from megatron_global_lbl.metrics.record import METRICS, Run, Scan, frame_dtype
from megatron_global_lbl.metrics.streaks import LASTING_INTERVALS

MOST_INTERVALS = 256  # that are kept; "since" names none before them


class _Recent(Run):
    """A run whose last loads are in memory."""

    loads: Sequence[np.ndarray]

    def load(self, indices: Any) -> np.ndarray:
        before = len(self.frames) - len(self.loads)
        unknown = np.full_like(self.loads[-1], np.nan)
        return np.stack([self.loads[i - before] if i >= before else unknown for i in np.asarray(indices)])


class LiveAlarms:
    """The alarms of one model."""

    def __init__(self, layers: Sequence[str], num_experts: int | Sequence[int]) -> None:
        """
        Args:
            layers: their names, in the order of every array.
            num_experts: of each layer, or of all.
        """
        self._header: dict[str, Any] = {"layers": list(layers), "num_experts": num_experts}
        self._frames: deque[np.ndarray] = deque(maxlen=MOST_INTERVALS)
        self._loads: deque[np.ndarray] = deque(maxlen=LASTING_INTERVALS)
        self._said: set[str] = set()

    def add(
        self,
        about: Mapping[str, Any],
        *,
        iteration: int,
        steps: int,
        values: Mapping[str, np.ndarray],
        load: np.ndarray,
        first: int | None = None,
        sequences: float = np.nan,
        tokens: float = np.nan,
        micro_sequences: float = np.nan,
    ) -> list[str]:
        """The lines to print after an interval; arguments as in `Writer.append`, `about` as in its header."""
        frame = np.zeros((), frame_dtype(len(load)))
        frame["first"], frame["last"], frame["steps"] = first or iteration - steps + 1, iteration, steps
        frame["sequences"], frame["tokens"], frame["micro_sequences"] = sequences, tokens, micro_sequences
        frame["values"] = np.stack([values.get(name, np.full(len(load), np.nan)) for name in METRICS])
        while self._frames and self._frames[-1]["last"] >= frame["first"]:  # back to a checkpoint
            self._frames.pop()
            if self._loads:
                self._loads.pop()
        self._frames.append(frame)
        self._loads.append(np.asarray(load, dtype=np.float32))
        frames, header = np.stack(self._frames), {**about, **self._header}
        run = _Recent("", Path(), header, frames, [], Scan(b"", header, METRICS, frames, 0, 0, ()))
        run.loads = self._loads
        found = [alarm for alarm in alarms(run) if alarm.cause not in self._said]
        self._said |= {alarm.cause for alarm in found}
        return [f"!! {alarm.finding}. Do: {alarm.advice}" for alarm in found]
