"""A pool of processes that stay alive between cases: importing Megatron takes seconds, a case a fraction of one.

Every case gets process groups of its own (each gloo group starts threads), destroyed at its end. A worker that fails ends
the case; one that does not answer ends the pool, and the next case starts a fresh one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from ranks import fork_context

START_SECONDS = 300
TIMEOUT_SECONDS = 60


class CaseFailed(AssertionError):
    """A rank raised; the message holds the tracebacks of all ranks that did."""


class Pool:
    """`run(function, world_size, *args)` gives function(*args) of every rank, with torch.distributed initialised."""

    def __init__(self, size: int = 4, device: str = "cpu", backend: str | None = None) -> None:
        """
        Args:
            size: processes.
            device: "cpu", or "cuda": one GPU per process, as long as there are enough.
            backend: of torch.distributed; None is gloo on the CPU, NCCL on GPUs. With gloo processes can share a GPU.
        """
        self._size, self._device = size, device
        self._backend = backend or ("gloo" if device == "cpu" else "nccl")
        self._workers: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        # Forks are there at once; but a process that forks must not have used CUDA.
        context = fork_context() if self._device == "cpu" else multiprocessing.get_context("spawn")
        for index in range(self._size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self._device, self._backend, index), daemon=True)
            process.start()
            self._workers.append((process, here))
        for process, pipe in self._workers:
            assert pipe.poll(START_SECONDS) and pipe.recv() == "ready", f"worker {process.pid} did not start"

    @property
    def alive(self) -> bool:
        """Whether the processes are there: they start with the first case, and again after one that got stuck."""
        return bool(self._workers)

    def run(self, function: Callable, world_size: int, *args: Any) -> list[Any]:
        if not self._workers:
            self._start()
        assert world_size <= self._size
        with tempfile.TemporaryDirectory() as folder:
            ranks = self._workers[:world_size]
            for rank, (_, pipe) in enumerate(ranks):
                pipe.send((function, rank, world_size, os.path.join(folder, "store"), args))
            results, failures, stuck = [], [], False
            for rank, (_, pipe) in enumerate(ranks):
                # After one failure the others wait for it in a collective: no long patience with them.
                if not pipe.poll(TIMEOUT_SECONDS if not failures else 2):
                    failures.append(f"rank {rank}: no answer")
                    stuck = True
                    continue
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError) as error:  # killed, by gloo for example
                    failures.append(f"rank {rank}: its process has ended ({type(error).__name__})")
                    stuck = True
                    continue
                if kind == "error":
                    failures.append(f"rank {rank}:\n{value}")
                results.append(value)
        if stuck:
            self.close()
        if failures:
            raise CaseFailed("\n".join(failures))
        return results

    def close(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


def _serve(pipe, device: str, backend: str, index: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Most of the groups that Megatron makes are never used: connect those that are.
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if device == "cpu":
        import preloaded  # noqa: F401
    # Imported here, so that a case's time is its own.
    import megatron.core.distributed
    import megatron.core.transformer.moe.moe_layer  # noqa: F401
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(index % torch.cuda.device_count())
        if backend == "gloo":
            import gloo_on_gpu

            gloo_on_gpu.install()
    pipe.send("ready")
    while True:
        try:
            function, rank, world_size, store, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
            value = function(*args)
            dist.barrier()
            pipe.send(("value", value))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            # A model holds its groups in reference cycles, and a group its threads: hundreds of cases would be thousands.
            gc.collect()
