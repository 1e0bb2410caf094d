"""Writes balance records: one model's files, and the thread that keeps the file system away from the training. NumPy only."""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import stat
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from megatron_global_lbl.metrics.directory import Place, RecordDirectory
from megatron_global_lbl.metrics.record import (
    FORMAT,
    FRAME,
    HEADER,
    LOAD,
    METRICS,
    MOST_NOTES,
    PREFIX,
    RecordError,
    Scan,
    frame_dtype,
    printable,
    scan,
    with_crc,
)

# 256 intervals of 60 layers with 256 experts are 18 MB.
CAPACITY = 256
EXIT_SECONDS = 10.0
MOST_STEM = 150


class RunKey(NamedTuple):
    """A run of a directory. The models of a training share it."""

    number: int
    id: str


class Writer:
    """One model of one run.

    What another process has written is never overwritten: where the files are not as this writer left them, it goes on in files
    of its own.

    Attributes:
        run: where it writes; None before the first interval, unless it was given.
    """

    def __init__(
        self,
        directory: str | Path | Place,
        *,
        layers: Sequence[str],
        num_experts: int | Sequence[int],
        topk: int | Sequence[int | None] | None = None,
        model: str = "model1",
        about: Mapping[str, Any] | None = None,
        start: int | None = None,
        run: RunKey | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Nothing is written before the first interval.

        Args:
            directory: of the record.
            layers: names of all MoE layers of the model, in the order of every array.
            num_experts: of each layer, or of all.
            topk: the same.
            model: its name; any text.
            about: what else the header holds (`record.Run.header`): plain values.
            start: first iteration of this training, 1-based: 1 begins a run, a later one continues the model's newest run.
                Default: that of the first interval.
            run: of another model of this training, to write to the same run.
            say: takes lines to print: where it writes, and what has become of its files.
        """
        self.run, self._directory, self._start, self._say = run, directory, start, say
        self._layers = list(layers)
        self._experts = _per_layer(num_experts, self._layers)
        self._topk = None if topk is None else _per_layer(topk, self._layers)
        self._model = model
        self._stem = quote(model, safe="", errors="surrogateescape") or "-"
        if len(self._stem) > MOST_STEM:  # file names have 255 bytes at most
            self._stem = f"{self._stem[:MOST_STEM]}-{zlib.crc32(self._stem.encode()):08x}"
        about = {"started": time.time(), **(about or {})}
        about |= {"model": model, "layers": self._layers, "num_experts": self._experts, "topk": self._topk}
        self._about = {key: value for key, value in about.items() if value is not None}
        self._id = uuid.uuid4().hex
        self._metrics: tuple[str, ...] = ()
        self._owns_place = not isinstance(directory, Place)
        self._place: Place | None = directory if isinstance(directory, Place) else None
        self._files: tuple[_File, _File] | None = None
        self._is_chosen = self._has_header = False

    @property
    def path(self) -> Path:
        """Of its .balance file, once it has written."""
        assert self._place is not None and self.run is not None
        return self._place.path / self._name(self.run.number)

    def append(
        self,
        *,
        iteration: int,
        steps: int,
        values: Mapping[str, np.ndarray],
        load: np.ndarray,
        first: int | None = None,
        sequences: float = np.nan,
        tokens: float = np.nan,
        micro_sequences: float = np.nan,
    ) -> None:
        """Write one interval. When this returns, the death of the process does not lose it.

        Args:
            iteration: its last, 1-based.
            steps: optimizer steps of the model in it.
            values: [L] by name; `METRICS` that are not given are NaN, other names are kept.
            load: [L, E] relative to an even load; columns beyond a layer's own experts are not looked at.
            first: its first iteration; default: `iteration - steps + 1`.
            sequences: the balance batch of f, mean over the interval's micro-batches.
            tokens: the same in tokens.
            micro_sequences: of one micro-batch of one data-parallel rank.

        Raises:
            OSError: it cannot be written; a later interval may be tried.
        """
        first = iteration - steps + 1 if first is None else first
        if self._owns_place and self._place is not None and (moved := self._place.check()):
            self._say(f"!! {moved}")
        metrics = (*METRICS, *sorted(values.keys() - set(METRICS)))
        if self._files is None or metrics != self._metrics or not all(file.is_as_left() for file in self._files):
            self._metrics = metrics
            self._open(first)
        assert self._files is not None
        frames, loads = self._files
        there_LE = np.arange(max(self._experts)) < np.asarray(self._experts)[:, None]
        own = np.asarray(load, dtype=np.float32)[:, : there_LE.shape[1]][there_LE]
        least = np.finfo(np.float16).smallest_subnormal  # what is not zero stays so: a dead expert was never selected
        data = np.where((own > 0) & (own < least), least, own).astype(LOAD).tobytes()
        frame = np.zeros((), frame_dtype(len(self._layers), len(metrics)))
        unknown = np.full(len(self._layers), np.nan, np.float32)
        frame["magic"], frame["values"] = FRAME, np.stack([values.get(name, unknown) for name in metrics])
        frame["first"], frame["last"], frame["steps"], frame["time"] = first, iteration, steps, time.time()
        frame["sequences"], frame["tokens"], frame["micro_sequences"] = sequences, tokens, micro_sequences
        frame["load_at"], frame["load_crc"] = loads.end, zlib.crc32(data)
        try:
            loads.append(data)
            frames.append(with_crc(frame.tobytes()))
        except OSError:
            self._files = None
            raise

    def _name(self, number: int) -> str:
        return f"run{number}.{self._stem}.balance"

    def _open(self, first: int) -> None:
        """Find the run, cut off what is not whole, and write a header."""
        self._files = None
        if self._place is None:
            assert not isinstance(self._directory, Place)
            self._place = Place(self._directory)
        key, found, note = self._choose(self._place, os.listdir(self._place.fd), first)
        name = self._name(key.number)
        frames, loads = _File(self._place, name), _File(self._place, name[: -len("balance")] + "loads")
        notes = list(found.header.get("notes", ())) if found else []
        notes += [note] if note else []
        if found is None:
            frames.open(0, new=True)
        self.run, self._is_chosen = key, True
        end = found.loads_end if found else 0
        there = self._place.stat(loads.name)
        if (there.st_size if there else 0) < end:
            what = "truncated" if there else "deleted"
            notes.append(f"{printable(loads.name)} was {what} before iteration {first}: loads of single experts are lost")
            self._say(f"!! {notes[-1]}")
        loads.open(end, new=there is None)
        if found is not None:
            frames.open(found.end)
        header = {"format": FORMAT, "run": key.id, "start": self._id, "metrics": list(self._metrics), **self._about}
        text = json.dumps(header | ({"notes": notes[-MOST_NOTES:]} if notes else {}), default=str)
        if found is None or found.header != json.loads(text):
            data = text.encode()
            frames.append(with_crc(np.array((HEADER, 0, len(data)), dtype=PREFIX).tobytes() + data))
        self._has_header = True
        self._files = frames, loads

    def _choose(self, place: Place, names: list[str], first: int) -> tuple[RunKey, Scan | None, str | None]:
        """The run to write to, its file if there is one, and a note of what is not in it."""
        runs = {int(match[1]): name for name in names if (match := re.match(r"run([1-9][0-9]{0,8})\.", name))}
        mine = [number for number in runs if self._name(number) in names]
        unused = max(runs, default=0) + 1
        shown = printable(place.path)
        if self._is_chosen:
            assert self.run is not None
            number = self.run.number
            found, why = self._fitting(place, number) if number in mine else (None, "its file was deleted")
            if found is not None:
                return self.run, found, None
            note = f"begins with iteration {first}; iterations before it were recorded as run {number}, but {why}"
            what = "it begins again" if unused == number else f"run {unused} begins"
            self._say(f"!! run {number} in {shown} cannot be continued, {why}; {what} with iteration {first}")
            return RunKey(unused, uuid.uuid4().hex), None, note
        if self.run is not None and self.run.number not in mine:
            return self.run, None, None
        start = self._start or first
        number = self.run.number if self.run else max(mine, default=0)
        if number and (self.run or start > 1):
            found, why = self._fitting(place, number)
            if found is not None:
                self._say(f"the balance record continues run {number} in {shown} with iteration {start}")
                return self.run or RunKey(number, str(found.header.get("run", ""))), found, None
            self._say(f"!! run {number} in {shown} is not continued: {why}; this training is run {unused} beside it")
        elif runs:
            self._say(f"{shown} holds {len(runs)} run{'s' if len(runs) > 1 else ''}; this training is run {unused} beside it")
        return RunKey(unused, uuid.uuid4().hex), None, None

    def _fitting(self, place: Place, number: int) -> tuple[Scan | None, str]:
        """The run's file if this model can be written to it, else why not."""
        name = self._name(number)
        for file in (name, name[: -len("balance")] + "loads"):
            there = place.stat(file)
            if there is not None and not stat.S_ISREG(there.st_mode):
                return None, f"{file} is no regular file"
        try:
            found = scan(name, dir_fd=place.fd)
        except (RecordError, OSError) as error:
            return None, str(error)
        if found.header and (found.header["layers"], found.header["num_experts"]) != (
            [printable(layer) for layer in self._layers],
            self._experts,
        ):
            return None, "it is of another model"
        if self._has_header and found.header.get("start") != self._id:
            return None, "another process has written to it"
        return (found, "") if found.header or self._is_chosen else (None, "it has no header")


class _File:
    """A file that this process alone appends to."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self.name, self.end = place, name, 0
        self._is: tuple[int, int] | None = None

    def open(self, end: int, *, new: bool = False) -> None:
        """Cut it off at `end`, or create it: then it must not be there."""
        self._write(b"", os.O_CREAT | os.O_EXCL if new else 0, cut_at=end)

    def is_as_left(self) -> bool:
        """It is the same file, and nobody has written to it."""
        there = self._place.stat(self.name)
        return there is not None and (there.st_dev, there.st_ino) == self._is and there.st_size == self.end

    def append(self, data: bytes) -> None:
        self._write(data)
        self.end += len(data)

    def _write(self, data: bytes, flags: int = 0, cut_at: int | None = None) -> None:
        descriptor = self._place.open(self.name, os.O_WRONLY | flags)
        try:
            there = os.fstat(descriptor)
            if not stat.S_ISREG(there.st_mode):
                raise OSError(f"{printable(self.name)} is no regular file")
            if cut_at is not None:
                os.ftruncate(descriptor, cut_at)
                self.end, self._is = cut_at, (there.st_dev, there.st_ino)
            elif (there.st_dev, there.st_ino) != self._is:
                raise OSError(f"{printable(self.name)} was replaced")
            view, at = memoryview(data), self.end
            while view:
                written = os.pwrite(descriptor, view, at)
                view, at = view[written:], at + written
        finally:
            os.close(descriptor)


class Recorder:
    """Writes the intervals of a training from a thread of its own: a file system that hangs costs no step.

    `append` never waits. When the queue is full, intervals are lost, which is printed once; the reader names them. No more than
    the queue is lost when the process is killed; usually it is empty.
    """

    def __init__(
        self,
        directory: RecordDirectory | str | Path,
        *,
        start: int | None = None,
        capacity: int = CAPACITY,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            directory: of the record; a `RecordDirectory` is checked before every interval, and stays the caller's.
            start: first iteration of this training, 1-based (`Writer`).
            capacity: intervals that may wait.
            say: takes lines to print, from any thread; default: print with the prefix of the plugin's lines.
        """
        self._directory, self._start, self._say = directory, start, say or _print
        self._queue: queue.Queue[tuple[dict[str, Any], dict[str, Any]] | None] = queue.Queue(capacity)
        self._writers: dict[str, Writer] = {}
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._has_failed = self._has_overflown = False

    def append(
        self,
        model: str,
        *,
        layers: Sequence[str],
        num_experts: int | Sequence[int],
        topk: int | Sequence[int | None] | None = None,
        about: Mapping[str, Any] | None = None,
        **interval: Any,
    ) -> bool:
        """Hand over one interval of a model; arguments as for `Writer` and `Writer.append`. False if it is lost.

        Layers, experts and `about` of the model's first interval count. Nobody may change the arrays afterwards.
        """
        of_model = {"model": model, "layers": layers, "num_experts": num_experts, "topk": topk, "about": about}
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="moe-lbl record", daemon=True)
            self._thread.start()
            atexit.register(self.close)
        try:
            self._queue.put_nowait((of_model, interval))
        except queue.Full:
            if not self._has_overflown:
                self._has_overflown = True
                self._say(
                    f"!! {self._shown} does not answer: the balance record lacks intervals from iteration "
                    f"{interval['iteration']} on until it does; the training goes on"
                )
            return False
        return True

    def flush(self, seconds: float) -> bool:
        """Wait until all is written, or has failed; False if that takes longer."""
        with self._queue.all_tasks_done:
            return self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, seconds)

    def close(self, seconds: float = EXIT_SECONDS) -> bool:
        """Write what waits and end the thread; False if that takes longer, then the rest is lost. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None or os.getpid() != self._process:  # a forked child has no such thread
            return True
        atexit.unregister(self.close)
        done = self.flush(seconds)
        if done:
            self._queue.put(None)
            thread.join()
        else:
            lost = self._queue.unfinished_tasks
            self._say(f"!! {self._shown} does not answer: the last {lost} intervals of the balance record are lost")
        return done

    @property
    def _shown(self) -> str:
        place = self._directory.place if isinstance(self._directory, RecordDirectory) else None
        return printable(place.path if place else self._directory)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                self._write(*task)
            except Exception as error:  # must never end the training
                if not self._has_failed:
                    self._has_failed = True
                    self._say(
                        f"!! the balance record in {self._shown} lacks the interval that ends with iteration "
                        f"{task[1]['iteration']}: {error}; the training goes on, and every later interval is tried"
                    )
            finally:
                self._queue.task_done()

    def _write(self, of_model: dict[str, Any], interval: dict[str, Any]) -> None:
        place: Any = self._directory
        if isinstance(self._directory, RecordDirectory):
            for line in self._directory.check():
                self._say(f"!! {line}")
            place = self._directory.place
        name = of_model["model"]
        if name not in self._writers:
            run = next((writer.run for writer in self._writers.values() if writer.run), None)
            said = self._say if run is None else lambda line: line.startswith("!!") and self._say(line)
            self._writers[name] = Writer(place, **of_model, start=self._start, run=run, say=said)
        self._writers[name].append(**interval)


def _per_layer(value: Any, layers: Sequence[str]) -> list[Any]:
    values = [value] * len(layers) if isinstance(value, (int, np.integer)) else list(value)
    if len(values) != len(layers):
        raise ValueError(f"{len(values)} values for {len(layers)} layers")
    return [int(x) if x is not None else None for x in values]


def _print(line: str) -> None:
    print(f"> moe-lbl: {line}", flush=True)
