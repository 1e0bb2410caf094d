"""The alarms in the log of the training itself: one line per cause, when it begins. NumPy only.

The last intervals are kept in memory (float16 loads: 8 MB for 60 layers of 256 experts), so that nothing is read from the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_global_lbl.metrics.alarms import alarms, balance_bsz, dead_experts, max_vio, swing
from megatron_global_lbl.metrics.frames import LOAD
from megatron_global_lbl.metrics.reader import Run
from megatron_global_lbl.metrics.swing import MOST_INTERVALS

# A swing lasts, and looking for one takes longer than all the rest.
SWING_EVERY = 32


class _Entry(NamedTuple):
    iteration: int
    steps: int
    values: dict[str, np.ndarray]
    load: np.ndarray
    sequences: float


class _Recent(Run):
    """A run whose loads are in memory."""

    entries: list[_Entry]

    def load(self, indices: Any) -> np.ndarray:
        return np.stack([self.entries[index].load for index in np.asarray(indices)]).astype(np.float32)


class AlarmLog:
    """Looks at every interval of one model on one pipeline stage."""

    def __init__(self, layers: list[str], num_experts: int, *, first_stage: bool) -> None:
        """
        Args:
            layers: their names, in the order of every array.
            num_experts: of each.
            first_stage: also says what is of the whole model.
        """
        self._layers, self._experts, self._first_stage = layers, num_experts, first_stage
        self._entries: deque[_Entry] = deque(maxlen=MOST_INTERVALS)
        self._said: set[str] = set()
        self._intervals = 0

    def add(
        self,
        about: Mapping[str, Any],
        *,
        iteration: int,
        steps: int,
        values: Mapping[str, np.ndarray],
        load: np.ndarray,
        sequences: float,
    ) -> list[str]:
        """The lines to print after an interval; arguments as in `Writer.append`, `about` as in its header."""
        while self._entries and self._entries[-1].iteration >= iteration:  # back to a checkpoint
            self._entries.pop()
        kept = {name: np.asarray(values[name], dtype=np.float32) for name in ("dead", "max_vio")}
        self._entries.append(_Entry(iteration, steps, kept, np.asarray(load).astype(LOAD), sequences))
        self._intervals += 1
        checks = [dead_experts, max_vio]
        checks += [balance_bsz] if self._first_stage else []
        checks += [swing] if self._intervals % SWING_EVERY == 0 else []
        found = [alarm for alarm in alarms(self._recent(about), checks) if alarm.cause not in self._said]
        self._said |= {alarm.cause for alarm in found}
        return [f"!! {alarm.finding}. Do: {alarm.advice}" for alarm in found]

    def _recent(self, about: Mapping[str, Any]) -> Run:
        entries = list(self._entries)
        sequences = np.array([entry.sequences for entry in entries])
        run = _Recent(
            name="",
            directory=Path(),
            header={**about, "num_experts": self._experts},
            layers=self._layers,
            iterations=np.array([entry.iteration for entry in entries]),
            steps=np.array([entry.steps for entry in entries]),
            times=np.full(len(entries), np.nan),
            sequences=sequences,
            tokens=np.full(len(entries), np.nan),
            metrics={name: np.stack([entry.values[name] for entry in entries]) for name in ("dead", "max_vio")},
            notes=[],
            _parts=[],
        )
        run.entries = entries
        return run
