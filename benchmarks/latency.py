"""Makes every all-reduce between ranks take longer, and tells when somebody waited for one.

An all-reduce over more than one rank completes `seconds` later than it really does, without using the CPU meanwhile. All of
them do, DDP's, the log's and the gradient norm's as well as the loss': a network is slow for everybody, and so the losses
are compared under the same network. Reductions of one group run one after the other, as NCCL runs them: k of them under way
need k times the latency.

Where: `ProcessGroup.allreduce` and `allreduce_coalesced`, through which `torch.distributed.all_reduce` and its coalescing
manager (Megatron's DDP) go. On the CPU the wait sleeps; on a GPU a spinning kernel of one thread delays a stream of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

METHODS = ("allreduce", "allreduce_coalesced")
FORWARD, BACKWARD, OTHER = "forward", "backward", "step end"


@dataclass
class Reduced:
    """One all-reduce over more than one rank.

    Attributes:
        started: phase in which it was started.
        payload: bytes.
        waited: phase in which it was first waited for.
        seconds: how long the host waited, for the other rank too (on NCCL it never does: the stream waits).
        exposed: the part of it that was the injected latency alone, all ranks having arrived.
        between: CPU time of the thread from its start to the first wait, which hides latency on any machine.
    """

    started: str
    payload: int
    waited: str | None = None
    seconds: float = 0.0
    exposed: float = 0.0
    between: float = 0.0


@dataclass
class Latency:
    """The injected latency, and what was reduced since `reduced` was last emptied."""

    seconds: float = 0.0
    reduced: list[Reduced] = field(default_factory=list)
    in_forward: bool = False
    _free_at: dict[str, float] = field(default_factory=dict)
    _streams: dict[str, Any] = field(default_factory=dict)
    _cycles_per_second: float = 0.0

    def phase(self) -> str:
        """Where the training step is."""
        if torch._C._current_graph_task_id() != -1:
            return BACKWARD
        return FORWARD if self.in_forward else OTHER

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every all-reduce of this process while inside; the schedule's forward is recognised by `forward_step`."""
        from megatron.core.pipeline_parallel import schedules

        # From the class' own table: what getattr gives has lost its binding and cannot be put back.
        originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS}
        forward_step = schedules.forward_step

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.in_forward = True
            try:
                return forward_step(*args, **kwargs)
            finally:
                self.in_forward = False

        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, self._delayed(original.__get__))
        schedules.forward_step = forward
        try:
            yield
        finally:
            schedules.forward_step = forward_step
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, original)

    def _delayed(self, bind: Callable) -> Callable:
        def allreduce(group: dist.ProcessGroup, tensors: Any, options: Any = None) -> Any:
            original = bind(group, type(group))
            work = original(tensors, options) if options is not None else original(tensors)
            if group.size() == 1:
                return work
            each = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            entry = Reduced(self.phase(), sum(tensor.numel() * tensor.element_size() for tensor in each))
            self.reduced.append(entry)
            delayed = (_OnGpu if each[0].is_cuda else _OnCpu)(self, work, group.group_name, entry)
            if options is not None and not options.asyncOp:
                delayed.wait()
                return None
            return delayed

        return allreduce

    def finished(self, group: str, now: float) -> float:
        """When a reduction that is really done at `now` counts as done."""
        self._free_at[group] = max(self._free_at.get(group, 0.0), now) + self.seconds
        return self._free_at[group]

    def stream(self, group: str) -> Any:
        """The CUDA stream on which a group's reductions are delayed, one after the other."""
        if group not in self._streams:
            self._streams[group] = torch.cuda.Stream()
        return self._streams[group]

    def cycles(self) -> int:
        """What `torch.cuda._sleep` needs to spin for `seconds`; calibrated once."""
        if not self._cycles_per_second:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(100_000_000)
            end.record()
            end.synchronize()
            self._cycles_per_second = 100_000_000 / (start.elapsed_time(end) / 1000)
        return int(self.seconds * self._cycles_per_second)


class _OnCpu:
    """What `all_reduce(async_op=True)` returns: gloo's work, done later."""

    def __init__(self, latency: Latency, work: Any, group: str, entry: Reduced) -> None:
        self._latency, self._work, self._entry = latency, work, entry
        self._done_at, self._cpu_began = 0.0, time.thread_time()
        self._known = threading.Event()
        # Called by gloo's thread when all ranks have arrived: the latency counts from then, not from this rank's start.
        work.get_future().add_done_callback(lambda _: self._done(group))

    def _done(self, group: str) -> None:
        self._done_at = self._latency.finished(group, time.perf_counter())
        self._known.set()

    def wait(self, timeout: Any = None) -> bool:
        begin, between = time.perf_counter(), time.thread_time() - self._cpu_began
        self._work.wait()
        self._known.wait()
        left = max(0.0, self._done_at - time.perf_counter())
        time.sleep(left)
        self._entry.exposed += left
        if self._entry.waited is None:
            self._entry.waited, self._entry.between = self._latency.phase(), between
        self._entry.seconds += time.perf_counter() - begin
        return True

    def is_completed(self) -> bool:
        return self._known.is_set() and time.perf_counter() >= self._done_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _OnGpu:
    """The same for NCCL: the waiting stream, not the host, is delayed."""

    def __init__(self, latency: Latency, work: Any, group: str, entry: Reduced) -> None:
        self._latency, self._work, self._entry = latency, work, entry
        stream = latency.stream(group)
        if work is None:  # NCCL has made the current stream wait already
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if work is not None:
                work.wait()
            if latency.seconds:
                torch.cuda._sleep(latency.cycles())
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self, timeout: Any = None) -> bool:
        torch.cuda.current_stream().wait_event(self._event)
        if self._entry.waited is None:
            self._entry.waited = self._latency.phase()
        return True

    def is_completed(self) -> bool:
        return self._event.query()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
