"""Replaces a file in one move: whoever reads it sees the old one or the new one, and a failure leaves the old one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


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
