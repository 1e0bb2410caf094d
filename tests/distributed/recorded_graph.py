"""A CUDA graph's semantics on the CPU: the operations of a piece of code are recorded, and replayed on the same tensors without
running its Python again. What is not an operation on a tensor is lost in the replay, as it is in a CUDA graph; a capture does
nothing to the tensors that were there before it; and a host that waits for a value has no place in it."""

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
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a value was asked for on the host"
        for storage in _storages((args, kwargs)):
            if storage.data_ptr() not in self._made:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        self._made |= {storage.data_ptr() for storage in _storages(result)} - self._before.keys()
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, contents in self._before.values():
            storage.copy_(contents)
        self._before.clear()

    def names(self) -> list[str]:
        return [str(func) for func, *_ in self.operations]

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            result = func(*args, **kwargs)
            inputs = {storage.data_ptr() for storage in _storages((args, kwargs))}
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if not isinstance(old, Tensor):
                    if isinstance(new, torch.ScriptObject):  # the work of a collective
                        torch.distributed.Work.unbox(new).wait()
                elif old.untyped_storage().data_ptr() not in inputs:  # neither a view nor in place
                    old.copy_(new)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [storage for storage in storages if storage.nbytes()]
