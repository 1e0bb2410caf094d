"""One reduction per layer, or one for all layers of a micro-batch: what either adds, with compute to hide behind.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/packing.py --cpu
    torchrun --nproc-per-node 8 benchmarks/packing.py                               # GPUs, NCCL

No Megatron: a micro-batch is L pieces of compute forwards, then L twice as long backwards. "per layer" starts an all-reduce of
E counts in the middle of each forward piece and waits for it in the backward of the same layer; "packed" starts one of L x E
counts behind the last forward piece, the earliest that it can, and waits for it before the first backward piece, the latest
that it may. The three variants run in turns; reported are medians over rounds. How latency is injected: latency.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plugin, when it is not installed

from latency import Latency
from report import machine, table
from routers import start, stop

VARIANTS = ("none", "per layer", "packed")


class Compute:
    """Work of a known length on the device."""

    def __init__(self, seconds: float) -> None:
        self._matrix = torch.randn(256, 256, device="cuda")
        self._repeats = 50
        for _ in range(2):  # the first time warms up
            torch.cuda.synchronize()
            begin = time.perf_counter()
            self(1.0)
            torch.cuda.synchronize()
            took = time.perf_counter() - begin
        self._repeats = max(2, round(self._repeats * seconds / took))

    def __call__(self, share: float) -> None:
        for _ in range(round(self._repeats * share)):
            torch.mm(self._matrix, self._matrix)


def micro_batch(variant: str, layers: int, experts: int, compute: Compute) -> None:
    """Forward and backward."""
    counts = torch.ones(layers, experts, dtype=torch.int32, device="cuda")
    under_way = []
    for layer in range(layers):
        compute(0.5)
        if variant == "per layer":
            under_way.append(dist.all_reduce(counts[layer], async_op=True))
        compute(0.5)
    if variant == "packed":
        under_way.append(dist.all_reduce(counts, async_op=True))
    for _ in range(layers):
        if under_way:
            under_way.pop().wait()
        compute(2.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo and the CPU instead of NCCL and GPUs")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layer", type=float, default=10.0, help="a layer's forward, ms")
    parser.add_argument("--latency", nargs="+", type=float, default=[0.0, 1.0, 5.0], help="injected per all-reduce, ms")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def main() -> None:
    """Measure, and print the report on rank 0."""
    args = parse_arguments()
    if args.cpu:
        import megatron_cpu

        megatron_cpu.install()
    start(gpu=not args.cpu)
    compute, latency, rows = Compute(args.layer / 1000), Latency(), []
    with latency.installed():
        for milliseconds in args.latency:
            latency.seconds = milliseconds / 1000
            seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            exposed: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for _ in range(args.rounds + 1):
                for variant in VARIANTS:
                    torch.cuda.synchronize()
                    dist.barrier()
                    latency.reduced.clear()
                    begin = time.perf_counter()
                    micro_batch(variant, args.layers, args.experts, compute)
                    torch.cuda.synchronize()
                    dist.barrier()
                    seconds[variant].append(time.perf_counter() - begin)
                    exposed[variant].append(sum(entry.exposed for entry in latency.reduced))
            median = {name: statistics.median(times[1:]) * 1000 for name, times in seconds.items()}
            for name in VARIANTS:
                cells = [f"{median[name]:.1f}", f"{median[name] - median['none']:+.1f}"]
                rows.append([f"{milliseconds:g}", name, *cells, f"{statistics.median(exposed[name][1:]) * 1000:.1f}"])
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    stop()
    if first:
        print(machine(gpu=not args.cpu))
        print(f"{ranks} ranks, {args.layers} layers of {args.layer:g} ms, {args.experts} experts, {args.rounds} rounds.\n")
        print(table(["latency, ms", "reductions", "micro-batch, ms", "more than none", "latency exposed, ms"], rows))


if __name__ == "__main__":
    main()
