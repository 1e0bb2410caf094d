"""The one place that issues a collective: sums of small integer or float buffers over a group of ranks, and what
`megatron_global_lbl.specialise` exchanges while it evaluates.

Order: every reduction starts in a forward of a MoE layer or at the step's end, and all ranks of a group run the same
layers of the same pipeline stage in the same schedule. So all ranks start the same reductions in the same order, whatever
their backward does: that is why nothing is ever started in a backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.core.whole_graph import WholeGraph
from megatron_global_lbl.settings import ConfigError


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes into a CUDA graph instead of being done now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Reduction:
    """An all-reduce (sum, in place) that has been started; `wait` gives its result."""

    def __init__(
        self, buffer: Tensor, group: dist.ProcessGroup | None, *, blocking: bool, whole_graph: WholeGraph | None = None
    ) -> None:
        """Start summing `buffer` over `group`; None, or a group of one rank, means that it is the result already.

        Args:
            buffer: what to sum.
            group: the ranks.
            blocking: wait for the sum on the spot.
            whole_graph: may hold the first use, too.
        """
        self._buffer = buffer
        self._work: dist.Work | None = None
        self._was_waited_for = False
        if group is not None and group.size() > 1:
            self._work = dist.all_reduce(buffer, group=group, async_op=True)
            if blocking:
                self.wait()
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


@dataclass(frozen=True)
class BalanceGroup:
    """The ranks of one pipeline stage over which f is counted.

    Attributes:
        stage: process group of all ranks of the stage (TP x CP x DP).
        model: process group of one data-parallel rank (TP x CP).
        counted: process group over which micro-batches are counted: the stage, or a part of it (`--moe-lbl-group-size`).
        size: data-parallel ranks in `counted`.
        index: which part of the stage `counted` is.
        parts: number of such parts in the stage.
        leads: this rank is the first of `model`: what is counted once per data-parallel rank is counted by it.
    """

    stage: dist.ProcessGroup
    model: dist.ProcessGroup
    counted: dist.ProcessGroup
    size: int
    index: int
    parts: int
    leads: bool

    @staticmethod
    def create(stage: dist.ProcessGroup, model: dist.ProcessGroup, group_size: int | None) -> BalanceGroup:
        """Split the stage into groups of `group_size` data-parallel ranks; None means the whole stage.

        Called by all ranks of a stage at the same point (the first forward of its first MoE layer), by no others: ranks
        of a stage without MoE layers never get here, so only the members take part in creating a group.

        Raises:
            ConfigError: `group_size` does not divide the data-parallel size, or the ranks of a TP x CP group do not
                lie side by side in the stage.
        """
        data_parallel_size = stage.size() // model.size()
        leads = model.rank() == 0
        if group_size is None or group_size == data_parallel_size:
            return BalanceGroup(stage, model, stage, data_parallel_size, 0, 1, leads)
        if data_parallel_size % group_size:
            raise ConfigError(f"--moe-lbl-group-size {group_size} does not divide the data-parallel size {data_parallel_size}")
        ranks = sorted(dist.get_process_group_ranks(stage))
        index = ranks.index(dist.get_rank()) // (group_size * model.size())
        members = ranks[index * group_size * model.size() :][: group_size * model.size()]
        if not set(dist.get_process_group_ranks(model)) <= set(members):
            raise ConfigError(
                f"--moe-lbl-group-size {group_size} needs the ranks of a TP x CP group side by side; they are "
                f"{dist.get_process_group_ranks(model)} of {ranks}"
            )
        counted = dist.new_group(members, use_local_synchronization=True)
        return BalanceGroup(stage, model, counted, group_size, index, data_parallel_size // group_size, leads)
