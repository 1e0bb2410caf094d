"""What a load-balancing loss costs in the routers of a model chunk, per layer and micro-batch.

    python benchmarks/router_cost.py                                    # one GPU
    torchrun --nproc-per-node 8 benchmarks/router_cost.py               # with the collectives of 8 data-parallel ranks
    python benchmarks/router_cost.py --cpu                              # no GPU: launches and bytes
    python benchmarks/router_cost.py --cpu --list-ops --models qwen3-30b-a3b
    python benchmarks/router_cost.py --cpu --steps                      # launches of whole steps

Megatron's real `TopKRouter`s of a bf16 model, 8 layers as one model chunk, run forward and backward, without any loss ("none"),
with Megatron's own and with this plugin's; what "none" needs is subtracted everywhere. Measured are

    launches   kernels forward, backward and at the end of a step. Without a GPU: ATen operators (see launches.py)
    traffic    bytes that those operators read and write: what a GPU's time follows once the tensors are large
    host waits operators for which the host waits for the device
    kept       bytes held from the forward to the backward, saved tensors and attributes alike
    GPU time   between CUDA events, the sum over kernels from torch.profiler, and that of a replayed CUDA graph; medians,
               variants interleaved

A registration's first step makes what lives as long as it, and is in no figure. Host time: host_cost.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plugin, when it is not installed

from launches import GpuWork, KeptBytes, Launches, Op, kernels_on_gpu
from models import MODELS
from report import machine, table
from routers import BASELINE, DEFAULT_VARIANTS, VARIANTS, Stack, backward, build, end_of_step, micro_batch, start, stop

WARM_UP_STEPS = 2
TIMED_PER_VISIT = 2
LAYERS = 8
STEP_LAYERS, STEP_MICRO_BATCHES = (8, 48), (1, 2, 8)
STEP_TOKENS = 8
COUNTED_TOKENS = (96, 192)  # launches do not depend on the tokens; kept bytes are a line through these two
REPLAYS = 10
TOKENS = (4096, 16384, 65536)
SECONDS_OF_A_ROW = 20  # of a stage; none is begun with less left


@dataclass(frozen=True)
class Counts:
    """What one variant does in a micro-batch of `LAYERS` layers, and at the end of a step."""

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
    """Counts of one micro-batch, everything included; subtract those of the variant "none"."""
    size = MODELS[model]
    stack = build(size, VARIANTS[variant], router_dtype, layers=LAYERS)
    hidden, gradient = micro_batch(size, tokens)
    with VARIANTS[variant].active(stack):
        for _ in range(WARM_UP_STEPS):
            backward(stack(hidden), gradient)
            end_of_step(stack)
        # Counted is a step's second micro-batch: the first one may find things that have to be set up.
        backward(stack(hidden), gradient)
        in_forward, in_backward, at_end, kept = Launches(), Launches(), Launches(), KeptBytes()
        with in_forward:
            outputs = stack(hidden)
        with in_backward:
            backward(outputs, gradient)
        del outputs
        with kept:
            outputs = stack(hidden)
            kept_in_forward = kept.alive(without=outputs)
        backward(outputs, gradient)
        with at_end:
            end_of_step(stack)
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
    stack = build(size, VARIANTS[variant], router_dtype, layers=layers)
    hidden, gradient = micro_batch(size, tokens)

    def step() -> None:
        for _ in range(micro_batches):
            backward(stack(hidden), gradient)
        end_of_step(stack)

    with VARIANTS[variant].active(stack):
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
    """(bytes per token, bytes per micro-batch) that the loss keeps for the backward, beyond routers without a loss.

    Args:
        with_loss: its `counts_at`.
        without: those of the variant "none".
    """
    kept = [ours.kept - none.kept for ours, none in zip(with_loss, without)]
    slope = (kept[1] - kept[0]) / (COUNTED_TOKENS[1] - COUNTED_TOKENS[0])
    return slope, round(kept[0] - slope * COUNTED_TOKENS[0])


@dataclass(frozen=True)
class Times:
    """GPU times in microseconds and kernels, per layer and micro-batch, everything included.

    Attributes:
        forward, backward: between events.
        kernel_time: sum over the kernels.
        replay: of a CUDA graph of both; None if it was not captured.
    """

    forward: float
    backward: float
    kernels_forward: float
    kernels_backward: float
    kernel_time: float
    replay: float | None


def time_on_gpu(
    model: str,
    variants: Sequence[str],
    *,
    tokens: int,
    router_dtype: str | None,
    rounds: int,
    captured: dict[str, str] | None = None,
    profile: Callable[[Callable[[], Any], int], GpuWork] = kernels_on_gpu,
) -> dict[str, Times]:
    """Medians over `rounds`; every round runs each variant, so that a drift of the clock meets all alike.

    Args:
        model, variants, tokens, router_dtype, rounds: what to measure.
        captured: replays are measured, too; filled with how each loss was computed, or why it was not captured.
        profile: counts kernels.
    """
    size = MODELS[model]
    hidden, gradient = micro_batch(size, tokens)
    stacks = {name: build(size, VARIANTS[name], router_dtype, layers=LAYERS) for name in variants}
    forward: dict[str, list[float]] = {name: [] for name in variants}
    in_backward: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + WARM_UP_STEPS):
        for name in variants:
            with VARIANTS[name].active(stacks[name]):
                for number in range(1 + TIMED_PER_VISIT):
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                    events[0].record()
                    outputs = stacks[name](hidden)
                    events[1].record()
                    backward(outputs, gradient)
                    events[2].record()
                    torch.cuda.synchronize()
                    end_of_step(stacks[name])
                    if round_number >= WARM_UP_STEPS and number:
                        forward[name].append(events[0].elapsed_time(events[1]) * 1000 / LAYERS)
                        in_backward[name].append(events[1].elapsed_time(events[2]) * 1000 / LAYERS)
    replays = {} if captured is None else _times_of_replays(stacks, hidden, gradient, rounds, captured)
    times = {}
    for name in variants:
        of_forward, of_backward = _profile(stacks[name], name, hidden, gradient, profile)
        times[name] = Times(
            statistics.median(forward[name]),
            statistics.median(in_backward[name]),
            of_forward.kernels / LAYERS,
            of_backward.kernels / LAYERS,
            (of_forward.microseconds + of_backward.microseconds) / LAYERS,
            replays.get(name),
        )
    return times


def _profile(
    stack: Stack, variant: str, hidden: Tensor, gradient: Tensor, profile: Callable[[Callable[[], Any], int], GpuWork]
) -> tuple[GpuWork, GpuWork]:
    """What the GPU did in a forward and in its backward; a step of three micro-batches, all forwards first."""
    outputs: list[list[Tensor]] = []
    with VARIANTS[variant].active(stack):
        for ends in (True, False):
            backward(stack(hidden), gradient)
            if ends:
                end_of_step(stack)
        in_forward = profile(lambda: outputs.append(stack(hidden)), 3)
        in_backward = profile(lambda: backward(outputs.pop(), gradient), 3)
        end_of_step(stack)
    return in_forward, in_backward


def _times_of_replays(
    stacks: dict[str, Stack], hidden: Tensor, gradient: Tensor, rounds: int, captured: dict[str, str]
) -> dict[str, float]:
    """Microseconds per layer of a forward and its backward in one CUDA graph, medians over interleaved rounds."""
    graphs: dict[str, tuple] = {}
    for name, stack in stacks.items():
        try:
            graphs[name] = _captured(name, stack, hidden, gradient)
            captured[name] = ", ".join(sorted(set(graphs[name][1].values())))
        except Exception as error:
            captured[name] = f"not captured: {type(error).__name__}: {error}".splitlines()[0]
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, *_) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) * 1000 / REPLAYS / LAYERS)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _captured(name: str, stack: Stack, hidden: Tensor, gradient: Tensor) -> tuple:
    """(graph, path of each layer, what has to live as long)."""

    def both() -> tuple[Tensor, ...]:
        outputs = stack(hidden)
        weights = [router.weight for router in stack.routers]
        return torch.autograd.grad(outputs, (hidden, *weights), [gradient.to(outputs[0].dtype)] * LAYERS)

    with VARIANTS[name].active(stack) as handle:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                both()
                end_of_step(stack)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with nullcontext() if handle is None else handle._steps.whole():  # as in Megatron's FullCudaGraphWrapper
            with torch.cuda.graph(graph):
                gradients = both()
                if handle is not None:
                    handle._steps.finish_capture()
        of_layers = {} if handle is None else dict(handle.loss_paths)
        end_of_step(stack)
    return graph, of_layers, gradients, stack, handle


def report_counts(model: str, variants: Sequence[str], router_dtype: str | None, list_ops: bool) -> str:
    """Markdown: launches, traffic, host waits and kept bytes of one model, per layer and micro-batch."""
    tokens = COUNTED_TOKENS[-1]
    without = counts_at(model, BASELINE, router_dtype)
    baseline = without[-1]
    rows, details = [], []
    for name in variants:
        if name == BASELINE:
            continue
        with_loss = counts_at(model, name, router_dtype)
        counts = with_loss[-1]
        forward, in_backward = beyond(counts.forward, baseline.forward), beyond(counts.backward, baseline.backward)
        per_token, per_micro_batch = kept_bytes(with_loss, without)
        launches = [len(forward), len(in_backward), len(forward) + len(in_backward), len(counts.step_end)]
        rows.append(
            [
                name,
                *(f"{number / LAYERS:g}" for number in launches),
                len(counts.collectives),
                len(counts.host_waits),
                f"{(counts.traffic - baseline.traffic) / tokens / LAYERS:.0f}",
                f"{per_token / LAYERS:g} T + {per_micro_batch / LAYERS:g}",
            ]
        )
        if list_ops:
            parts = {"forward": forward, "backward": in_backward, "end of step": counts.step_end}
            details += [f"{name}, {part} of {LAYERS} layers: " + "; ".join(map(str, ops)) for part, ops in parts.items()]
    head = ["loss", "forward", "backward", "sum", "step end", f"collectives of {LAYERS} layers", "host waits"]
    head += ["traffic, B/token", "kept, B"]
    return "\n".join([table(head, rows), *(f"\n- {line}" for line in details)])


def report_steps(model: str, variants: Sequence[str], router_dtype: str | None) -> str:
    """Markdown: launches of whole steps, routers without a loss subtracted; no GPU needed."""
    rows = []
    names = [name for name in variants if name != BASELINE]
    for layers in STEP_LAYERS:
        for micro_batches in STEP_MICRO_BATCHES:
            sizes = {"tokens": STEP_TOKENS, "router_dtype": router_dtype, "layers": layers, "micro_batches": micro_batches}
            baseline = launches_of_step(model, BASELINE, **sizes)
            rows.append([layers, micro_batches, *(launches_of_step(model, name, **sizes) - baseline for name in names)])
    return table(["layers", "micro-batches", *names], rows)


def report_times(
    model: str, variants: Sequence[str], token_counts: Sequence[int], router_dtype: str | None, rounds: int
) -> str:
    """Markdown: GPU times of one model, the routers without a loss subtracted."""
    rows = []
    for tokens in token_counts:
        times = time_on_gpu(model, variants, tokens=tokens, router_dtype=router_dtype, rounds=rounds, captured={})
        for name in variants:
            more = vars(times[name]) if name == BASELINE else beyond_baseline(times[name], times[BASELINE])
            sign = "" if name == BASELINE else "+"
            rows.append([tokens, name, *("-" if value is None else f"{value:{sign}.1f}" for value in more.values())])
    head = ["tokens", "loss", "forward, us", "backward, us", "kernels forward", "kernels backward", "kernel time, us"]
    return table([*head, "graph replay, us"], rows)


def beyond_baseline(times: Times, baseline: Times) -> dict[str, float | None]:
    """What a loss adds, by field of `Times`."""
    of_none = vars(baseline)
    return {key: None if value is None or of_none[key] is None else value - of_none[key] for key, value in vars(times).items()}


def as_stage() -> None:
    """The stage "kernels" of gpu.py."""
    from on_gpu.stage import Stage, paths

    stage = Stage("kernels")
    paths()
    if stage.cpu:
        import megatron_cpu

        megatron_cpu.install()
    start(gpu=not stage.cpu)
    names = list(VARIANTS)
    rounds = 1 if stage.cpu else 10 if stage.quick else 20
    captured: dict[str, str] = {}
    stage.data.update(rounds=rounds, layers=LAYERS, router_dtype="fp32", sizes=[])
    for model in ["qwen3-30b-a3b"] if stage.quick else MODELS:
        for tokens in (64, 128) if stage.cpu else TOKENS:
            what = f"{model}, {tokens} tokens"
            if stage.left < SECONDS_OF_A_ROW:
                stage.skip(what, "no time left")
                continue
            with stage.check(what):
                options: dict[str, Any] = {"profile": _without_profiler} if stage.cpu else {"captured": captured}
                times = time_on_gpu(model, names, tokens=tokens, router_dtype="fp32", rounds=rounds, **options)
                rows = [_row_of_stage(name, times, captured.get(name)) for name in names]
                stage.data["sizes"].append({"model": model, "tokens": tokens, "rows": rows})
                stage.data["how each loss was computed"] = captured
            torch.cuda.empty_cache()
    if not stage.cpu:
        with stage.check("the Triton kernels computed what they should, and nothing else"):
            for name, path in captured.items():
                if VARIANTS[name].register:
                    # Detailed metrics need the scores.
                    plain = VARIANTS[name].plain or "detailed" in name
                    assert path.startswith("plain" if plain else "fused"), f"{name}: {path}"
        for size in stage.data["sizes"]:
            kernels = {row["loss"]: row["all"]["kernels_forward"] + row["all"]["kernels_backward"] for row in size["rows"]}
            for name in [name for name in names if VARIANTS[name].register and "detailed" not in name]:
                with stage.check(f"kernels of {name} <= aux_loss: {size['model']}, {size['tokens']} tokens"):
                    assert kernels[name] <= kernels["aux_loss"], kernels
    stop()


def _row_of_stage(name: str, times: dict[str, Times], captured: str | None) -> dict[str, Any]:
    more = beyond_baseline(times[name], times[BASELINE])
    figures, more = (
        {key: round(value, 2) for key, value in of.items() if value is not None} for of in (vars(times[name]), more)
    )
    failed = captured if captured is not None and captured.startswith("not captured") else None
    return {"loss": name, "all": figures, "more": more, "not captured": failed}


def _without_profiler(work: Callable[[], Any], repeats: int) -> GpuWork:
    """Instead of `kernels_on_gpu`, without a GPU: only does the work."""
    for _ in range(repeats):
        work()
    return GpuWork(0, 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU: counts")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--losses", nargs="+", choices=VARIANTS, metavar="LOSS", default=DEFAULT_VARIANTS)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="per micro-batch, for GPU times")
    parser.add_argument("--router-dtype", choices=["fp32", "model"], default="fp32", help="Megatron's --moe-router-dtype")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds per loss")
    parser.add_argument("--steps", action="store_true", help="with --cpu: only the launches of whole steps, of the first model")
    parser.add_argument("--list-ops", action="store_true", help="name every launch")
    parser.add_argument("--out", type=Path, help="write the report to this file as well")
    args = parser.parse_args()
    if BASELINE not in args.losses:
        args.losses.insert(0, BASELINE)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device; without one use --cpu, which counts launches and bytes")
    return args


def main() -> None:
    """Measure and print the report on rank 0."""
    if "--json" in sys.argv:
        as_stage()
        return
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
        parts.append(report_counts(model, args.losses, router_dtype, args.list_ops))
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
