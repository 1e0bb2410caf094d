"""Appends to the balance record (frames.py). NumPy only: a test, or a tool, can write one without a training.

Files are opened for every interval, so that a reader on another node sees it, and a directory that was moved is noticed. A
write that failed leaves a torn tail; the next one cuts it off, so a disk that is full for a while costs the intervals of it.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.frames import FORMAT, LOAD, Scan, load_bytes, loads_of, packed_frame, packed_header, scan


class Writer:
    """One model's layers on one pipeline stage, written by one process."""

    def __init__(
        self,
        directory: str | Path,
        *,
        layers: list[str],
        num_experts: int,
        model: str = "model1",
        stage: str = "pp0",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is written before the first interval.

        Args:
            directory: of the record; made if it is not there.
            layers: names of the layers, in the order of every array.
            num_experts: E, the same for all of them.
            model: names the model; the stages of one model have the same.
            stage: names the pipeline stage.
            about: what else the header holds (`Run.header`): plain values.
        """
        self.path = Path(directory) / f"{model}.{stage}.balance"
        self._header = {
            **(about or {}),
            **{"format": FORMAT, "model": model, "stage": stage, "layers": list(layers), "num_experts": num_experts},
            "started": (about or {}).get("started", time.time()),
        }
        self._end: int | None = None
        self._loads_end = 0

    def append(
        self,
        *,
        iteration: int,
        steps: int,
        values: Mapping[str, np.ndarray],
        load: np.ndarray,
        sequences: float = np.nan,
        tokens: float = np.nan,
    ) -> None:
        """Write one log interval.

        Args:
            iteration: the last of the interval, 1-based. What was written before of this and later iterations is void from now
                on: the training went back to a checkpoint.
            steps: iterations that the interval has.
            values: [L] by name, all of `frames.METRICS`; NaN where one is not known.
            load: [L, E] relative to an even load, which is 1.0; NaN for a layer that counted nothing.
            sequences: Balance BSZ, the sequences over which f is counted; NaN if not known.
            tokens: the same in tokens.

        Raises:
            OSError: it cannot be written; a later interval may be tried.
            RecordError: there is a file of this name which is no record, or a broken one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._end is None or not self.path.exists() or self.path.stat().st_size < self._end:
            self._continue()
        assert self._end is not None
        loads = _load_to_bytes(load)
        assert len(loads) == load_bytes(self._header), f"load has shape {load.shape}"
        frame = packed_frame(
            values,
            **{"iteration": iteration, "steps": steps, "time": time.time(), "sequences": sequences, "tokens": tokens},
            **{"load_at": self._loads_end, "load_crc": zlib.crc32(loads)},
        )
        _write_at(loads_of(self.path), self._loads_end, loads)
        _write_at(self.path, self._end, frame)
        self._loads_end += len(loads)
        self._end += len(frame)

    def _continue(self) -> None:
        """Take up what is there without its torn tail, and begin with a header."""
        found = scan(self.path) if self.path.exists() else Scan([], 0, 0)
        self._loads_end = max(
            (
                int(segment.frames["load_at"][-1]) + load_bytes(segment.header)
                for segment in found.segments
                if len(segment.frames)
            ),
            default=0,
        )
        header = packed_header(self._header)
        _write_at(self.path, found.end, header)
        self._end = found.end + len(header)


def _load_to_bytes(load: np.ndarray) -> bytes:
    """float16, in which what is not zero stays so: a dead expert is one that was never selected."""
    load = np.asarray(load, dtype=np.float32)
    least = float(np.finfo(np.float16).smallest_subnormal)
    return np.where((load > 0) & (load < least), least, load).astype(LOAD).tobytes()


def _write_at(path: Path, at: int, data: bytes) -> None:
    """Write `data` where the file is whole so far, and cut off what was there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, at)
        os.lseek(descriptor, at, os.SEEK_SET)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
