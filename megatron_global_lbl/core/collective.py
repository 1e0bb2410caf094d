"""The only place that issues a collective: sums of small buffers over a group of ranks, and what
`megatron_global_lbl.specialise` exchanges while it evaluates.

Order: a reduction starts at the end of a model chunk's forward, or at the end of a step or of an interval. Ranks of a group run
the same schedule, so they start the same reductions in the same order. Nothing starts in a backward, whose order may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.settings import ConfigError


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes into a CUDA graph instead of being done now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Reduction:
    """An all-reduce (sum, in place) that has been started; `wait` gives its result."""

    def __init__(self, buffer: Tensor, group: dist.ProcessGroup | None, *, whole_graph: WholeGraph | None = None) -> None:
        """Start summing `buffer` over `group`; with None, or a group of one rank, it is the result already.

        Args:
            buffer: what to sum.
            group: the ranks.
            whole_graph: may hold the first use, too.
        """
        self._buffer = buffer
        self._work: dist.Work | None = None
        self._was_waited_for = False
        if group is not None and group.size() > 1:
            self._work = dist.all_reduce(buffer, group=group, async_op=True)
            if is_capturing(buffer):
                # A CUDA graph contains the wait for what it starts, and no other graph may wait for it.
                if whole_graph is not None and whole_graph.is_open:
                    whole_graph.add(self)
                else:
                    self.join()

    def wait(self) -> Tensor:
        """The sum over the group. On NCCL the current stream waits, not the host; every stream that reads it has to."""
        if self._work is not None:
            self._work.wait()
        self._was_waited_for = True
        return self._buffer

    def settle(self) -> None:
        """Wait, unless somebody has."""
        if not self._was_waited_for:
            self.wait()

    def join(self) -> None:
        """Wait for the last time: the CUDA graph that is being captured will not be waited for."""
        self.wait()
        self._work = None


class WholeGraph:
    """A CUDA graph that holds forwards and their backwards, and what it started: each reduction is waited for where it is used
    first. Other graphs hold a forward alone, and what they start they wait for at once.

    Attributes:
        is_open: what is captured now goes into such a graph.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._started: list[Reduction] = []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The step that runs within goes into such a graph, if it is captured."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False
            self._started.clear()

    def add(self, reduction: Reduction) -> None:
        """The capture has come to its start."""
        self._started.append(reduction)

    def join(self) -> None:
        """The capture has come to its end: it waits for what nobody has used."""
        for reduction in self._started:
            reduction.join()
        self._started.clear()


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """`value` of every rank of the group, on every rank: when a checkpoint is written."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank of the group, one rank's below the other's, on every rank: [n, ...] becomes [ranks * n, ...]."""
    parts = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.cat(parts)


def exchange_columns(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of every rank, and of the columns this rank's share: [n, c] becomes [ranks * n, ceil(c / ranks)].

    Columns that are missing in the last share are zero. A sum over columns of what all ranks hold then is a sum over all
    columns, and each rank has sent no more than it had.
    """
    ranks = group.size()
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % ranks))
    share = rows.shape[1] // ranks
    sent = rows.view(rows.shape[0], ranks, share).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.view(-1, share)


def sync_group(stage: dist.ProcessGroup, model: dist.ProcessGroup, group_size: int | None) -> tuple[int, int, int]:
    """(groups of data-parallel ranks, this rank's among them, data-parallel ranks in each): f is counted within a group.

    Args:
        stage: all ranks of the pipeline stage (TP x CP x DP).
        model: those of one data-parallel rank (TP x CP).
        group_size: None for one group.

    Raises:
        ConfigError: `group_size` does not divide the data-parallel size, or the ranks of a TP x CP group are not adjacent in
            the stage.
    """
    data_parallel_size = stage.size() // model.size()
    if group_size is None or group_size == data_parallel_size:
        return 1, 0, data_parallel_size
    if data_parallel_size % group_size:
        raise ConfigError(f"--moe-lbl-group-size {group_size} does not divide the data-parallel size {data_parallel_size}")
    ranks = sorted(dist.get_process_group_ranks(stage))
    place = ranks.index(dist.get_rank()) // model.size()
    if set(dist.get_process_group_ranks(model)) != set(ranks[place * model.size() :][: model.size()]):
        raise ConfigError(
            f"--moe-lbl-group-size {group_size} needs the ranks of a TP x CP group side by side; they are "
            f"{dist.get_process_group_ranks(model)} of {ranks}"
        )
    return data_parallel_size // group_size, place // group_size, group_size
