"""Counts what a piece of code makes the device do, without a GPU: kernels launched, host synchronisations, bytes kept.

Every ATen operator that reads or writes elements counts as one kernel; views and allocations count as none. Two operators
hide a second kernel, which is counted with its traffic: a sum into another type casts all elements first, and
`_softmax_backward_data` copies an expanded gradient first. `topk` is more than one kernel on CUDA and counts as one. A kernel
that Triton's interpreter runs counts as one, its scratch as touched once. With a GPU `kernels_on_gpu` counts what really ran.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# Operators that allocate or rename but launch nothing and are not marked as views.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "_wrapped"}
# Operators through which the host waits for the device.
HOST_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"}


@dataclass(frozen=True)
class Op:
    """One launch.

    Attributes:
        name: ATen operator.
        result: dtype and shape of its first result.
        traffic: bytes of its tensor arguments and results; an expanded tensor counts what it holds, not what it shows.
    """

    name: str
    result: str
    traffic: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name} -> {self.result}"


@dataclass
class Launches(TorchDispatchMode):
    """While active, records every launch (forward, and backward on the same thread), in order."""

    ops: list[Op] = field(default_factory=list)
    host_waits: list[str] = field(default_factory=list)
    collectives: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._interpreted = ExitStack()

    def __enter__(self) -> Launches:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import GridExecutor

            original = GridExecutor.__call__

            def run(executor: Any, *args: Any, **kwargs: Any) -> None:
                held = {tensor.data_ptr(): _held_bytes(tensor) for tensor in args if isinstance(tensor, Tensor)}
                self.ops.append(Op(executor.fn.__name__, "-", sum(held.values())))
                with _disable_current_modes():  # what the interpreter itself does
                    original(executor, *args, **kwargs)

            self._interpreted.enter_context(mock.patch.object(GridExecutor, "__call__", run))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._interpreted.close()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.collectives.append(name)
        elif name in HOST_WAITS:
            self.host_waits.append(name)
        elif not func.is_view and name not in NO_KERNEL:
            results = _tensors(result)
            shown = f"{str(results[0].dtype).removeprefix('torch.')}{list(results[0].shape)}" if results else "-"
            # `zeros_like` does not read what it is like. In-place results are arguments, too: each tensor counts once.
            read = [] if name.endswith("_like") else _tensors((args, kwargs))
            traffic = sum({tensor.data_ptr(): _held_bytes(tensor) for tensor in (*read, *results)}.values())
            source = _copied_first(name, read, results)
            if source is not None:  # the operator's own kernel reads the copy, not the source
                held = _held_bytes(source[0])
                copied = source[0].numel() * source[1].itemsize
                shape = f"{str(source[1]).removeprefix('torch.')}{list(source[0].shape)}"
                self.ops.append(Op(f"copy in {name}", shape, held + copied))
                traffic += copied - held
            self.ops.append(Op(name, shown, traffic))
        return result


def _copied_first(name: str, read: list[Tensor], results: list[Tensor]) -> tuple[Tensor, torch.dtype] | None:
    """The argument that an operator copies before its own kernel, and the type of the copy.

    A sum casts on the fly only from half precision to float32 (ATen's `make_reduction_from_out_ty`).
    """
    if name == "sum" and read[0].dtype != results[0].dtype:
        half = read[0].is_floating_point() and read[0].dtype.itemsize == 2
        return None if half and results[0].dtype is torch.float32 else (read[0], results[0].dtype)
    if name == "_softmax_backward_data" and not read[0].is_contiguous():
        return read[0], read[0].dtype
    return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _held_bytes(tensor: Tensor) -> int:
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


class KeptBytes(TorchDispatchMode):
    """While active, remembers every allocation; `alive` tells afterwards how much of it somebody still holds.

    So it counts tensors saved for the backward and tensors kept as attributes alike, each storage once.
    """

    def __init__(self) -> None:
        super().__init__()
        # References, not addresses: an address is used again once its storage is gone.
        self._older: dict[int, StorageWeakRef] = {}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in without having been seen as a result is older than this: weights, buffers, inputs.
        for tensor in _tensors((args, kwargs)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self._seen:
                self._older[reference.cdata] = reference
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._older:
                self._seen[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self, *, without: list[Tensor]) -> int:
        """Bytes that are still held, apart from the storages of the given tensors."""
        gc.collect()  # what only reference cycles hold (Triton's interpreter makes some) is held by nobody
        excluded = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in without}
        return sum(size for key, (ref, size) in self._seen.items() if key not in excluded and not ref.expired())


@dataclass(frozen=True)
class GpuWork:
    """Kernels (with copies and memsets) that ran on the GPU, and the sum of their times in microseconds."""

    kernels: float
    microseconds: float


def kernels_on_gpu(work: Callable[[], Any], repeats: int) -> GpuWork:
    """Profile `repeats` calls of `work`; the figures are per call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    # Annotations ("nccl:all_reduce") span the kernels that they name.
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return GpuWork(len(events) / repeats, sum(event.time_range.elapsed_us() for event in events) / repeats)
