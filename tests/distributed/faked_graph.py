"""`torch.cuda.CUDAGraph` without a GPU: recorded operations, and Python that believes that a stream is being captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recorded_graph import RecordedGraph


class FakedGraph:
    """`with graph: ...` captures, `graph.replay()` replays."""

    capturing = False

    def __init__(self) -> None:
        from megatron_global_lbl.core import chunk, collective, forward, step
        from megatron_global_lbl.metrics import metrics

        self._graph = RecordedGraph()
        self._modules = (chunk, collective, forward, step, metrics)
        self._original = collective.is_capturing

    def _flag(self, function) -> None:
        for module in self._modules:
            module.is_capturing = function

    def __enter__(self) -> None:
        FakedGraph.capturing = True
        self._flag(lambda tensor: True)
        self._graph.__enter__()

    def __exit__(self, *exception) -> None:
        self._graph.__exit__(*exception)
        self._flag(self._original)
        FakedGraph.capturing = False

    def replay(self) -> None:
        self._graph.replay()

    def collectives(self) -> int:
        return sum("allreduce" in name for name in self._graph.names())

    def register_generator_state(self, state: Any) -> None:
        """Megatron's whole-step graphs do it; nothing here draws random numbers."""


@contextmanager
def faked_cuda_graphs() -> Iterator[None]:
    """What Megatron's `FullCudaGraphWrapper` calls gives faked graphs."""
    names: dict[str, Any] = {
        "CUDAGraph": FakedGraph,
        "graph": lambda graph, **options: graph,
        "graph_pool_handle": lambda: None,
    }
    originals = {name: getattr(torch.cuda, name) for name in names}
    try:
        for name, value in names.items():
            setattr(torch.cuda, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(torch.cuda, name, value)
