"""The directory of a balance record: held open while a training writes there, and locked against a second one."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import socket
import tempfile
from pathlib import Path

from megatron_global_lbl.metrics.record import printable
from megatron_global_lbl.settings import ConfigError, flag

LOCK = ".lock"
HELD = ".lock.held"  # where the file system has no locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Place:
    """A directory by its descriptor: one that is renamed is still written, one that takes its name is not.

    Attributes:
        path: as it was given.
        fd: for the `dir_fd` of `os` functions.
    """

    def __init__(self, path: str | Path) -> None:
        """Make it if it is not there.

        Raises:
            OSError: it cannot be made.
        """
        self.path = Path(path)
        self._said = False
        self._open()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def open(self, name: str, flags: int) -> int:
        """Open a file, never through a symbolic link.

        Raises:
            OSError: as `os.open`; the message names the file.
        """
        try:
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=self.fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(error.errno, f"{printable(self.path / name)} is a symbolic link") from None
            raise
        return descriptor

    def stat(self, name: str) -> os.stat_result | None:
        """Of the file itself, not of what a link points to; None if there is none."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def check(self) -> str | None:
        """What to print, once, if the directory of that name is another one now. A deleted one is made again.

        Raises:
            OSError: it cannot be made.
        """
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        try:
            here = os.fstat(self.fd)
            is_deleted = here.st_nlink == 0
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS says so of a directory that is gone
                raise
            is_deleted = True
        if not is_deleted and there is not None and os.path.samestat(there, here):
            return None
        if is_deleted:
            gone = self.fd
            self._open()
            os.close(gone)
            return f"{printable(self.path)} was deleted or replaced; the record goes on in a new directory of that name"
        if self._said:
            return None
        self._said = True
        return f"{printable(self.path)} was renamed or replaced; the record goes on in the directory with the new name"


class RecordDirectory:
    """Made, checked and locked by rank 0, which alone writes.

    The lock is POSIX's: it ends with the process, and child processes (data loaders) do not inherit it. On a file system
    without locks it is a file that is created exclusively and says which process holds it.

    Attributes:
        place: the directory; None on other ranks.
    """

    def __init__(self, directory: str, *, leads: bool | None = None) -> None:
        """
        Args:
            directory: of the record.
            leads: this process writes; by default rank 0 does.

        Raises:
            ConfigError: it cannot be made or written, or another training writes there.
        """
        self.place: Place | None = None
        self._lock: int | None = None
        self._process = os.getpid()
        self._name, self._disputed = LOCK, False
        if not (_rank() == 0 if leads is None else leads):
            return
        try:
            self.place = Place(directory)
            with tempfile.TemporaryFile(dir=directory):
                pass
            self._take()
            atexit.register(self.release)  # for a lock that does not end with the process
        except OSError as error:
            self.release()
            raise ConfigError(
                f"{flag('metrics_dir')} {printable(directory)}: {error.strerror or error}; give every training a writable "
                "directory of its own"
            ) from None

    def check(self) -> list[str]:
        """Before something is written: what to say of the directory and its lock, each change once.

        Raises:
            OSError: the directory is gone and cannot be made.
        """
        if self.place is None:
            return []
        said = [moved] if (moved := self.place.check()) else []
        if self._lock is None or self._disputed:
            return said
        there = self.place.stat(self._name)
        if there is not None and os.path.samestat(there, os.fstat(self._lock)):
            return said
        lost = self._lock
        path = printable(self.place.path / self._name)
        try:
            self._take()
        except OSError as error:
            self._disputed = True
            return [*said, f"the lock {path} was deleted, and {error.strerror}: both are recorded, each in files of its own"]
        os.close(lost)
        return said if moved else [*said, f"the lock {path} was deleted while this training held it; it is locked again"]

    def release(self) -> None:
        """Let other trainings write there. Idempotent."""
        if os.getpid() != self._process:  # a forked child has no lock
            return
        atexit.unregister(self.release)
        if self._lock is not None and self.place is not None:
            if self._name == HELD and not self._disputed and self.place.stat(HELD):
                os.unlink(HELD, dir_fd=self.place.fd)
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None
        if self.place is not None:
            self.place.close()

    def _take(self) -> None:
        """
        Raises:
            OSError: another process holds the lock, or it cannot be written.
        """
        assert self.place is not None
        descriptor = self.place.open(LOCK, os.O_RDWR | os.O_CREAT)
        self._name = LOCK
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                self._name = HELD
                descriptor = self._take_exclusively(self.place)
            else:
                who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
                lock = printable(self.place.path / LOCK)
                raise OSError(errno.EAGAIN, f"{who} writes there and holds {lock}") from None
        os.ftruncate(descriptor, 0)
        me = {"host": socket.gethostname(), "process": os.getpid(), "started": process_start(os.getpid())}
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        self._lock = descriptor

    def _take_exclusively(self, place: Place) -> int:
        for _ in range(2):
            try:
                return place.open(HELD, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                descriptor = place.open(HELD, os.O_RDONLY)
                holder = _holder(descriptor)
                os.close(descriptor)
                if _may_run(holder):
                    break
                os.unlink(HELD, dir_fd=place.fd)
        who = f"process {holder['process']} on {holder['host']} writes" if holder else "another process may write"
        path = printable(place.path / HELD)
        raise OSError(errno.EAGAIN, f"{who} there, says {path}; delete that file if the process has ended (no locks here)")


def process_start(process: int) -> str | None:
    """Boot and start time of a process of this host, which tell it from an earlier one of the same number; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot} {after_name[19]}"


def _holder(descriptor: int) -> dict[str, str]:
    """What the lock file says of the process that wrote it."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return {key: printable(holder[key]) for key in ("host", "process", "started")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _may_run(holder: dict[str, str]) -> bool:
    """Another host cannot be asked, and a file without content is being written or was left by a full disk."""
    if not holder or holder["host"] != socket.gethostname():
        return True
    if holder["process"] == str(os.getpid()):
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return holder["started"] in ("None", str(process_start(int(holder["process"]))))


def _rank() -> int:
    """Without RANK 0, as in Megatron."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
