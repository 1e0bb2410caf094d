"""One training at a time writes a balance record. The lock is the system's: it goes with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class Locked(OSError):
    """Another process holds the lock; the message says which."""


class Lock:
    """Held from now on until `release`, or the end of the process.

    A POSIX lock: child processes (data loaders) do not inherit it, and file systems that are shared over a network know it.
    Where one does not, the file says who holds it, and a process of this host that has ended is told from one that runs.
    """

    def __init__(self, directory: str | Path) -> None:
        """
        Raises:
            Locked: a process that runs holds it.
            OSError: the directory cannot be written.
        """
        self._path = Path(directory) / LOCK
        self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(self._descriptor)
            if error.errno in _HELD or _runs_here(holder):
                os.close(self._descriptor)
                who = f"process {holder.get('process')} on {holder.get('host')}" if holder else "another process"
                raise Locked(errno.EAGAIN, f"{who} is writing there") from None
        text = json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def release(self) -> None:
        """Let others have it; doing it again changes nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)  # nobody holds it: for file systems without locks
            os.close(self._descriptor)
            self._descriptor = None


def _holder(descriptor: int) -> dict:
    try:
        return dict(json.loads(os.pread(descriptor, 1000, 0)))
    except (ValueError, TypeError):
        return {}


def _runs_here(holder: dict) -> bool:
    """Only this host's processes can be asked for."""
    if holder.get("host") != socket.gethostname() or holder.get("process") == os.getpid():
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
