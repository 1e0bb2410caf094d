"""What a load-balancing loss costs in one MoE layer's router, per micro-batch.

    python benchmarks/router_cost.py                                    # one GPU
    torchrun --nproc-per-node 8 benchmarks/router_cost.py               # with the collectives of 8 data-parallel ranks
    python benchmarks/router_cost.py --cpu                              # no GPU: launches, bytes, host times
    python benchmarks/router_cost.py --cpu --list-ops --models qwen3-30b-a3b
    python benchmarks/router_cost.py --cpu --steps                      # launches of whole steps

Megatron's real `TopKRouter` of a bf16 model runs forward and backward, without any loss ("none"), with Megatron's own and
with this plugin's; what "none" needs is subtracted everywhere. Measured are

    launches   kernels forward, backward and at the end of a step (a layer's share of 8 layers). Without a GPU: ATen
               operators (see launches.py)
    traffic    bytes that those operators read and write: what a GPU's time follows once the tensors are large
    host waits operators for which the host waits for the device
    kept       bytes held from the forward to the backward, saved tensors and attributes alike
    host time  of Python and launches, with so few tokens that nothing else counts; medians, variants interleaved
    GPU time   between CUDA events, and the sum over kernels from torch.profiler; medians, variants interleaved
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plugin, when it is not installed

from launches import GpuWork, KeptBytes, Launches, Op, kernels_on_gpu
from models import MODELS
from report import machine, table
from routers import BASELINE, DEFAULT_VARIANTS, VARIANTS, build, end_of_step, micro_batch, start, stop

WARM_UP_STEPS = 2
LAYERS = 8  # the plugin ends a step for all layers at once
STEP_LAYERS, STEP_MICRO_BATCHES = (8, 48), (1, 2, 8)
HOST_TOKENS = 8
COUNTED_TOKENS = (96, 192)  # launches do not depend on the tokens; kept bytes are a line through these two


@dataclass(frozen=True)
class Counts:
    """What one variant does per layer; launches of a forward, of its backward, and of the end of a step of `LAYERS` layers."""

    forward: list[Op]
    backward: list[Op]
    step_end: list[Op]
    host_waits: list[str]
    collectives: list[str]
    kept: int

    @property
    def traffic(self) -> int:
        """Bytes read and written by a forward and its backward."""
        return sum(op.traffic for op in (*self.forward, *self.backward))


def count(model: str, variant: str, *, tokens: int, router_dtype: str | None) -> Counts:
    """Counts of one layer and micro-batch, everything included; subtract those of the variant "none"."""
    size = MODELS[model]
    routers = [build(size, VARIANTS[variant], router_dtype) for _ in range(LAYERS)]
    router = routers[0]
    hidden, gradient = micro_batch(size, tokens)

    def one_micro_batch():
        for layer in routers:
            probs, _ = layer(hidden)
            probs.backward(gradient.to(probs.dtype))
        return gradient.to(probs.dtype)

    with VARIANTS[variant].active():
        for _ in range(WARM_UP_STEPS):
            one_micro_batch()
            end_of_step(*routers)
        # Counted is a step's second micro-batch: the first one may find things that have to be set up.
        probs_gradient = one_micro_batch()
        in_forward, in_backward, at_end, kept = Launches(), Launches(), Launches(), KeptBytes()
        with in_forward:
            probs, routing_map = router(hidden)
        with in_backward:
            probs.backward(probs_gradient)
        del probs, routing_map
        with kept:
            probs, routing_map = router(hidden)
            kept_in_forward = kept.alive(without=[probs, routing_map])
        probs.backward(probs_gradient)
        with at_end:
            end_of_step(*routers)
    everywhere = (in_forward, in_backward, at_end)
    return Counts(
        in_forward.ops,
        in_backward.ops,
        at_end.ops,
        [name for part in everywhere for name in part.host_waits],
        [name for part in (in_forward, in_backward) for name in part.collectives],
        kept_in_forward,
    )


def launches_of_step(
    model: str, variant: str, *, tokens: int, router_dtype: str | None, layers: int, micro_batches: int
) -> int:
    """Launches of a whole step, its first micro-batch and its end included, everything included."""
    size = MODELS[model]
    routers = [build(size, VARIANTS[variant], router_dtype) for _ in range(layers)]
    for number, router in enumerate(routers, 1):
        router.set_layer_number(number)
    hidden, gradient = micro_batch(size, tokens)

    def step() -> None:
        for _ in range(micro_batches):
            for router in routers:
                probs, _ = router(hidden)
                probs.backward(gradient.to(probs.dtype))
        end_of_step(*routers)

    with VARIANTS[variant].active():
        for _ in range(WARM_UP_STEPS):
            step()
        launches = Launches()
        with launches:
            step()
    return len(launches.ops)


def beyond(ops: list[Op], baseline: list[Op]) -> list[Op]:
    """The operators that are not in the baseline, in their order."""
    common = Counter(baseline)
    left = []
    for op in ops:
        if common[op]:
            common[op] -= 1
        else:
            left.append(op)
    return left


def counts_at(model: str, variant: str, router_dtype: str | None) -> list[Counts]:
    """The counts with each of `COUNTED_TOKENS`."""
    return [count(model, variant, tokens=tokens, router_dtype=router_dtype) for tokens in COUNTED_TOKENS]


def kept_bytes(with_loss: list[Counts], without: list[Counts]) -> tuple[float, int]:
    """(bytes per token, bytes per micro-batch) that the loss keeps for the backward, beyond the router without a loss.

    Args:
        with_loss: its `counts_at`.
        without: those of the variant "none".
    """
    kept = [ours.kept - none.kept for ours, none in zip(with_loss, without)]
    slope = (kept[1] - kept[0]) / (COUNTED_TOKENS[1] - COUNTED_TOKENS[0])
    return slope, round(kept[0] - slope * COUNTED_TOKENS[0])


def host_times(model: str, variants: Sequence[str], *, router_dtype: str | None, rounds: int) -> dict[str, float]:
    """Microseconds of the host per layer and micro-batch, forward and backward, everything included; medians over `rounds`."""
    size = MODELS[model]
    hidden, gradient = micro_batch(size, HOST_TOKENS)
    routers = {name: build(size, VARIANTS[name], router_dtype) for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + WARM_UP_STEPS):
        for name in variants:
            with VARIANTS[name].active():
                for timed in (False, True):
                    begin = time.perf_counter()
                    for _ in range(LAYERS):
                        probs, _ = routers[name](hidden)
                        probs.backward(gradient.to(probs.dtype))
                    took = (time.perf_counter() - begin) / LAYERS
                    end_of_step(routers[name])
                    if timed and round_number >= WARM_UP_STEPS:
                        seconds[name].append(took)
    return {name: statistics.median(times) * 1e6 for name, times in seconds.items()}


@dataclass(frozen=True)
class Times:
    """GPU times of one layer and micro-batch in microseconds, everything included."""

    forward: float
    backward: float
    kernels_forward: float
    kernels_backward: float
    kernel_time: float


def time_on_gpu(model: str, variants: Sequence[str], *, tokens: int, router_dtype: str | None, rounds: int) -> dict[str, Times]:
    """Medians over `rounds`; every round runs each variant once, so that a drift of the clock meets all alike."""
    size = MODELS[model]
    hidden, gradient = micro_batch(size, tokens)
    routers = {name: build(size, VARIANTS[name], router_dtype) for name in variants}
    forward: dict[str, list[float]] = {name: [] for name in variants}
    backward: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + WARM_UP_STEPS):
        for name in variants:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            with VARIANTS[name].active():
                events[0].record()
                probs, _ = routers[name](hidden)
                events[1].record()
                probs.backward(gradient.to(probs.dtype))
                events[2].record()
                torch.cuda.synchronize()
                end_of_step(routers[name])
            if round_number >= WARM_UP_STEPS:
                forward[name].append(events[0].elapsed_time(events[1]) * 1000)
                backward[name].append(events[1].elapsed_time(events[2]) * 1000)
    times = {}
    for name in variants:
        in_forward, in_backward = _profile(routers[name], name, hidden, gradient)
        times[name] = Times(
            statistics.median(forward[name]),
            statistics.median(backward[name]),
            in_forward.kernels,
            in_backward.kernels,
            in_forward.microseconds + in_backward.microseconds,
        )
    return times


def _profile(router: torch.nn.Module, variant: str, hidden: Tensor, gradient: Tensor) -> tuple[GpuWork, GpuWork]:
    """What the GPU did in a forward and in its backward; a step of three micro-batches, all forwards first."""
    outputs: list[Tensor] = []
    with VARIANTS[variant].active():
        # The tensors of a registration are made in its first forward; what a step has left under way is joined in the next one.
        for ends in (True, False):
            probs, _ = router(hidden)
            probs.backward(gradient.to(probs.dtype))
            if ends:
                end_of_step(router)
        in_forward = kernels_on_gpu(lambda: outputs.append(router(hidden)[0]), repeats=3)
        gradient = gradient.to(outputs[0].dtype)
        in_backward = kernels_on_gpu(lambda: outputs.pop().backward(gradient), repeats=3)
        end_of_step(router)
    return in_forward, in_backward


def report_counts(model: str, variants: Sequence[str], router_dtype: str | None, rounds: int, list_ops: bool) -> str:
    """Markdown: launches, traffic, host waits, kept bytes and host time of one model."""
    tokens = COUNTED_TOKENS[-1]
    without = counts_at(model, BASELINE, router_dtype)
    baseline = without[-1]
    host = host_times(model, [BASELINE, *variants], router_dtype=router_dtype, rounds=rounds)
    rows, details = [], []
    for name in variants:
        if name == BASELINE:
            continue
        with_loss = counts_at(model, name, router_dtype)
        counts = with_loss[-1]
        forward, backward = beyond(counts.forward, baseline.forward), beyond(counts.backward, baseline.backward)
        per_token, per_micro_batch = kept_bytes(with_loss, without)
        rows.append(
            [
                name,
                len(forward),
                len(backward),
                len(forward) + len(backward),
                f"{len(counts.step_end) / LAYERS:g}",
                len(counts.collectives),
                len(counts.host_waits),
                f"{(counts.traffic - baseline.traffic) / tokens:.0f}",
                f"{per_token:g} T + {per_micro_batch}",
                f"{per_token + per_micro_batch / 4096:.3f}",
                f"{host[name] - host[BASELINE]:.0f}",
            ]
        )
        if list_ops:
            parts = {"forward": forward, "backward": backward, f"end of step of {LAYERS} layers": counts.step_end}
            details += [f"{name}, {part}: " + "; ".join(map(str, ops)) for part, ops in parts.items()]
    head = ["loss", "forward", "backward", "sum", "step end", "collectives", "host waits"]
    head += ["traffic, B/token", "kept, B", "B/token at T = 4096", "host, us"]
    return "\n".join([table(head, rows), *(f"\n- {line}" for line in details)])


def report_steps(model: str, variants: Sequence[str], router_dtype: str | None) -> str:
    """Markdown: launches of whole steps, a router without a loss subtracted; no GPU needed."""
    rows = []
    for layers in STEP_LAYERS:
        for micro_batches in STEP_MICRO_BATCHES:
            sizes = {"tokens": HOST_TOKENS, "router_dtype": router_dtype, "layers": layers, "micro_batches": micro_batches}
            baseline = launches_of_step(model, BASELINE, **sizes)
            names = [name for name in variants if name != BASELINE]
            rows.append([layers, micro_batches, *(launches_of_step(model, name, **sizes) - baseline for name in names)])
    return table(["layers", "micro-batches", *(name for name in variants if name != BASELINE)], rows)


def report_times(
    model: str, variants: Sequence[str], token_counts: Sequence[int], router_dtype: str | None, rounds: int
) -> str:
    """Markdown: GPU times of one model, the router without a loss subtracted."""
    rows = []
    for tokens in token_counts:
        times = time_on_gpu(model, variants, tokens=tokens, router_dtype=router_dtype, rounds=rounds)
        none = times[BASELINE]
        rows.append([tokens, BASELINE, *(f"{value:.1f}" for value in vars(none).values())])
        for name in variants:
            if name != BASELINE:
                differences = (vars(times[name])[field] - vars(none)[field] for field in vars(none))
                rows.append([tokens, name, *(f"{value:+.1f}" for value in differences)])
    head = ["tokens", "loss", "forward, us", "backward, us", "kernels forward", "kernels backward", "kernel time, us"]
    return table(head, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU: counts and host times")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--losses", nargs="+", choices=VARIANTS, metavar="LOSS", default=DEFAULT_VARIANTS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 65536], help="per micro-batch, for GPU times")
    parser.add_argument("--router-dtype", choices=["fp32", "model"], default="fp32", help="Megatron's --moe-router-dtype")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds per loss")
    parser.add_argument("--steps", action="store_true", help="with --cpu: only the launches of whole steps, of the first model")
    parser.add_argument("--list-ops", action="store_true", help="name every launch")
    parser.add_argument("--out", type=Path, help="write the report to this file as well")
    args = parser.parse_args()
    if BASELINE not in args.losses:
        args.losses.insert(0, BASELINE)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device; allowed without one: --cpu, which counts launches and bytes and measures the host only")
    return args


def main() -> None:
    """Measure and print the report on rank 0."""
    args = parse_arguments()
    if args.cpu:
        import megatron_cpu

        megatron_cpu.install()
    start(gpu=not args.cpu)
    router_dtype = "fp32" if args.router_dtype == "fp32" else None
    parts = [machine(gpu=not args.cpu), f"Data-parallel ranks: {dist.get_world_size()}. Router dtype: {args.router_dtype}."]
    if args.steps:
        parts.append(f"Model: {args.models[0]}.\n\n" + report_steps(args.models[0], args.losses, router_dtype))
    for model in [] if args.steps else args.models:
        size = MODELS[model]
        parts.append(f"\n### {model}: {size.experts} experts, top-{size.topk}, hidden {size.hidden}\n")
        parts.append(report_counts(model, args.losses, router_dtype, args.rounds, args.list_ops))
        if args.cpu:
            parts.append("\nGPU times: not measured, no CUDA device.")
        else:
            parts.append("\n" + report_times(model, args.losses, args.tokens, router_dtype, args.rounds))
    first = dist.get_rank() == 0
    stop()
    text = "\n".join(parts)
    if first:
        print(text)
        if args.out:
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
