"""Applies a unified diff of one file at exactly its lines, and replaces a file in one move.

The caller knows the file by its checksum, so no place has to be searched for: what `patch` and `git apply` do to find one
in a file that has changed is what must not happen here. Neither has to be installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple


class DoesNotFit(Exception):
    """The patch is not one of this file."""


class Hunk(NamedTuple):
    """One place of a patch: from this line on (from 0), these lines become those."""

    start: int
    old: list[bytes]
    new: list[bytes]


def hunks(patch: bytes, *, reverse: bool = False) -> list[Hunk]:
    """The places of a unified diff of one file."""
    result: list[Hunk] = []
    for line in patch.removesuffix(b"\n").split(b"\n"):
        if header := re.match(rb"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@", line):
            result.append(Hunk(int(header[2 if reverse else 1]) - 1, [], []))
        elif result:
            if not line.startswith(b"-" if reverse else b"+"):
                result[-1].old.append(line[1:])
            if not line.startswith(b"+" if reverse else b"-"):
                result[-1].new.append(line[1:])
    return result


def apply(content: bytes, patch: bytes, *, reverse: bool = False) -> bytes:
    """The content with the patch, every hunk at exactly its line.

    Raises:
        DoesNotFit: the lines there are others.
    """
    lines = content.split(b"\n")
    for hunk in reversed(hunks(patch, reverse=reverse)):  # from the end, so that the line numbers before it stay
        stop = hunk.start + len(hunk.old)
        if lines[hunk.start : stop] != hunk.old:
            raise DoesNotFit(f"the patch does not fit at line {hunk.start + 1}")
        lines[hunk.start : stop] = hunk.new
    return b"\n".join(lines)


def replace_file(file: Path, content: bytes) -> None:
    """Write the file in one move, with its mode and owner."""
    file = file.resolve()  # what a link points to, not the link
    status = file.stat()
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(PermissionError):  # only root may keep a file another user's
            os.chown(temporary, status.st_uid, status.st_gid)
        os.chmod(temporary, status.st_mode & 0o7777)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
