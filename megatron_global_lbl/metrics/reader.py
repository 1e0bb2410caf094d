"""Reads the balance record (frames.py): `read(directory)` gives one `Run` per model. NumPy only, no PyTorch, no Megatron.

A training that went back to a checkpoint wrote some iterations again. What counts is the last course: an interval makes void
what was written before of the same and later iterations. That holds layer by layer, so that a run resumed with another number
of pipeline stages, whose layers are in other files from then on, stays one run.
Shape suffixes: N intervals, L layers, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_global_lbl.metrics.frames import LOAD, METRICS, RecordError, Scan, Segment, load_bytes, loads_of, scan

__all__ = ["RecordError", "Run", "read"]


@dataclass
class _Part:
    """A segment within its run.

    Attributes:
        path: of its file.
        header: its own.
        frames: [n] those that count, of at least one layer.
        columns: [l] where its layers are among the run's.
        before: [l] the first iteration that a later segment has of each layer; from there on this one is void.
        rows: [n] where its frames are among the run's intervals.
    """

    path: Path
    header: dict[str, Any]
    frames: np.ndarray
    columns: np.ndarray
    before: np.ndarray
    rows: np.ndarray

    def counts(self) -> np.ndarray:
        """[n, l] whether a frame counts for a layer."""
        return self.frames["iteration"][:, None] < self.before


@dataclass
class Run:
    """One model's record over all its pipeline stages and restarts.

    Attributes:
        name: the directory's name, and the model's if there are several.
        directory: where it was read.
        header: the latest of its headers: "scope", "settings", "alpha", "topk", "num_experts", "data_parallel",
            "micro_batches", "log_interval", "versions", "started" (seconds since 1970); what is not known is missing.
        layers: names as Megatron's log numbers them, "mtp.N" for multi-token prediction, in the model's order.
        iterations: [N] int64, the last of each interval, 1-based, rising.
        steps: [N] int64, iterations that each interval has.
        times: [N] float64, when it was written, seconds since 1970.
        sequences: [N] float64, Balance BSZ: the sequences over which f is counted; NaN if not known.
        tokens: [N] float64, the same in tokens.
        metrics: [N, L] float32 by name (`frames.METRICS`), NaN where not known.
        notes: what is missing, a line each.
    """

    name: str
    directory: Path
    header: dict[str, Any]
    layers: list[str]
    iterations: np.ndarray
    steps: np.ndarray
    times: np.ndarray
    sequences: np.ndarray
    tokens: np.ndarray
    metrics: dict[str, np.ndarray]
    notes: list[str]
    _parts: list[_Part]

    def load(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n, L, E] float32, the load of every expert relative to an even one; NaN where not known.

        Args:
            indices: [n] which intervals; these are read from the disk, no others.

        Raises:
            RecordError: what is read is broken.
        """
        wanted = np.arange(len(self.iterations))[np.asarray(indices)]
        loads = np.full((len(wanted), len(self.layers), self.header["num_experts"]), np.nan, dtype=np.float32)
        for part in self._parts:
            path, size = loads_of(part.path), load_bytes(part.header)
            if not len(part.rows) or not path.exists():
                continue
            counts = part.counts()
            with path.open("rb") as file:
                for index, row in enumerate(wanted):
                    at = int(np.searchsorted(part.rows, row))
                    if at == len(part.rows) or part.rows[at] != row:
                        continue
                    file.seek(int(part.frames["load_at"][at]))
                    data = file.read(size)
                    if len(data) < size or not any(data):  # lost with the disk: an even load is 1, not 0
                        continue
                    if zlib.crc32(data) != part.frames["load_crc"][at]:
                        raise RecordError(f"{path}: broken at byte {part.frames['load_at'][at]}")
                    load = np.frombuffer(data, dtype=LOAD).reshape(len(part.columns), -1)
                    loads[index, part.columns[counts[at]]] = load[counts[at]]
        return loads


def read(directory: str | Path, *, scans: dict[Path, Scan] | None = None) -> list[Run]:
    """The runs of a directory, one per model.

    Args:
        directory: of the record.
        scans: for who reads again and again: filled by the first call, so that the next ones read only what is new.

    Raises:
        RecordError: there is no record, or a file of it is broken elsewhere than at its end.
        OSError: it cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RecordError(f"{directory}: no such directory")
    by_model: dict[str, list[tuple[Path, Segment]]] = {}
    notes: dict[str, list[str]] = {}
    paths = sorted(directory.glob("*.balance"))
    for path in paths:
        found = scan(path, scans.get(path) if scans is not None else None)
        if scans is not None:
            scans[path] = found
        model = path.name.split(".")[0]
        if found.torn:
            notes.setdefault(model, []).append(f"{path.name}: the last {found.torn} bytes are not whole and were left out")
        by_model.setdefault(model, []).extend((path, segment) for segment in found.segments)
    runs = []
    for model, segments in by_model.items():
        segments = [entry for entry in segments if len(entry[1].frames)]  # a header alone says nothing yet
        if segments:
            name = directory.resolve().name + (f" {model}" if len(by_model) > 1 else "")
            runs.append(_merged(name, directory, segments, notes.get(model, [])))
    if not runs:
        raise RecordError(
            f"{directory}: holds no balance record" + (", only files without an interval" if paths else " (no *.balance)")
        )
    return runs


def _merged(name: str, directory: Path, segments: list[tuple[Path, Segment]], notes: list[str]) -> Run:
    segments = sorted(segments, key=lambda entry: entry[1].header["started"])
    experts = {segment.header["num_experts"] for _, segment in segments}
    if len(experts) > 1:
        path = segments[-1][0]
        raise RecordError(f"{path}: models of {' and '.join(map(str, sorted(experts)))} experts in one record")
    layers = sorted({layer for _, segment in segments for layer in segment.header["layers"]}, key=_place_of)
    column = {layer: index for index, layer in enumerate(layers)}
    void_from = np.full(len(layers), np.iinfo(np.int64).max)
    parts = []
    for path, segment in reversed(segments):
        columns = np.array([column[layer] for layer in segment.header["layers"]])
        iterations = segment.frames["iteration"]
        latest = np.minimum.accumulate(iterations[::-1])[::-1]  # [n] the first iteration that is written from here on
        counts = (iterations == latest) & (iterations < void_from[columns].max())
        counts[:-1] &= latest[:-1] < latest[1:]
        frames = segment.frames[counts]
        parts.append(_Part(path, segment.header, frames, columns, void_from[columns], np.zeros(0, dtype=np.int64)))
        if len(frames):
            void_from[columns] = np.minimum(void_from[columns], frames["iteration"][0])
    parts.reverse()
    iterations = np.unique(np.concatenate([part.frames["iteration"] for part in parts]))
    fields = {key: np.full(len(iterations), np.nan) for key in ("steps", "time", "sequences", "tokens")}
    metrics = {metric: np.full((len(iterations), len(layers)), np.nan, dtype=np.float32) for metric in METRICS}
    for part in parts:
        part.rows = np.searchsorted(iterations, part.frames["iteration"])
        for key, values in fields.items():
            values[part.rows] = part.frames[key]
        counts = part.counts()
        for number, metric in enumerate(METRICS):
            table = metrics[metric]
            there = table[part.rows[:, None], part.columns]
            table[part.rows[:, None], part.columns] = np.where(counts, part.frames["values"][:, number], there)
    steps = fields["steps"].astype(np.int64)
    header = dict(segments[-1][1].header)
    run = Run(
        name,
        directory,
        header,
        layers,
        iterations,
        steps,
        fields["time"],
        fields["sequences"],
        fields["tokens"],
        metrics,
        notes,
        parts,
    )
    run.notes.extend(_what_is_missing(run))
    return run


def _place_of(layer: str) -> tuple[bool, int, str]:
    """Multi-token prediction comes last."""
    number = layer.rpartition(".")[2].partition("#")[0]
    return layer.startswith("mtp."), int(number) if number.isdigit() else 0, layer


def _what_is_missing(run: Run) -> list[str]:
    notes = []
    first = run.iterations - run.steps + 1
    for index in np.flatnonzero(first[1:] > run.iterations[:-1] + 1):
        notes.append(f"iterations {run.iterations[index] + 1} to {first[index + 1] - 1} are missing")
    known = np.zeros((len(run.iterations), len(run.layers)), dtype=bool)
    stages = np.full(len(run.layers), "", dtype=object)
    for part in run._parts:
        known[part.rows[:, None], part.columns] |= part.counts()
        stages[part.columns] = part.header["stage"]
        if len(part.rows) and not loads_of(part.path).exists():
            notes.append(f"{loads_of(part.path).name} is missing: no load of single experts")
    for stage in dict.fromkeys(stages):
        missing_N = ~known[:, stages == stage].all(axis=1)
        missing = np.flatnonzero(missing_N)
        last = len(run.iterations) - 1 - int(np.argmin(missing_N[::-1]))  # the last that is there
        if len(missing) and missing[-1] > last:
            notes.append(f"stage {stage} is missing from iteration {run.iterations[last] + 1} on")
        if np.any(missing < last):
            of = missing[missing < last]
            notes.append(
                f"stage {stage} is missing in {len(of)} intervals between iterations "
                f"{first[of[0]]} and {run.iterations[of[-1]]}"
            )
    return list(dict.fromkeys(notes))
