"""Runs in a worker what `harness.run` does, without the Triton kernels."""

from __future__ import annotations

from typing import Any

from routers import plain_path


def run(*arguments: Any) -> Any:
    """One rank's part, as `harness.run`."""
    import harness

    with plain_path():
        return harness.run(*arguments)


class PlainPool:
    """A pool whose cases take the plain path."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def run(self, function: Any, world_size: int, *arguments: Any) -> list[Any]:
        """The harness' case, whatever function of it was asked for."""
        return self._pool.run(run, world_size, *arguments)
