"""The balance record: its files, and how they are read. NumPy only.

    runN.MODEL.balance   at every start of a training a header, then one frame per log interval
    runN.MODEL.loads     float16, per frame the load of every expert, layer after layer; 1.0 is an even load

    header  "LBLH"  crc32 u4  length u4  JSON of that length
    frame   "LBLF"  crc32 u4  see `frame_dtype`

A crc32 covers all bytes after it. A training that starts at iteration 1 is a run of its own; one that starts later continues
the newest run of its model. An interval is its first and last iteration. A resume from an older checkpoint writes iterations
again: those recorded earlier are void. The order of writing decides, never a clock.

One process writes (writer.py). Loads are written before the frame that points to them, and what is not whole at the end of a
file (a killed process, a full disk) is left out. What can be read is read; what cannot is a note, or a `RecordError` if
nothing can. Shape suffixes: N intervals, L layers, E experts (the largest number of any layer).
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 2
METRICS = ("lbl_global", "lbl_micro", "max_vio", "entropy", "dead", "cv", "uncertainty")
LOAD = np.dtype("<f2")
HEADER, FRAME = b"LBLH", b"LBLF"
PREFIX = np.dtype([("magic", "S4"), ("crc", "<u4"), ("length", "<u4")])
FILE = re.compile(r"run([1-9][0-9]{0,8})\.(.+)\.balance", re.DOTALL)
# Limits of what a header can ask for; a frame of 10,000 layers has 280 KB.
MOST_LAYERS, MOST_EXPERTS, MOST_METRICS, MOST_ITERATION = 10_000, 1 << 20, 200, 1 << 53
MOST_NOTES = 5  # of one kind


class RecordError(ValueError):
    """Not a balance record, or one that cannot be read. One line that names the file, and the byte if there is one."""


def frame_dtype(layers: int, metrics: int = len(METRICS)) -> np.dtype:
    """One log interval; `values` in the order of the header's "metrics"."""
    return np.dtype(
        [
            *(("magic", "S4"), ("crc", "<u4")),
            *(("first", "<i8"), ("last", "<i8"), ("steps", "<i8")),  # iterations, 1-based; optimizer steps of the model in them
            ("time", "<f8"),  # seconds since 1970; shown, never compared
            *(("sequences", "<f8"), ("tokens", "<f8")),  # the balance batch of f, mean over micro-batches; NaN if not known
            ("micro_sequences", "<f8"),  # of one micro-batch of one data-parallel rank
            *(("load_at", "<i8"), ("load_crc", "<u4")),  # where the loads are, in bytes
            ("values", "<f4", (metrics, layers)),
        ]
    )


def with_crc(data: bytes) -> bytes:
    """A header or frame with its checksum filled in."""
    return data[:4] + zlib.crc32(data[8:]).to_bytes(4, "little") + data[8:]


def printable(text: object) -> str:
    """Text that can go to a terminal or a page: control characters and bytes that are not UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Scan(NamedTuple):
    """One file as it was read.

    Attributes:
        head: its first bytes, which tell whether it is still the same file.
        header: the latest.
        metrics: names of the values in `frames`.
        frames: all that are whole, in the order of writing.
        end: whole bytes.
        torn: bytes after them.
        notes: what was left out.
    """

    head: bytes
    header: dict[str, Any]
    metrics: tuple[str, ...]
    frames: np.ndarray
    end: int
    torn: int
    notes: tuple[str, ...]

    @property
    def load_bytes(self) -> int:
        """Bytes of the loads of one interval."""
        return sum(self.header["num_experts"]) * LOAD.itemsize

    @property
    def loads_end(self) -> int:
        """Bytes of the file of loads that frames point to."""
        return int(self.frames["load_at"].max()) + self.load_bytes if len(self.frames) else 0


@dataclass
class Run:
    """One model of one run, over all its restarts.

    Attributes:
        name: the directory's name; with the run's number and the model's name where there are several.
        path: of its .balance file.
        header: the latest: "scope", "settings", "alpha", "balancing", "data_parallel", "micro_batches", "log_interval",
            "versions", "started" (seconds since 1970), "num_experts" and "topk" (a number, or one per layer where they
            differ). A value that is not known or odd is missing.
        frames: [N] of `frame_dtype`, the course that counts.
        notes: what is missing or void, a line each.
        scan: of its file.
        number: of the run in its directory, from 1.
        latest: no run of the directory is newer.
    """

    name: str
    path: Path
    header: dict[str, Any]
    frames: np.ndarray
    notes: list[str]
    scan: Scan
    number: int = 1
    latest: bool = True

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def id(self) -> str:
        """Written at the run's start, kept by every resume."""
        return str(self.header.get("run", ""))

    @property
    def model(self) -> str:
        return str(self.header.get("model", ""))

    @property
    def layers(self) -> list[str]:
        return self.header["layers"]

    @functools.cached_property
    def num_experts(self) -> np.ndarray:
        """[L] int64."""
        return np.broadcast_to(np.asarray(self.header["num_experts"], dtype=np.int64), (len(self.layers),))

    @functools.cached_property
    def topk(self) -> np.ndarray:
        """[L] float64, NaN where not known."""
        topk = self.header.get("topk")
        values = np.asarray(np.nan if topk is None else topk, dtype=object)
        return np.broadcast_to(np.where(values == None, np.nan, values).astype(np.float64), (len(self.layers),))  # noqa: E711

    @property
    def first_iterations(self) -> np.ndarray:
        """[N] int64, the first of each interval, 1-based."""
        return self.frames["first"]

    @property
    def iterations(self) -> np.ndarray:
        """[N] int64, the last of each interval, 1-based, rising."""
        return self.frames["last"]

    @property
    def steps(self) -> np.ndarray:
        """[N] int64, optimizer steps of the model in each interval."""
        return self.frames["steps"]

    @property
    def times(self) -> np.ndarray:
        """[N] float64, when it was written, seconds since 1970 by the clock of the writer."""
        return self.frames["time"]

    @property
    def sequences(self) -> np.ndarray:
        """[N] float64, Balance BSZ: the sequences over which f is counted; NaN if not known."""
        return self.frames["sequences"]

    @property
    def tokens(self) -> np.ndarray:
        """[N] float64, the same in tokens."""
        return self.frames["tokens"]

    @property
    def micro_sequences(self) -> np.ndarray:
        """[N] float64, sequences of one micro-batch of one data-parallel rank; NaN if not known."""
        return self.frames["micro_sequences"]

    @functools.cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """[N, L] float32 by name, NaN where not known. All of `METRICS`, and what else was recorded."""
        return {name: np.ascontiguousarray(self.frames["values"][:, i]) for i, name in enumerate(self.scan.metrics)}

    def load(self, indices: Any) -> np.ndarray:
        """[n, L, E] float32 of these intervals, read from the disk; NaN where not known, and beyond a layer's own experts.

        Memory is for what is asked for: read a long record in parts.

        Raises:
            RecordError: what is read is broken.
        """
        frames, path = self.frames[np.asarray(indices, dtype=np.int64)], self.path.with_suffix(".loads")
        there_LE = np.arange(self.num_experts.max()) < self.num_experts[:, None]
        loads = np.full((len(frames), *there_LE.shape), np.nan, dtype=np.float32)
        size = self.scan.load_bytes
        if not path.is_file():
            return loads
        with path.open("rb", buffering=0) as file:
            for load, frame in zip(loads, frames):
                file.seek(frame["load_at"])
                data = file.read(size)
                if len(data) < size or not any(data):  # truncated, or lost with the disk: an even load is 1, not 0
                    continue
                if zlib.crc32(data) != frame["load_crc"]:
                    raise RecordError(f"{printable(path)}: broken at byte {frame['load_at']}")
                load[there_LE] = np.frombuffer(data, dtype=LOAD)
        return loads


def read(directory: str | Path, *, scans: dict[Path, Scan] | None = None) -> list[Run]:
    """The runs of a directory, oldest first, one per run and model.

    Args:
        directory: of the record.
        scans: for repeated reads: filled by the first call, so that the next ones check only what is new.

    Raises:
        RecordError: there is no record, or none that can be read.
        OSError: the directory cannot be read.
    """
    directory, scans = Path(directory), {} if scans is None else scans
    shown = printable(directory)
    if not directory.is_dir():
        raise RecordError(f"{shown}: no such directory")
    found, empty, unreadable = [], 0, []
    for path in sorted(directory.glob("*.balance")):
        try:
            scans[path] = scan(path, known=scans.get(path))
        except (RecordError, OSError) as error:
            scans.pop(path, None)
            unreadable.append(error if isinstance(error, RecordError) else RecordError(f"{printable(path)}: {error.strerror}"))
            continue
        if len(scans[path].frames):
            found.append((_number(path), path))
        else:
            empty += 1
            if scans[path].torn:
                unreadable.append(RecordError(f"{printable(path)}: not one interval of it is whole"))
    runs = []
    for number, path in sorted(found):
        if run := _run(path, scans[path], number, found, scans):
            runs.append(run)
    if not runs:
        if unreadable and not empty:
            raise unreadable[0]
        why = ", only files without an interval" if empty or found else " (no *.balance)"
        raise RecordError(f"{shown}: holds no balance record{why}")
    for run in runs:
        run.notes += [f"left out: {error}" for error in unreadable]
    return runs


def _number(path: Path) -> int:
    match = FILE.fullmatch(path.name)
    return int(match[1]) if match else 0


def scan(path: str | Path, *, known: Scan | None = None, dir_fd: int | None = None) -> Scan:
    """Read a .balance file, and check all of it but what is known to be whole.

    Raises:
        RecordError: it is something else, or its first header cannot be used.
        OSError: it cannot be read.
    """
    shown = printable(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RecordError(f"{shown}: not a file")
        head = file.read(PREFIX.itemsize)  # its checksum is that of a header with an id of its own
        start = known.end if known is not None and known.head == head else 0
        size = file.seek(0, os.SEEK_END)
        start = start if start <= size else 0
        file.seek(start)
        data = file.read()
    parts: list[tuple[tuple[str, ...], np.ndarray]] = []
    notes: list[str] = []
    header: dict[str, Any] = {}
    if start and known is not None:
        header, notes = known.header, list(known.notes)
        parts.append((known.metrics, known.frames))
    elif not data.startswith(HEADER[: len(data)]):
        raise RecordError(f"{shown}: not a balance record (byte 0)")
    at = whole = 0
    names = tuple(header.get("metrics", ()))
    skipping = False  # what follows a header of something else
    while at < len(data):
        if (found := _header_at(data, at)) is not None:
            usable, new, odd = _checked(found[0])
            if not usable and not header:
                raise RecordError(f"{shown}: {odd[0]}")
            skipping = not usable or bool(header) and any(new[key] != header[key] for key in ("layers", "num_experts"))
            if skipping:
                odd = [f"what begins at byte {start + at} is left out: {odd[0] if odd else 'another model'}"]
            else:
                header, names = new, tuple(new["metrics"])
            notes += [note for note in (f"{Path(shown).name}: {text}" for text in odd) if note not in notes]
            at = found[1]
        elif header and not skipping and len(frames := _frames_at(data, at, _dtype(header))):
            parts.append((names, frames))
            at += frames.nbytes
        elif (next_at := _next_whole(data, at, None if skipping else header)) is not None:
            if not skipping:
                notes.append(f"{Path(shown).name}: bytes {start + at} to {start + next_at - 1} are broken and were left out")
            at = next_at
        else:
            break
        whole = at
    if not header:
        if b"LBLF" in data:  # nobody knows how long a frame is
            raise RecordError(f"{shown}: its first header is broken (byte 0)")
        return Scan(head, {}, (), np.zeros(0, frame_dtype(0, 0)), 0, len(data), ())
    metrics, frames = _joined(parts, len(header["layers"]))
    return Scan(head, header, metrics, frames, start + whole, len(data) - whole, tuple(notes))


def _joined(parts: list[tuple[tuple[str, ...], np.ndarray]], layers: int) -> tuple[tuple[str, ...], np.ndarray]:
    """All frames as one array; restarts may have recorded other metrics."""
    names = tuple(dict.fromkeys([*METRICS, *(name for of_part, _ in parts for name in of_part)]))
    dtype = frame_dtype(layers, len(names))
    whole = []
    for of_part, frames in parts:
        if of_part != names:
            wider = np.zeros(len(frames), dtype)
            for field in dtype.names or ():
                if field != "values":
                    wider[field] = frames[field]
            wider["values"] = np.nan
            wider["values"][:, [names.index(name) for name in of_part]] = frames["values"]
            frames = wider
        whole.append(frames)
    return names, whole[0] if len(whole) == 1 else np.concatenate([np.zeros(0, dtype), *whole])


def _run(path: Path, found: Scan, number: int, files: list[tuple[int, Path]], scans: dict[Path, Scan]) -> Run | None:
    header = dict(found.header)
    notes = [*found.notes, *header.pop("notes", [])]
    frames = _sane(found.frames)
    if len(frames) < len(found.frames):
        notes.append(f"{printable(path.name)}: {len(found.frames) - len(frames)} intervals have impossible numbers, left out")
    if not len(frames):
        return None
    frames, of_course = _course(frames)
    notes += of_course
    if found.torn:
        notes.append(f"{printable(path.name)}: the last {found.torn} bytes are not whole and were left out")
    loads, need = path.with_suffix(".loads"), frames["load_at"] + found.load_bytes
    if not loads.is_file():
        notes.append(f"{printable(loads.name)} is missing: no load of single experts")
    elif lost := int((need > loads.stat().st_size).sum()):
        notes.append(f"{printable(loads.name)} is truncated: no load of single experts for {lost} of {len(frames)} intervals")
    for key in ("num_experts", "topk"):
        if key in header and len(set(header[key])) == 1:
            header[key] = header[key][0]
    numbers = {other for other, _ in files}
    models = {scans[other].header.get("model") for _, other in files}
    name = printable(path.parent.resolve().name)
    name += f" run {number}" if len(numbers) > 1 else ""
    name += f" {header.get('model') or printable(path.stem)}" if len(models) > 1 else ""
    return Run(name, path, header, frames, notes, found, number, number == max(numbers))


def _sane(frames: np.ndarray) -> np.ndarray:
    """Frames whose numbers can be calculated with; a right checksum does not say so."""
    first, last, steps, load_at = (frames[name] for name in ("first", "last", "steps", "load_at"))
    good = (1 <= first) & (first <= last) & (last < MOST_ITERATION) & (1 <= steps) & (0 <= load_at) & (load_at < MOST_ITERATION)
    good[good] &= steps[good] <= last[good] - first[good] + 1
    return frames if good.all() else frames[good]


def _course(frames: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The intervals that count, and what there is to say: a resume makes void what was recorded from its first iteration on."""
    first, last = frames["first"], frames["last"]
    again = np.minimum.accumulate(np.append(first[1:], MOST_ITERATION)[::-1])[::-1]  # from here on recorded again later
    resumes, cut = [], {}
    for i in np.flatnonzero((first < again) & (again <= last)):
        cut[int(again[i])] = (int(first[i]), int(last[i]))
    for i in np.flatnonzero(first[1:] <= last[:-1]):
        start = int(first[i + 1])
        note = f"iterations {start} to {last[i]} were recorded again after a resume: the later course counts"
        if start in cut:
            begin, end = cut[start]
            note += f"; the interval {begin} to {end} counts up to {start - 1}, with its mean over {begin} to {end}"
        resumes.append(note)
    if resumes:
        kept = again > first
        frames, again = frames[kept], again[kept]
        frames["last"] = np.minimum(frames["last"], again - 1)
        frames["steps"] = np.minimum(frames["steps"], frames["last"] - frames["first"] + 1)
    gaps = [
        f"iterations {frames['last'][i] + 1} to {frames['first'][i + 1] - 1} are missing"
        for i in np.flatnonzero(frames["first"][1:] > frames["last"][:-1] + 1)
    ]
    return frames, [*_few(resumes, "resumes"), *_few(gaps, "gaps")]


def _few(notes: list[str], what: str) -> list[str]:
    more = len(notes) - MOST_NOTES
    return notes if more <= 0 else [*notes[:MOST_NOTES], f"and {more} more {what}"]


def _header_at(data: bytes, at: int) -> tuple[Any, int] | None:
    text_at = at + PREFIX.itemsize
    if len(data) < text_at or data[at : at + 4] != HEADER:
        return None
    end = text_at + int.from_bytes(data[at + 8 : text_at], "little")
    if end > len(data) or zlib.crc32(data[at + 8 : end]) != int.from_bytes(data[at + 4 : at + 8], "little"):
        return None
    try:
        return json.loads(data[text_at:end]), end
    except (ValueError, RecursionError):
        return None, end


def _frames_at(data: bytes, at: int, dtype: np.dtype) -> np.ndarray:
    """The whole frames that begin at a byte, one after the other."""
    size, view = dtype.itemsize, memoryview(data)
    most, count = (len(data) - at) // size, 0
    while count < most:
        frame = view[at + count * size : at + (count + 1) * size]
        if frame[:4] != FRAME or zlib.crc32(frame[8:]) != int.from_bytes(frame[4:8], "little"):
            break
        count += 1
    return np.frombuffer(data, dtype, count, at) if count else np.zeros(0, dtype)


def _next_whole(data: bytes, broken_at: int, header: dict[str, Any] | None) -> int | None:
    """Where the next header, or frame as `header` has them, begins that is whole."""
    for match in re.finditer(b"LBLH|LBLF", data[broken_at + 1 :]):
        at = broken_at + 1 + match.start()
        if match[0] == HEADER:
            if _header_at(data, at) is not None:
                return at
        elif header and len(_frames_at(data[at : at + _dtype(header).itemsize], 0, _dtype(header))):
            return at
    return None


def _dtype(header: dict[str, Any]) -> np.dtype:
    return frame_dtype(len(header["layers"]), len(header["metrics"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _is_count(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 10_000


# What else a header may hold, and how it is known that it can be used.
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("run", "start", "model", "scope"), _is_text),
    **dict.fromkeys(("settings", "versions"), lambda value: isinstance(value, dict)),
    **dict.fromkeys(("data_parallel", "micro_batches", "log_interval"), _is_count),
    "alpha": lambda value: _is_number(value) or _is_list(value, _is_number) and len(value) > 0,
    "started": lambda value: _is_number(value) and 0 <= value < 1e11,
    **dict.fromkeys(("balancing", "notes"), lambda value: _is_list(value, _is_text)),
}


def _checked(header: Any) -> tuple[bool, dict[str, Any], list[str]]:
    """Whether it can be used, what of it can, and what is odd."""
    if not isinstance(header, dict):
        return False, {}, ["its header is not a JSON object"]
    if header.get("format") != FORMAT:
        return False, {}, [f"written in format {printable(header.get('format', 1))[:20]}; this version reads format {FORMAT}"]
    header = _plain(header, 0)
    layers, experts, metrics = (header.get(key) for key in ("layers", "num_experts", "metrics"))
    is_layers = _is_list(layers, _is_text) and 0 < len(layers) <= MOST_LAYERS
    is_experts = is_layers and _is_list(experts, lambda e: type(e) is int and 0 < e <= MOST_EXPERTS)
    is_experts = is_experts and len(experts) == len(layers) and len(layers) * max(experts) <= 16 * MOST_EXPERTS
    is_metrics = _is_list(metrics, _is_text) and 0 < len(metrics) == len(set(metrics)) <= MOST_METRICS
    bad = [
        f"its header cannot be used: {key} is {printable(json.dumps(value))[:60]}"
        for key, value, good in (
            ("layers", layers, is_layers),
            ("num_experts", experts, is_experts),
            ("metrics", metrics, is_metrics),
        )
        if not good
    ]
    if bad:
        return False, header, bad
    header = {key: value for key, value in header.items() if value is not None}
    odd = [key for key, good in _OPTIONAL.items() if key in header and not good(header[key])]
    topk = header.get("topk")
    if topk is not None and not (
        isinstance(topk, list)
        and len(topk) == len(layers)
        and all(k is None or type(k) is int and 0 < k <= e for k, e in zip(topk, experts))
    ):
        odd.append("topk")
    notes = [f"{key} in its header is odd ({printable(json.dumps(header.pop(key)))[:60]}), left out" for key in odd]
    return True, header, notes


def _plain(value: Any, depth: int) -> Any:
    """Texts that can be shown, finite numbers, and no deep nesting."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict) and depth < 4:
        return {printable(key): _plain(of_key, depth + 1) for key, of_key in value.items()}
    if isinstance(value, list) and depth < 4:
        return [_plain(item, depth + 1) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else printable(value)[:100]
