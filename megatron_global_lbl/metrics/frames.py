"""The format of the balance record: two files per model and pipeline stage, which only ever grow. NumPy only.

    NAME.balance   a header at every start of a training, then one frame per log interval, all of one size
    NAME.loads     float16 [L, E] per interval and nothing else: the load of every expert, 1.0 being an even one

    header         "LBLH"  crc32 u4  length u4  JSON of that length
    frame          "LBLF"  crc32 u4  see `frame_dtype`

Numbers are little-endian. A crc32 is that of what follows it in the header or frame. The scalars have a file of their own, so
that a long record can be opened without reading its loads, which are many times larger. Loads are written before the frame that
points to them: what is at the end of a file without being whole (a killed process) is a torn tail and counts for nothing.
Shape suffixes: L layers, E experts, N frames.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
METRICS = ("lbl_global", "lbl_micro", "max_vio", "entropy", "dead", "cv", "uncertainty")
LOAD = np.dtype("<f2")
_HEADER, _FRAME = b"LBLH", b"LBLF"
_PREFIX = np.dtype([("magic", "S4"), ("crc", "<u4"), ("length", "<u4")])
_CHECKED_FROM = 8  # a crc32 is that of all bytes from here on


class RecordError(ValueError):
    """A file that is no balance record, or a broken one; the message names the file and the byte."""


def frame_dtype(layers: int) -> np.dtype:
    """One log interval of `layers` layers; `values` in the order of `METRICS`."""
    return np.dtype(
        [
            *(("magic", "S4"), ("crc", "<u4")),
            *(("iteration", "<i8"), ("steps", "<i8")),  # the last iteration (1-based), and how many the interval has
            ("time", "<f8"),  # seconds since 1970
            *(("sequences", "<f8"), ("tokens", "<f8")),  # the balance batch of f; NaN if not known
            *(("load_at", "<i8"), ("load_crc", "<u4")),  # where the loads are, in bytes
            ("values", "<f4", (len(METRICS), layers)),
        ]
    )


@dataclass(frozen=True)
class Segment:
    """What one training wrote between its start and its end.

    Attributes:
        header: the JSON of the header.
        frames: [N] of `frame_dtype`, in the order in which they were written.
    """

    header: dict[str, Any]
    frames: np.ndarray


@dataclass(frozen=True)
class Scan:
    """A file, read up to its torn tail.

    Attributes:
        segments: all of them.
        end: bytes that are whole.
        torn: bytes after them.
    """

    segments: list[Segment]
    end: int
    torn: int


def loads_of(path: Path) -> Path:
    """The file of the loads beside NAME.balance."""
    return path.with_suffix(".loads")


def load_bytes(header: dict[str, Any]) -> int:
    """Bytes of the loads of one interval."""
    return len(header["layers"]) * header["num_experts"] * LOAD.itemsize


def packed_header(header: dict[str, Any]) -> bytes:
    """A header as it is written."""
    text = json.dumps(header).encode()
    return _with_crc(np.array((_HEADER, 0, len(text)), dtype=_PREFIX).tobytes() + text)


def packed_frame(values: Mapping[str, np.ndarray], **fields: float) -> bytes:
    """A frame as it is written; `values` [L] by name of the metric, `fields` the others of `frame_dtype`."""
    values_ML = np.stack([np.asarray(values[name], dtype=np.float32) for name in METRICS])
    frame = np.zeros((), dtype=frame_dtype(values_ML.shape[1]))
    frame["magic"], frame["values"] = _FRAME, values_ML
    for name, value in fields.items():
        frame[name] = value
    return _with_crc(frame.tobytes())


def scan(path: Path, known: Scan | None = None) -> Scan:
    """Read NAME.balance, all of it checked.

    Args:
        path: the file.
        known: an earlier scan of it; what was whole then is not read again, since files only grow.

    Raises:
        RecordError: it is something else, or broken elsewhere than at its end.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)
    if data[:4].tobytes() != _HEADER[:size]:
        raise RecordError(f"{path}: not a balance record (byte 0)")
    segments: list[Segment] = []
    end = 0
    if known is not None and known.segments and known.end <= size and _begins_as(data, known):
        *segments, last = known.segments
        frames = _frames_at(data, known.end, last.frames.dtype)
        segments.append(Segment(last.header, np.concatenate([last.frames, frames]) if len(frames) else last.frames))
        end = known.end + frames.nbytes
    while (found := _header_at(data, end)) is not None:
        header, frames_at = found
        if header.get("format") != FORMAT:
            raise RecordError(f"{path}: format {header.get('format')} at byte {end} is unknown; this release reads {FORMAT}")
        frames = _frames_at(data, frames_at, frame_dtype(len(header["layers"])))
        segments.append(Segment(header, frames))
        end = frames_at + frames.nbytes
    if end < size and _goes_on(data, end, segments):
        raise RecordError(f"{path}: broken at byte {end}, and what follows is whole")
    return Scan(segments, end, size - end)


def _with_crc(data: bytes) -> bytes:
    return data[:4] + zlib.crc32(data[_CHECKED_FROM:]).to_bytes(4, "little") + data[_CHECKED_FROM:]


def _is_whole(data: np.ndarray) -> bool:
    return zlib.crc32(data[_CHECKED_FROM:]) == int.from_bytes(data[4:_CHECKED_FROM].tobytes(), "little")


def _header_at(data: np.ndarray, at: int) -> tuple[dict[str, Any], int] | None:
    """The header that begins at a byte and where it ends; None if there is no whole one."""
    if len(data) - at < _PREFIX.itemsize or data[at : at + 4].tobytes() != _HEADER:
        return None
    end = at + _PREFIX.itemsize + int(data[at : at + _PREFIX.itemsize].view(_PREFIX)["length"][0])
    if end > len(data) or not _is_whole(data[at:end]):
        return None
    return json.loads(data[at + _PREFIX.itemsize : end].tobytes()), end


def _begins_as(data: np.ndarray, known: Scan) -> bool:
    """Whether it is still the file that was scanned: a header says when its training was started."""
    found = _header_at(data, 0)
    return found is not None and found[0] == known.segments[0].header


def _frames_at(data: np.ndarray, at: int, dtype: np.dtype) -> np.ndarray:
    """The whole frames that begin at a byte, one after the other."""
    count = (len(data) - at) // dtype.itemsize
    raw = data[at : at + count * dtype.itemsize].reshape(count, dtype.itemsize)
    other = np.flatnonzero(raw[:, :4].copy().view("S4")[:, 0] != _FRAME)
    frames = raw[: other[0] if len(other) else count].reshape(-1).view(dtype)
    buffer, size = memoryview(frames).cast("B"), dtype.itemsize
    for index, crc in enumerate(frames["crc"].tolist()):
        if zlib.crc32(buffer[index * size + _CHECKED_FROM : (index + 1) * size]) != crc:
            return frames[:index]
    return frames


def _goes_on(data: np.ndarray, broken_at: int, segments: list[Segment]) -> bool:
    """Whether anything whole follows, so that what is broken is not the tail of a process that was killed."""
    rest = data[broken_at:].tobytes()
    for magic in (_HEADER, _FRAME):
        at = rest.find(magic)
        while at >= 0:
            if magic == _HEADER and _header_at(data, broken_at + at) is not None:
                return True
            # After a header that cannot be read nobody knows how long a frame is.
            if magic == _FRAME and (not segments or len(_frames_at(data, broken_at + at, segments[-1].frames.dtype))):
                return True
            at = rest.find(magic, at + 1)
    return False
