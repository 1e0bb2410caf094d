"""Host time of a load-balancing loss per layer and micro-batch, and of one launch of each of the plugin's kernels.

    python benchmarks/host_cost.py                 # one GPU
    python benchmarks/host_cost.py --cpu           # no GPU: Triton launches into a stub of libcuda (triton_without_gpu.py)
    python benchmarks/host_cost.py --cpu --ranks 2 --recompute --layers 48 --micro-batches 1
    python benchmarks/host_cost.py --cpu --profile global

With so few tokens the device never keeps the host waiting. Measured are forward and backward of a model chunk of routers over
several micro-batches, in the second and later steps of a registration: its first makes what lives as long as it. Losses take
turns. Figures are the tenth percentile of all steps, which other load on the machine changes least; `aux_loss again` is the
same loss measured twice. Without a GPU it is the thread's CPU time, with torch as it is outside of CPU mode, which intercepts
every call of torch; what the driver takes per launch (2 to 4 us, also for each of PyTorch's kernels) is missing, so the losses
that launch more look cheaper than they are: launches are given, too.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plugin, when it is not installed

import torch
import torch.distributed as dist
from models import ModelSize
from report import machine, table

STEPS_PER_VISIT = 3
PARTS = ("forward", "backward", "step's end")
DEFAULT = ["none", "aux_loss", "global_aux_loss", "dp", "global", "global brief", "dp plain", "global plain", "aux_loss again"]
AGAIN = " again"


@contextmanager
def real_torch(cpu: bool) -> Iterator[None]:
    """Within CPU mode: torch as it is on a GPU, where no Python intercepts its calls."""
    if not cpu:
        yield
        return
    from torch.autograd import graph

    mode = torch._C._pop_torch_function_stack()
    in_mode = graph._engine_run_backward
    plain = next(cell.cell_contents for cell in in_mode.__closure__ if cell.cell_contents is not mode)
    device, generators = torch.cuda.current_device, torch.cuda.default_generators
    graph._engine_run_backward = torch.autograd._engine_run_backward = plain
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.default_generators = {torch.device("cpu"): generators[0]}
    try:
        yield
    finally:
        torch.cuda.current_device, torch.cuda.default_generators = device, generators
        graph._engine_run_backward = torch.autograd._engine_run_backward = in_mode
        torch._C._push_on_torch_function_stack(mode)


def tenth(numbers: list[float]) -> float:
    """The tenth percentile."""
    return sorted(numbers)[len(numbers) // 10]


class Routers:
    """A model chunk for each loss, and its steps."""

    def __init__(self, args: argparse.Namespace, clock: Callable[[], float], by_triton: Callable[[], int] | None) -> None:
        """
        Args:
            args: of the command line.
            clock: in seconds.
            by_triton: tells how many kernels Triton has launched so far; None if nothing does.
        """
        from routers import VARIANTS, build, micro_batch

        size = ModelSize(args.experts, args.topk, 64, args.layers, "")
        self.args, self.clock, self.by_triton = args, clock, by_triton
        self.variants = {name: VARIANTS[name.removesuffix(AGAIN)] for name in args.losses}
        self.stacks = {name: build(size, variant, "fp32", layers=args.layers) for name, variant in self.variants.items()}
        for stack in self.stacks.values():
            stack.recompute = args.recompute
        self.hidden, gradient = micro_batch(size, args.tokens)
        self.gradients = [gradient.to(self.stacks[args.losses[0]](self.hidden)[0].dtype)] * args.layers

    def step(self, name: str) -> tuple[float, ...]:
        """Microseconds per layer and micro-batch of each of `PARTS`."""
        from routers import end_of_step

        stack, clock, in_forward, in_backward = self.stacks[name], self.clock, 0.0, 0.0
        for _ in range(self.args.micro_batches):
            begin = clock()
            outputs = stack(self.hidden)
            between = clock()
            torch.autograd.backward(outputs, self.gradients)
            in_forward, in_backward = in_forward + between - begin, in_backward + clock() - between
        begin = clock()
        end_of_step(stack)
        at_end = clock() - begin
        if not self.args.cpu:
            torch.cuda.synchronize()
        per = 1e6 / (self.args.layers * self.args.micro_batches)
        return in_forward * per, in_backward * per, at_end * per

    def visit(self, name: str, steps: int) -> list[tuple[float, ...]]:
        """The second and later steps of a registration."""
        with self.variants[name].active(self.stacks[name]):
            self.step(name)
            gc.collect()
            gc.disable()
            with real_torch(self.args.cpu):
                self.step(name)  # what follows a registration's first step
                found = [self.step(name) for _ in range(steps)]
            gc.enable()
        return found

    def launches(self, name: str) -> float:
        """Per layer and micro-batch, the step's end included."""
        from launches import Launches

        assert self.by_triton is not None
        with self.variants[name].active(self.stacks[name]), redirect_stdout(None):
            self.step(name)
            before, counted = self.by_triton(), Launches()
            with counted:
                self.step(name)
        return (len(counted.ops) + self.by_triton() - before) / (self.args.layers * self.args.micro_batches)

    def report(self) -> str:
        """Markdown: what every loss takes."""
        figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.variants}
        for round_number in range(self.args.rounds + 1):
            for name in self.variants:
                with redirect_stdout(None):  # what a registration says each time
                    found = self.visit(name, STEPS_PER_VISIT)
                if round_number:
                    figures[name] += found
        base = self.args.losses[0]
        none = figures[base]
        rows = []
        for name, steps in figures.items():
            wholes, bases = [sum(step) for step in steps], [sum(step) for step in none]
            parts = [tenth([step[i] for step in steps]) - tenth([step[i] for step in none]) for i in range(len(PARTS))]
            rows.append(
                [
                    name,
                    f"{tenth(wholes):.1f}",
                    *(f"{part:+.1f}" for part in parts),
                    f"{tenth(wholes) - tenth(bases):+.1f}",
                    f"{statistics.median(wholes) - statistics.median(bases):+.1f}",
                    "-" if self.by_triton is None else f"{self.launches(name) - self.launches(base):+.1f}",
                ]
            )
        return table(["loss", "everything, us", *PARTS, f"beyond {base}, us", "of the medians", "launches"], rows)

    def profile(self, name: str) -> None:
        """Print where the time of a loss goes, in microseconds per layer and micro-batch."""
        steps = 100
        profiler = cProfile.Profile(self.clock)
        with self.variants[name].active(self.stacks[name]), real_torch(self.args.cpu):
            self.step(name)
            self.step(name)
            profiler.enable()
            for _ in range(steps):
                self.step(name)
            profiler.disable()
        calls = steps * self.args.layers * self.args.micro_batches
        rows = []
        for (file, line, function), (_, number, own, cumulative, _) in pstats.Stats(profiler).stats.items():
            place = f"{'/'.join(Path(file).parts[-3:])}:{line} {function}"
            rows.append((place, number / calls, own / calls * 1e6, cumulative / calls * 1e6))
        rows.sort(key=lambda row: -row[2])
        print(
            table(
                ["where", "calls", "own, us", "with what it calls, us"], [[p, *map("{:.2f}".format, x)] for p, *x in rows[:120]]
            )
        )


def launches_of(cpu: bool, clock: Callable[[], float]) -> str:
    """Markdown: one launch of each kernel, as Triton dispatches it and as the plugin launches it."""
    from megatron_global_lbl.core.fused import forward

    tokens, experts, layers, device = 16, 64, 48, "cpu" if cpu else "cuda"
    logits = torch.randn(tokens, experts, device=device)
    selection = torch.zeros(tokens, experts, dtype=torch.bool, device=device)
    ticket = torch.zeros((), dtype=torch.int32, device=device)
    counts_RE = torch.zeros(layers, experts, dtype=torch.int32, device=device)
    sums_E, other_E = torch.zeros(experts, device=device), torch.zeros(experts, device=device)
    arguments = {"score_function": "softmax"}
    kernels: dict[str, Callable[[], Any]] = {
        "count": lambda: forward.count_into(counts_RE[0], sums_E, logits, selection, None, ticket=ticket, **arguments),
        "rows, of all layers": lambda: forward.gradient_rows(counts_RE, counts_RE, 8.0),
        "logits": lambda: forward.add_to_gradient(logits, None, sums_E, 1.0, logits, **arguments),
    }
    others = {"torch.empty": lambda: torch.empty(experts, device=device), "Tensor.add_": lambda: sums_E.add_(other_E)}

    def timed(call: Callable[[], Any]) -> str:
        blocks = []
        for _ in range(30):
            begin = clock()
            for _ in range(100):
                call()
            blocks.append((clock() - begin) * 1e4)
            if not cpu:
                torch.cuda.synchronize()
        return f"{tenth(blocks[5:]):.1f}"

    rows, launch = [], forward._launch
    with real_torch(cpu):
        for name, call in kernels.items():
            ours = timed(call)
            forward._launch = lambda kernel, programs, arguments, constants, *_: kernel[(programs,)](*arguments, *constants)
            rows.append([name, ours, timed(call)])
            forward._launch = launch
        rows += [[name, timed(call), ""] for name, call in others.items()]
    return table(["call, its allocations included", "us", "by Triton's own dispatch, us"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="no GPU")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks, of a fake process group")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="per micro-batch")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--recompute", action="store_true", help="every router is recomputed in the backward")
    parser.add_argument("--losses", nargs="+", default=DEFAULT, metavar="LOSS")
    parser.add_argument("--profile", metavar="LOSS", help="only where the time of this loss goes, by function")
    args = parser.parse_args()
    if args.profile:
        args.losses = [args.profile]
    clock, by_triton = time.thread_time if args.cpu else time.perf_counter, None
    if args.cpu:
        import triton_without_gpu

        import megatron_cpu

        megatron_cpu.install()
        torch.set_num_threads(1)
        by_triton = triton_without_gpu.install()
    else:
        torch.cuda.set_device(0)
    from routers import start_megatron
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # No rank ever answers, and none has to: what is measured is this process.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.ranks)
    start_megatron(gloo=False)
    routers = Routers(args, clock, by_triton)
    if args.profile:
        routers.profile(args.profile)
        return
    print(machine(gpu=not args.cpu))
    print(f"{args.layers} layers, {args.micro_batches} micro-batches of {args.tokens} tokens, {args.experts} experts, "
          f"{args.ranks} ranks, recompute {args.recompute}; per layer and micro-batch.\n")  # fmt: skip
    print(routers.report() + "\n", flush=True)
    print(launches_of(args.cpu, clock), flush=True)


if __name__ == "__main__":
    main()
