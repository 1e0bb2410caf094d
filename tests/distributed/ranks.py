"""Ranks as forks of one process that has imported PyTorch and Megatron: the imports take seconds, most trainings here less.

Each rank is a process of its own from there on, with its environment, command line and output. What `torchrun` itself does
(the end of the other ranks after a failure, its report) is the subject of test_bad_input.py, which starts it, as the tests of
the launch scripts, the patches and the demo do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent


def fork_context():
    """The `multiprocessing` context whose processes have imported what preloaded.py imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def run(arguments: list[str], processes: int, timeout: float) -> tuple[int, str]:
    """`torchrun --nproc-per-node processes arguments`: (0 or the first exit status that is another, all output rank by rank).

    Args:
        arguments: of `python`: `-m MODULE ...` or `SCRIPT ...`.
        processes: ranks.
        timeout: seconds after which ranks that still run are killed, with status 124.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    world |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    context = fork_context()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(processes)]
        ranks = []
        try:
            for rank, output in enumerate(outputs):
                environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = context.Process(target=_as_a_script, args=(arguments, environment, str(output)))
                process.start()
                ranks.append(process)
            status = _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return status, "".join(output.read_text(errors="replace") for output in outputs if output.exists())


def _wait(ranks: list, deadline: float) -> int:
    """Until all have ended, or one with a failure."""
    while True:
        codes = [process.exitcode for process in ranks]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        if time.monotonic() > deadline:
            return 124
        connection.wait([process.sentinel for process in ranks if process.exitcode is None], timeout=1)


def _as_a_script(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the fork: what `python arguments` does, with standard output and error in a file."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        if arguments[0] == "-m":
            sys.argv = ["-m", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        # The end of a process of `multiprocessing` leaves these out (gh-83856); files are closed by them.
        atexit._run_exitfuncs()
