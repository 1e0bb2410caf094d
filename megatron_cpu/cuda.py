"""The stand-in for `torch.cuda`: names that answer as one GPU per local rank would, and devices that are all the CPU.

Two mechanisms. Functions and classes of `torch.cuda` are replaced by name. Everything that takes a device (factories,
`Tensor.to`, `Tensor.cuda`, `Module.cuda` through them) passes one `TorchFunctionMode`, which reads any CUDA device as the
CPU; so no list of factories is needed. Tensors are honest CPU tensors: `t.device`, `t.is_cuda` say so.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils.data.dataloader import _BaseDataLoaderIter

CPU = torch.device("cpu")


def _on_cpu(device: Any) -> Any:
    """`device` with CUDA read as the CPU: "cuda", "cuda:1", 1 (an index means the accelerator), torch.device("cuda")."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.split(":")[0] == "cuda" else device
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def _tensor_type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Megatron's optimizers and gradient clipping compare with "torch.cuda.FloatTensor" and the like.
    kind = Tensor.type(tensor, *args, **kwargs)
    return kind.replace("torch.", "torch.cuda.", 1) if isinstance(kind, str) else kind


def _tensor_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return Tensor.to(tensor, *map(_on_cpu, args), **kwargs)


def _same_tensor(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.to: _tensor_to,
    Tensor.cuda: _same_tensor,
    Tensor.pin_memory: _same_tensor,  # the data loader pins when torch.cuda.is_available()
    Tensor.type: _tensor_type,
}


class CudaIsCpu(TorchFunctionMode):
    """Reads every CUDA device that reaches a torch function as the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func in REPLACED:
            return REPLACED[func](*args, **kwargs)
        return func(*(_on_cpu(arg) if isinstance(arg, torch.device) else arg for arg in args), **kwargs)


class Stream:
    """`torch.cuda.Stream` on a machine where all work is done in order: every wait is already over."""

    cuda_stream = 0
    device_index = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.priority = kwargs.get("priority", 0)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None: ...


class Event:
    """`torch.cuda.Event`: remembers when it was recorded, so that Megatron's timers print real times."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end._at - self._at) * 1000.0

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _NullContext(contextlib.nullcontext):
    """`torch.cuda.stream(s)`, `torch.cuda.device(d)`: a context manager that takes any argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _device_properties(device: Any = None) -> SimpleNamespace:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Compute capability 9.0: what Megatron's checks of a minimum capability ask for at most.
    return SimpleNamespace(
        name="CPU", major=9, minor=0, total_memory=memory, multi_processor_count=os.cpu_count(), warp_size=32
    )


class _Place:
    """This process among those of the node: the device that is set, and how many there are."""

    device = 0
    count = 1


def take_place() -> None:
    """Read the place from LOCAL_RANK and LOCAL_WORLD_SIZE, which are a fork's own."""
    _Place.device = int(os.environ.get("LOCAL_RANK", "0"))
    _Place.count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Random numbers: "the CUDA generator" is the CPU's default one, because CPU tensors draw from that.
    torch.cuda.default_generators = (torch.default_generator,) * _Place.count  # type: ignore[assignment]


def _set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    _Place.device = index if index is not None else 0


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _names() -> dict[str, Any]:
    """Everything in `torch.cuda` that is replaced. One group per question Megatron asks of it."""
    stream = Stream()
    generator = torch.default_generator

    def get_rng_state(device: Any = None) -> Tensor:
        return generator.get_state()

    def set_rng_state(state: Tensor, device: Any = None) -> None:
        generator.set_state(state)

    return {
        # Is there a GPU, how many, which one is mine? One per local rank, in their order.
        "is_available": lambda: True,
        "device_count": lambda: _Place.count,
        "current_device": lambda: _Place.device,
        "set_device": _set_device,
        "device": _NullContext,
        "get_device_properties": _device_properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "CPU",
        "is_bf16_supported": lambda *args, **kwargs: True,
        # Initialisation, and calls that wait for it. Megatron sets its RNG states through _lazy_call.
        "init": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda callback, **kwargs: callback(),
        # Streams, events, synchronisation: all work is done in order.
        "Stream": Stream,
        "Event": Event,
        "stream": _NullContext,
        "StreamContext": _NullContext,
        "set_stream": _nothing,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "synchronize": _nothing,
        "is_current_stream_capturing": lambda: False,
        # Memory reports: there is no device memory, so all figures are zero.
        "empty_cache": _nothing,
        "reset_peak_memory_stats": _nothing,
        "memory_stats": lambda device=None: defaultdict(int),
        "mem_get_info": lambda device=None: (0, 0),
        **dict.fromkeys(
            (
                "memory_allocated",
                "max_memory_allocated",
                "memory_reserved",
                "max_memory_reserved",
                "device_memory_used",
                "utilization",
                "temperature",
                "power_draw",
                "clock_rate",
            ),
            _zero,
        ),
        # Random numbers.
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [get_rng_state() for _ in range(_Place.count)],
        "set_rng_state_all": lambda states: set_rng_state(states[_Place.device]),
        "manual_seed": lambda seed: generator.manual_seed(seed) and None,
        "manual_seed_all": lambda seed: generator.manual_seed(seed) and None,
        "initial_seed": lambda: generator.initial_seed(),
        # Legacy tensor classes, as constructors and in isinstance().
        **{
            name: getattr(torch, name)
            for name in (
                "FloatTensor",
                "HalfTensor",
                "BFloat16Tensor",
                "DoubleTensor",
                "IntTensor",
                "LongTensor",
                "ByteTensor",
                "BoolTensor",
            )
        },
    }


def install() -> None:
    """Replace `torch.cuda`'s names and enter the device mode for the rest of the process."""
    names = _names()
    for name, value in names.items():
        for module in (torch.cuda, torch.cuda.random, torch.cuda.memory, torch.cuda.streams):
            # The submodules hold the same names, and Megatron uses either path.
            if hasattr(module, name) or module is torch.cuda:
                setattr(module, name, value)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _zero)  # profiler ranges; raise in a PyTorch built without CUDA

    # Not through the function mode: its argument is looked at before.
    Tensor.record_stream = lambda tensor, stream: None  # type: ignore[assignment, method-assign]

    # PyTorch's own code (optimizers, data loader) asks here, and goes on to the driver when told yes. It gets the truth.
    torch.accelerator.is_available = lambda: False

    # Meshes of process groups (Megatron FSDP) name their device by its type, which is no torch function's argument.
    from_group = DeviceMesh.from_group

    def from_group_on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, str(_on_cpu(device_type)), *args, **kwargs)

    DeviceMesh.from_group = staticmethod(from_group_on_cpu)  # type: ignore[method-assign, assignment]

    # A data loader draws a seed from the CPU generator when it starts. With a GPU that leaves dropout's generator alone; a
    # resumed run, which starts its loaders after it has loaded its RNG state, would go another way without this.
    start_loader = _BaseDataLoaderIter.__init__

    def start_loader_and_restore(self: Any, loader: Any) -> None:
        state = torch.default_generator.get_state()
        start_loader(self, loader)
        torch.default_generator.set_state(state)

    _BaseDataLoaderIter.__init__ = start_loader_and_restore  # type: ignore[method-assign]

    mode = CudaIsCpu()
    mode.__enter__()

    # `torch.autograd.backward` is a torch function itself, so the mode would be off in all that runs under it: Megatron's
    # recomputation and its communication in backward. Enter it again where the engine starts.
    run_backward = graph._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward_in_mode  # type: ignore[attr-defined]
