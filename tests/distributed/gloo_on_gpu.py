"""What gloo does not take of CUDA tensors, done through the host, so that several ranks can share one GPU.

ProcessGroupGloo takes CUDA tensors in all-reduce, broadcast, all-gather, gather, scatter and all-to-all, and makes its
reduce-scatter of all-reduces; not in coalesced all-reduces (Megatron's DDP) and not in send and receive (pipelines).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

STAGED = ["allreduce_coalesced, one all-reduce per tensor", "send and recv, through the host's memory"]


class _Several:
    """Works that are waited for together, and what is done then."""

    def __init__(self, works: list[Any], *, arrived: Any = None, kept: Any = None) -> None:
        self._works, self._arrived, self._kept = works, arrived, kept

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait()
        if self._arrived is not None:
            self._arrived()
            self._arrived = None
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def install() -> None:
    """For the rest of this process."""
    # From the class' own table: what getattr gives has lost its binding.
    allreduce, send, recv = (vars(dist.ProcessGroup)[name] for name in ("allreduce", "send", "recv"))

    def allreduce_coalesced(self: dist.ProcessGroup, tensors: list[torch.Tensor], options: Any = None) -> _Several:
        each = dist.AllreduceOptions()
        if options is not None:
            each.reduceOp = options.reduceOp
        bound = allreduce.__get__(self, type(self))
        return _Several([bound([tensor], each) for tensor in tensors])

    def staged_send(self: dist.ProcessGroup, tensors: list[torch.Tensor], *to: Any) -> _Several:
        host = [tensor.detach().cpu() for tensor in tensors]
        return _Several([send.__get__(self, type(self))(host, *to)], kept=host)

    def staged_recv(self: dist.ProcessGroup, tensors: list[torch.Tensor], *source: Any) -> _Several:
        host = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors]

        def arrived() -> None:
            with torch.no_grad():
                for tensor, received in zip(tensors, host):
                    tensor.copy_(received)

        return _Several([recv.__get__(self, type(self))(host, *source)], arrived=arrived)

    for name, function in {"allreduce_coalesced": allreduce_coalesced, "send": staged_send, "recv": staged_recv}.items():
        setattr(dist.ProcessGroup, name, function)
