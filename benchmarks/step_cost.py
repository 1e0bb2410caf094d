"""What a load-balancing loss costs in a training step, against Megatron's `aux_loss`, with a slow network injected.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/step_cost.py --cpu
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/step_cost.py --cpu --vocabulary 32768
    torchrun --nproc-per-node 8 benchmarks/step_cost.py                   # GPUs, NCCL
    python benchmarks/gpu.py --out DIR --stages steps                     # one GPU: the loss' all-reduces are forced

Layers of Qwen3-30B-A3B's shape (config.json: hidden 2048, 32 heads of 128 with 4 key-value heads, 128 experts of 768, top-8),
without Transformer Engine: Megatron's MoELayer, router and dispatcher, schedule, DDP and `finalize_model_grads`; attention is
PyTorch's, and the experts are two grouped matrix products, as Megatron's local ones would make a step several times longer.
`--vocabulary` adds an output layer with its cross-entropy, whose backward lies between a forward and the first router's
backward. No optimizer.

One process trains with all losses in turns: for every latency, for every round, for every loss (the order rotates) 1 step
untimed (a registration's first), then --steps timed. A ratio is taken within a round; medians over rounds, with the smallest
and the largest. `aux_loss (again)` is the same thing measured twice. "Exposed" is what was left of the injected latency when
somebody waited, all ranks having arrived. On a shared machine it depends on who was interrupted; so the CPU time between an
all-reduce's start and its wait is given, too, and what the latency is longer than that: what ranks in step would expose. How
latency is injected: latency.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the plugin, when it is not installed

from latency import BACKWARD, FORWARD, Latency, Reduced
from report import OtherLoad, machine, table
from routers import COEFF, STEP_VARIANTS, VARIANTS, device_of_tensors, start, stop

REFERENCE, AGAIN = "aux_loss", " (again)"
LOSSES = [*STEP_VARIANTS, REFERENCE + AGAIN]
# Microseconds of a small all-reduce in docs/scaling.md: none; 16 and 256 GPUs; 256 GPUs on a slow cluster.
STAGE_DELAYS = (0.0, 25.0, 65.0, 166.0)
LEAST_ROUNDS = 3
RESERVE = 8  # seconds


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `vocabulary` 0 is none, and the loss the mean square of the last layer's output."""

    layers: int = 8
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_size: int = 128
    experts: int = 128
    topk: int = 8
    ffn: int = 768
    tokens: int = 8192  # 16384 took 0.59 s per step of two on an H200: one round in the time of a stage
    vocabulary: int = 0


ON_CPU = Shape(hidden=128, heads=4, kv_heads=2, head_size=32, experts=16, topk=2, ffn=128, tokens=256)
TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, experts=8, topk=2, ffn=32, tokens=64)


class GroupedExperts(nn.Module):
    """All experts of a layer in two grouped matrix products (`torch.nn.functional.grouped_mm`)."""

    def __init__(self, num_local_experts: int, config: Any, **_: Any) -> None:
        super().__init__()
        size = {"dtype": config.params_dtype, "device": device_of_tensors()}
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        self.up_and_gate = nn.Parameter(torch.randn(num_local_experts, hidden, 2 * ffn, **size) * 0.02)
        self.down = nn.Parameter(torch.randn(num_local_experts, ffn, hidden, **size) * 0.02)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        ends = tokens_per_expert.cumsum(0).to(tokens.device, torch.int32)
        up, gate = F.grouped_mm(tokens, self.up_and_gate, offs=ends).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * probs.unsqueeze(-1)).to(tokens.dtype)
        return F.grouped_mm(inner, self.down, offs=ends), None


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)); x is [S, 1, H]."""

    def __init__(self, config: Any, shape: Shape, number: int) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

        super().__init__()
        self.shape = shape
        place = {"dtype": config.params_dtype, "device": device_of_tensors()}
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_size
        self.norm, self.moe_norm = (nn.RMSNorm(shape.hidden, eps=1e-6, **place) for _ in range(2))
        self.qkv = nn.Linear(shape.hidden, width, bias=False, **place)
        self.out = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False, **place)
        self.moe = MoELayer(config, MoESubmodules(experts=GroupedExperts), layer_number=number)
        self.moe.set_layer_number(number)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        heads = self.qkv(self.norm(x)).view(x.shape[0], x.shape[1], -1, shape.head_size).permute(1, 2, 0, 3)
        query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.permute(2, 0, 1, 3).flatten(2))
        return x + self.moe(self.moe_norm(x))[0]


def build(shape: Shape) -> nn.Module:
    """The model in Megatron's DDP with fp32 gradients, with routers for either of Megatron's losses."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_load_balancing_type=["aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[COEFF, COEFF],
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    config.finalize_model_grads_func = finalize_model_grads

    class Model(MegatronModule):
        """The layers, as Megatron's schedule wants a model."""

        def __init__(self) -> None:
            super().__init__(config)
            self.model_type, self.share_embeddings_and_output_weights = ModelType.encoder_or_decoder, False
            self.pre_process = self.post_process = True
            self.layers = nn.ModuleList([Layer(config, shape, number) for number in range(1, shape.layers + 1)])
            self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False) if shape.vocabulary else None

        def set_input_tensor(self, input_tensor: Any) -> None:
            """There is no other pipeline stage."""

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x if self.head is None else self.head(x)

    # What Float16Module does: the router's weight and buffers are bf16.
    module = Model().bfloat16().to(device_of_tensors())
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config=config, ddp_config=options, module=module).train()


def run_step(model: nn.Module, shape: Shape, batches: list[Tensor]) -> None:
    """Forwards, backwards and the step's end in Megatron's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def loss(output: Tensor) -> tuple[Tensor, dict]:
        if not shape.vocabulary:
            return output.float().square().mean(), {}
        labels = torch.arange(output.shape[0], device=output.device) % shape.vocabulary
        return F.cross_entropy(output.squeeze(1).float(), labels), {}

    def forward(iterator: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
        return model(next(iterator)), loss

    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=shape.tokens,
        micro_batch_size=1,
        forward_only=False,
    )


@dataclass
class Visits:
    """What was measured: by latency in seconds and loss.

    Attributes:
        seconds: of a step, a number per round.
        reduced: the all-reduces of a round's steps.
        launched: after which share of a step the host had launched it.
    """

    steps: int
    seconds: dict[tuple[float, str], list[float]] = field(default_factory=dict)
    reduced: dict[tuple[float, str], list[list[Reduced]]] = field(default_factory=dict)
    launched: list[float] = field(default_factory=list)

    def ratios(self, latency: float, loss: str, reference: str) -> list[float]:
        """Sorted: of every round, the loss' time over that of the reference in the same round."""
        return sorted(time / of for time, of in zip(self.seconds[latency, loss], self.seconds[latency, reference]))

    def per_step(self, latency: float, loss: str, of: Callable[[Reduced], float]) -> float:
        """A sum over the all-reduces of a step, median over rounds."""
        return statistics.median(sum(map(of, entries)) / self.steps for entries in self.reduced[latency, loss])


class Benchmark:
    """The model and what trains it."""

    def __init__(self, shape: Shape, micro_batches: int, steps: int) -> None:
        self.shape, self.latency, self.visits = shape, Latency(), Visits(steps)
        self.model = build(shape)
        place = {"dtype": torch.bfloat16, "device": device_of_tensors()}
        self.batches = [torch.randn(shape.tokens, 1, shape.hidden, **place) for _ in range(micro_batches)]

    def visit(self, loss: str, latency: float, *, keep: bool = True) -> None:
        """A few steps in a row."""
        visits, variant = self.visits, VARIANTS[loss.removesuffix(AGAIN)]
        self.latency.seconds = latency
        variant.choose([self.model])
        with variant.active():
            self._step()
            self._wait_for_all()
            self.latency.reduced.clear()
            begin = time.perf_counter()
            for _ in range(visits.steps):
                self._step()
            launching = time.perf_counter() - begin
            self._wait_for_all()
            took = time.perf_counter() - begin
        if keep:
            visits.launched.append(launching / took)
            visits.seconds.setdefault((latency, loss), []).append(took / visits.steps)
            visits.reduced.setdefault((latency, loss), []).append(list(self.latency.reduced))

    def round(self, number: int, losses: list[str], latencies: list[float]) -> None:
        """A visit for every loss under every latency."""
        order = losses[number % len(losses) :] + losses[: number % len(losses)]
        for latency in latencies:
            for loss in order:
                self.visit(loss, latency)

    def _step(self) -> None:
        run_step(self.model, self.shape, self.batches)

    def _wait_for_all(self) -> None:
        torch.cuda.synchronize()  # nothing on the CPU
        dist.barrier()  # the slowest rank's time counts


def report(visits: Visits, latencies: list[float], losses: list[str]) -> str:
    """One Markdown table per latency; the first of the losses is the reference."""
    head = ["loss", "step, ms", "ratio (smallest to largest)", "all-reduces more", "bytes more", "waited for in the forward"]
    head += ["in the backward", "exposed in them, ms", "CPU time in between, ms", "exposed by that, ms"]
    parts = []
    for latency in latencies:
        rows = []
        for loss in losses:
            found = visits.ratios(latency, loss, losses[0])
            row = [loss, f"{statistics.median(visits.seconds[latency, loss]) * 1000:.1f}"]
            row.append(f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})")
            for of in (lambda entry: 1, lambda entry: entry.payload):
                row.append(f"{visits.per_step(latency, loss, of) - visits.per_step(latency, losses[0], of):g}")
            for phase in (FORWARD, BACKWARD):
                row.append(f"{visits.per_step(latency, loss, lambda entry, phase=phase: entry.waited == phase):g}")
            between = [e.between for step in visits.reduced[latency, loss] for e in step if e.waited in (FORWARD, BACKWARD)]
            row.append(f"{visits.per_step(latency, loss, _exposed) * 1000:.1f}")
            row.append(f"{statistics.median(between) * 1000:.1f}" if between else "-")
            row.append(f"{visits.per_step(latency, loss, partial(_exposed_by_cpu_time, latency=latency)) * 1000:.1f}")
            rows.append(row)
        parts.append(f"### {latency * 1000:g} ms per all-reduce\n\n{table(head, rows)}\n")
    return "\n".join(parts)


def _exposed(entry: Reduced) -> float:
    return entry.exposed if entry.waited in (FORWARD, BACKWARD) else 0.0


def _exposed_by_cpu_time(entry: Reduced, latency: float) -> float:
    return max(0.0, latency - entry.between) if entry.waited in (FORWARD, BACKWARD) else 0.0


@contextmanager
def on_one_gpu(model: nn.Module) -> Iterator[None]:
    """The groups over which the routers count say that they have two ranks, so the loss' all-reduces really start."""
    from megatron.core.transformer.moe.router import TopKRouter
    from on_gpu.forced import pretended_size

    with pretended_size({x.tp_dp_cp_group.group_name for x in model.modules() if isinstance(x, TopKRouter)}):
        yield


def measured_delay(latency: Latency) -> float:
    """Microseconds that the spinning kernel really takes."""
    cycles = latency.cycles()  # the first call calibrates, which takes as long as a thousand delays
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(100):
        torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 10


def run_stage(stage: Any) -> None:
    """The stage "steps" of gpu.py: rounds until the time is up; the results so far are saved after every round."""
    start(gpu=not stage.cpu)
    benchmark = Benchmark(TINY if stage.cpu else Shape(), micro_batches=2, steps=2)
    visits, delays = benchmark.visits, list(STAGE_DELAYS[:1] + STAGE_DELAYS[2:3] if stage.quick else STAGE_DELAYS)
    seconds = [delay / 1e6 for delay in delays]
    stage.data["model"] = vars(benchmark.shape) | {"micro-batches": len(benchmark.batches), "timed steps": visits.steps}
    if not stage.cpu:
        stage.data["delay, measured in us"] = {}
        for delay in delays[1:]:
            benchmark.latency.seconds = delay / 1e6
            stage.data["delay, measured in us"][f"{delay:g}"] = round(measured_delay(benchmark.latency), 1)
    with on_one_gpu(benchmark.model), benchmark.latency.installed():
        for loss in LOSSES:  # kernels are chosen, buffers and NCCL's communicators made
            benchmark.visit(loss, 0.0, keep=False)
        number, longest = 0, 0.0
        while number < (1 if stage.cpu else LEAST_ROUNDS) or stage.left > RESERVE + longest:
            begin = time.monotonic()
            benchmark.round(number, LOSSES, seconds)
            number, longest = number + 1, max(longest, time.monotonic() - begin)
            # Near 1 the step is as long as the host needs to launch it, and its time says nothing about the GPU.
            stage.data["launched after, of a step"] = round(statistics.median(visits.launched), 3)
            stage.data["rows"] = [_row_of_stage(visits, delay, loss) for delay in delays for loss in LOSSES]
            stage.save()
            if stage.cpu:
                break
    if not stage.cpu:
        stage.data["memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    per_micro_batch = {"aux_loss": 0, "global_aux_loss": benchmark.shape.layers}
    for row in stage.data["rows"]:
        right = per_micro_batch.get(row["loss"].removesuffix(AGAIN), 1) * len(benchmark.batches)
        found = row["all-reduces of the loss per step"]
        assert found == right, f"{row['loss']}: {found} all-reduces of the loss per step, not {right}"
    stop()


def _row_of_stage(visits: Visits, delay: float, loss: str) -> dict[str, Any]:
    latency = delay / 1e6
    ratios = visits.ratios(latency, loss, REFERENCE)
    return {
        "delay": delay,
        "loss": loss,
        "step, ms": round(statistics.median(visits.seconds[latency, loss]) * 1000, 3),
        "ratio": round(statistics.median(ratios), 4),
        "smallest": round(ratios[0], 4),
        "largest": round(ratios[-1], 4),
        "rounds": len(ratios),
        "all-reduces of the loss per step": visits.per_step(latency, loss, lambda entry: 1),
    }


def as_stage() -> None:
    from on_gpu.stage import Stage, paths

    stage = Stage("steps")
    paths()
    if stage.cpu:
        import megatron_cpu

        megatron_cpu.install()
    with stage.check("a step's time is measured with every loss"):
        run_stage(stage)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo and the CPU instead of NCCL and GPUs")
    parser.add_argument("--latency", nargs="+", type=float, default=[0.0, 5.0], help="injected per all-reduce, ms")
    parser.add_argument("--rounds", type=int, default=15, help="visits of every loss per latency")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per visit")
    parser.add_argument("--micro-batches", type=int, default=2)
    for name in ("layers", "hidden", "experts", "tokens", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="of the model")
    choices = [*VARIANTS, *(name + AGAIN for name in VARIANTS)]
    parser.add_argument(
        "--losses", nargs="+", choices=choices, default=LOSSES, metavar="LOSS", help="the first is the reference"
    )
    parser.add_argument("--out", type=Path, help="write the report to this file as well")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, with 2 ranks or more (RANK is not set)")
    return args


def main() -> None:
    """Train, measure, and print the report on rank 0."""
    if "--json" in sys.argv:
        as_stage()
        return
    args = parse_arguments()
    if args.cpu:
        import megatron_cpu

        megatron_cpu.install()
        torch.set_num_threads(1)
    start(gpu=not args.cpu)
    given = {name: getattr(args, name) for name in ("layers", "hidden", "experts", "tokens", "vocabulary")}
    shape = replace(ON_CPU if args.cpu else Shape(), **{name: value for name, value in given.items() if value is not None})
    benchmark, load = Benchmark(shape, args.micro_batches, args.steps), OtherLoad()
    latencies = [milliseconds / 1000 for milliseconds in args.latency]
    with benchmark.latency.installed():
        for loss in args.losses:
            benchmark.visit(loss, 0.0, keep=False)
        for number in range(args.rounds):
            benchmark.round(number, args.losses, latencies)
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    stop()
    if first:
        sizes = ", ".join(f"{name} {value}" for name, value in vars(shape).items())
        lines = [
            machine(gpu=not args.cpu),
            f"{ranks} data-parallel ranks, {sizes}, {args.micro_batches} micro-batches; {args.rounds} rounds of {args.steps} "
            f"timed steps. Others took {load.share():.0%} of the machine's CPU time.",
        ]
        text = "\n".join([*lines, "", report(benchmark.visits, latencies, args.losses)])
        print(text)
        if args.out:
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
