"""Collectives on one GPU: at world size 1 the plugin and Megatron leave them out, and here they do not.

NCCL's all-reduce over one rank is the identity, with everything around it: work on NCCL's stream, events, waits, capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PRETENDED_RANKS = 2


@contextmanager
def pretended_size(names: set[str] | None) -> Iterator[None]:
    """These groups (None: all) say that they have two ranks."""
    size = vars(dist.ProcessGroup)["size"]

    def pretended(self: dist.ProcessGroup) -> int:
        return PRETENDED_RANKS if names is None or self.group_name in names else size.__get__(self, type(self))()

    dist.ProcessGroup.size = pretended
    try:
        yield
    finally:
        dist.ProcessGroup.size = size


@contextmanager
def forced_reductions() -> Iterator[None]:
    """The plugin starts a real all-reduce wherever it would with several ranks, and computes as with one."""
    from megatron_global_lbl.core.collective import Reduction

    start = Reduction.__init__

    def forced(self: Reduction, *args: Any, **kwargs: Any) -> None:
        with pretended_size(None):
            start(self, *args, **kwargs)

    Reduction.__init__ = forced
    try:
        yield
    finally:
        Reduction.__init__ = start


@dataclass
class Issued:
    """All-reduces that were issued, and those of them that went into a CUDA graph."""

    number: int = 0
    captured: int = 0


@contextmanager
def counted_all_reduces() -> Iterator[Issued]:
    """Counts the all-reduces that reach a process group while inside."""
    issued = Issued()
    allreduce = vars(dist.ProcessGroup)["allreduce"]

    def counted(self: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        issued.number += 1
        issued.captured += torch.cuda.is_current_stream_capturing()
        return allreduce.__get__(self, type(self))(*args, **kwargs)

    dist.ProcessGroup.allreduce = counted
    try:
        yield issued
    finally:
        dist.ProcessGroup.allreduce = allreduce
