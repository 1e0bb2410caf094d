"""A CUDA graph's semantics on the CPU: the operations of a piece of code are recorded, and replayed on the same tensors without
running its Python again. What is not an operation on a tensor is lost in the replay, as it is in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """`with graph: ...` records; `graph.replay()` repeats every operation into the tensors that it gave at first."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def names(self) -> list[str]:
        return [str(func) for func, *_ in self.operations]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            result = func(*args, **kwargs)
            inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if not isinstance(old, Tensor):
                    if isinstance(new, torch.ScriptObject):  # the work of a collective
                        torch.distributed.Work.unbox(new).wait()
                elif old.untyped_storage().data_ptr() not in inputs:  # neither a view nor in place
                    old.copy_(new)
