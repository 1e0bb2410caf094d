"""The directory of a balance record, before the training: can be written, holds nothing broken, and is nobody else's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch.distributed as dist

from megatron_global_lbl.metrics.frames import RecordError, scan
from megatron_global_lbl.metrics.lock import Lock
from megatron_global_lbl.settings import ConfigError, flag


def _rank() -> int:
    """Without RANK 0, as Megatron has it: of several processes without it, not initialised yet, only one gets the lock."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


class RecordDirectory:
    """Made and checked on every rank; rank 0 holds its lock for the run until `release`."""

    def __init__(self, directory: str) -> None:
        """
        Raises:
            ConfigError: it cannot be made or written, another training writes there, or what it holds cannot be continued.
        """
        self._lock: Lock | None = None
        name = f"{flag('metrics_dir')} {directory}"
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory):
                pass
            if _rank() == 0:
                self._lock = Lock(directory)
                for path in sorted(Path(directory).glob("*.balance")):
                    scan(path)
        except OSError as error:
            self.release()
            reason = error.strerror or str(error)
            raise ConfigError(f"{name}: {reason}; allowed: a directory that can be written, one for each training") from None
        except RecordError as error:
            self.release()
            raise ConfigError(
                f"{name} cannot be continued: {error}; allowed: another directory, or that file moved away"
            ) from None

    def release(self) -> None:
        """Let other trainings write there; doing it again changes nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
