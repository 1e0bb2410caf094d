"""What a load-balancing loss costs in a training step, against Megatron's `aux_loss`, with a slow network injected.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/step_cost.py --cpu
    torchrun --nproc-per-node 8 benchmarks/step_cost.py -- --hidden-size 2048 --seq-length 4096 --bf16    # GPUs, NCCL

It is real Megatron training: `examples/pretrain_gpt_moe.py` runs Megatron's `pretrain` from its arguments to its log, and only
`train_step` is wrapped, to change the loss between steps and to read the clock. One model and one process train with all
losses in turns, so that a drift of the machine meets all alike:

    for every latency, for every round, for every loss (the order rotates): 1 step untimed, then --steps timed

A visit during which others (processes, or the host of a virtual machine) took more than `--disturbed` of this machine's CPU
time is run again. A ratio is taken within a round, and the median over rounds is reported with its 95 % confidence interval
(from the ranks of the sorted ratios, nothing assumed). "CPU in metrics" is measured where it is spent, and so tells shares that
no ratio of steps can tell on a busy machine. `aux_loss (again)` is the same thing measured twice: what the machine
can tell apart. The ratio of CPU times (of rank 0, all threads) shows the work that a loss adds, but no waiting. How latency is
injected: latency.py.

Arguments after `--` go to Megatron and override the model below.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]  # the plugin, when it is not installed; the training script

from latency import BACKWARD, FORWARD, Latency, Reduced  # noqa: E402
from report import OtherLoad, machine, table  # noqa: E402
from routers import COEFF, VARIANTS, Variant  # noqa: E402

REFERENCE, AGAIN = "aux_loss", " (again)"
DEFAULT_LOSSES = [REFERENCE, "global_aux_loss", "dp", "global", "window", REFERENCE + AGAIN, "global blocking"]
LOSSES = [*DEFAULT_LOSSES, "global brief", "global detailed", "global" + AGAIN]
WARM_UP_STEPS = 3
REPEATS_PER_VISIT = 2  # on average; a machine busier than that is not fit for this
MODEL = """
    --num-layers 8 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --swiglu --disable-bias-linear
    --seq-length 128 --max-position-embeddings 128 --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-router-topk 2 --micro-batch-size 1 --lr 1e-4 --clip-grad 1.0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 512 --split 100,0,0 --num-workers 0
    --transformer-impl local --no-bias-swiglu-fusion --seed 7
    --log-interval 1000000 --eval-interval 1000000 --eval-iters 0
""".split()
# The type and its coefficient are changed before each step; a router built for both has the state that either needs.
BOTH_LOSSES = ["--moe-router-load-balancing-type", "aux_loss", "global_aux_loss", "--moe-aux-loss-coeff", *[str(COEFF)] * 2]


@dataclass(frozen=True)
class Visit:
    """A few steps in a row with one loss under one latency."""

    latency: float
    round: int
    loss: str
    untimed: int
    timed: int


@dataclass
class Clock:
    """Wraps `train_step`: takes the visits one after the other and keeps their times."""

    visits: list[Visit]
    latency: Latency
    disturbed: float
    seconds: dict[Visit, float] = field(default_factory=dict)
    cpu_seconds: dict[Visit, float] = field(default_factory=dict)
    in_metrics: dict[Visit, float] = field(default_factory=dict)
    reduced: dict[tuple[float, str], list[Reduced]] = field(default_factory=dict)
    layer_seconds: list[float] = field(default_factory=list)
    others: float = 0.0
    repeats: int = 0
    _position: int = 0
    _step: int = 0
    _began: float = 0.0
    _cpu_began: float = 0.0
    _of_metrics: list[float] = field(default_factory=list)
    _active: ExitStack = field(default_factory=ExitStack)
    _load: OtherLoad | None = None

    def wrap(self, train_step: Any) -> Any:
        """A `train_step` for Megatron's loop."""

        def stepped(forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            self._between_steps(model)
            return train_step(forward_step_func, data_iterator, model, *args, **kwargs)

        return stepped

    def _between_steps(self, model: list[torch.nn.Module]) -> None:
        torch.cuda.synchronize()  # nothing on the CPU
        dist.barrier()  # both ranks are through: the slower one's time counts
        now, cpu_now = time.perf_counter(), time.process_time()
        if self._position < len(self.visits) and self._step == self._current.untimed + self._current.timed:
            self._end_visit(now, cpu_now)
        if self._position == len(self.visits):
            from megatron.training import get_args

            get_args().train_iters = 0  # this step is the last
            return
        visit = self._current
        if self._step == 0:
            self.latency.seconds = visit.latency
            self._active.enter_context(timed_metrics(self._of_metrics))
            self._active.enter_context(active(VARIANTS[visit.loss.removesuffix(AGAIN)], model))
            self._active.enter_context(timed_layers(model, self.layer_seconds if visit.untimed == WARM_UP_STEPS else None))
        if self._step == visit.untimed:
            dist.barrier()
            self.latency.reduced.clear()
            self._of_metrics.clear()
            self._load = OtherLoad()
            self._began, self._cpu_began = time.perf_counter(), time.process_time()
        self._step += 1

    @property
    def _current(self) -> Visit:
        return self.visits[self._position]

    def _end_visit(self, now: float, cpu_now: float) -> None:
        """Keep the visit's figures, or run it again if the machine was disturbed."""
        visit = self._current
        self._step = 0
        self._active.close()
        assert self._load is not None
        share = torch.tensor([self._load.share()], dtype=torch.float64, device="cuda")
        dist.broadcast(share, 0)  # all ranks go on together
        if share.item() > self.disturbed and self.repeats < REPEATS_PER_VISIT * len(self.visits):
            self.repeats += 1
            return
        self.others += share.item() / len(self.visits)
        self.seconds[visit] = (now - self._began) / visit.timed
        self.cpu_seconds[visit] = (cpu_now - self._cpu_began) / visit.timed
        self.in_metrics[visit] = sum(self._of_metrics) / visit.timed
        if dist.get_rank() == 0:
            milliseconds = self.seconds[visit] * 1000
            print(f"{visit.latency * 1000:g} ms, round {visit.round + 1}, {visit.loss}: {milliseconds:.1f} ms", flush=True)
        self.reduced[visit.latency, visit.loss] = self.latency.reduced[: len(self.latency.reduced) // visit.timed]
        self._position += 1


def active(variant: Variant, model: list[torch.nn.Module]) -> Any:
    """Megatron with this loss, model and arguments alike, while inside."""
    from megatron.training import get_args

    get_args().moe_router_load_balancing_type = variant.upstream
    variant.choose(model)
    return variant.active()


def timed_layers(model: list[torch.nn.Module], seconds: list[float] | None) -> ExitStack:
    """Appends the forward time of every transformer layer while inside; None does nothing."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    stack = ExitStack()
    if seconds is None:
        return stack

    def before(layer: torch.nn.Module, _: Any) -> None:
        torch.cuda.synchronize()
        layer._began = time.perf_counter()

    def after(layer: torch.nn.Module, *_: Any) -> None:
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - layer._began)

    for layer in (module for chunk in model for module in chunk.modules() if isinstance(module, TransformerLayer)):
        stack.callback(layer.register_forward_pre_hook(before).remove)
        stack.callback(layer.register_forward_hook(after).remove)
    return stack


@contextmanager
def timed_metrics(seconds: list[float]) -> Iterator[None]:
    """Appends the CPU time of this thread in everything that the metrics do, but for copying the counts."""
    from megatron_global_lbl.core import engine
    from megatron_global_lbl.metrics.metrics import Metrics

    places = [(engine, "observed"), *((Metrics, name) for name in ("observe", "end_step", "log"))]
    originals = [getattr(owner, name) for owner, name in places]

    def timed(original: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                seconds.append(time.thread_time() - began)

        return function

    for (owner, name), original in zip(places, originals):
        setattr(owner, name, timed(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals):
            setattr(owner, name, original)


def plan(latencies: list[float], rounds: int, steps: int, losses: list[str]) -> list[Visit]:
    """All visits in order; the first one warms up and is in no table."""
    visits = [Visit(0.0, -1, losses[0], WARM_UP_STEPS, 1)]
    for latency in latencies:
        for number in range(rounds):
            order = losses[number % len(losses) :] + losses[: number % len(losses)]
            visits += [Visit(latency, number, loss, 1, steps) for loss in order]
    return visits


def ratios(seconds: dict[Visit, float], latency: float, loss: str, reference: str) -> list[float]:
    """Of every round: the loss' time over that of the reference in the same round."""
    by_round = {
        name: {visit.round: time for visit, time in seconds.items() if (visit.latency, visit.loss) == (latency, name)}
        for name in (loss, reference)
    }
    return [by_round[loss][number] / by_round[reference][number] for number in sorted(by_round[loss]) if number >= 0]


def interval_of_median(numbers: list[float]) -> tuple[float, float]:
    """95 % confidence interval: the number of samples below the median is binomial."""
    ordered, count = sorted(numbers), len(numbers)
    cut = max(0, int((count - 1.96 * count**0.5) / 2))
    return ordered[cut], ordered[-1 - cut]


def report(clock: Clock, latencies: list[float], losses: list[str]) -> str:
    """One Markdown table per latency; the reference is the first of the losses."""
    head = ["loss", "step, ms", "ratio", "95 %", "CPU time, ratio", "95 %", "all-reduces more", "bytes more"]
    head += ["waited for in the forward", "in the backward", "latency exposed in them, ms", "CPU in metrics, ms", "of a step's"]
    parts = []
    for latency in latencies:
        rows = []
        reference = clock.reduced[latency, losses[0]]
        for loss in losses:
            times = [time for visit, time in clock.seconds.items() if (visit.latency, visit.loss) == (latency, loss)]
            row = [loss, f"{statistics.median(times) * 1000:.1f}"]
            for measure in (clock.seconds, clock.cpu_seconds):
                found = ratios(measure, latency, loss, losses[0])
                low, high = interval_of_median(found)
                row += [f"{statistics.median(found):.3f}", f"{low:.3f} to {high:.3f}"]
            reduced = clock.reduced[latency, loss]
            row.append(f"{len(reduced) - len(reference)}")
            row.append(f"{sum(entry.payload for entry in reduced) - sum(entry.payload for entry in reference)}")
            row += [f"{sum(entry.waited == phase for entry in reduced)}" for phase in (FORWARD, BACKWARD)]
            row.append(f"{sum(entry.exposed for entry in reduced if entry.waited in (FORWARD, BACKWARD)) * 1000:.1f}")
            visits = [visit for visit in clock.in_metrics if (visit.latency, visit.loss) == (latency, loss)]
            in_metrics = statistics.median(clock.in_metrics[visit] for visit in visits)
            row.append(f"{in_metrics * 1000:.2f}")
            row.append(f"{in_metrics / statistics.median(clock.cpu_seconds[visit] for visit in visits):.2%}")
            rows.append(row)
        parts.append(f"### {latency * 1000:g} ms per all-reduce\n\n{table(head, rows)}\n")
    return "\n".join(parts)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, megatron = sys.argv[1:cut], sys.argv[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="gloo and the CPU instead of NCCL and GPUs")
    parser.add_argument("--latency", nargs="+", type=float, default=[0.0, 1.0, 5.0], help="injected per all-reduce, ms")
    parser.add_argument("--rounds", type=int, default=15, help="visits of every loss per latency, >= 5")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per visit; window's wait shows from 2 on")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument(
        "--disturbed", type=float, default=0.015, metavar="SHARE", help="of the CPU time that others may take during a visit"
    )
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=DEFAULT_LOSSES, metavar="LOSS", help=", ".join(LOSSES))
    parser.add_argument("--reference", choices=LOSSES, default=REFERENCE, help="what ratios are taken to")
    parser.add_argument("--out", type=Path, help="write the report to this file as well")
    args = parser.parse_args(own)
    if args.rounds < 5:
        parser.error(f"--rounds {args.rounds}: too few for a median; allowed: >= 5")
    args.losses = [args.reference, *(loss for loss in args.losses if loss != args.reference)]
    return args, megatron


def main() -> None:
    """Train, measure, and print the report on rank 0."""
    args, megatron_arguments = parse_arguments()
    if "RANK" not in os.environ:
        raise SystemExit("step_cost.py: start it with torchrun, with 2 ranks or more (RANK is not set)")
    if args.cpu:
        import megatron_cpu

        megatron_cpu.install()
    latencies = [milliseconds / 1000 for milliseconds in args.latency]
    visits = plan(latencies, args.rounds, args.steps, args.losses)
    ranks = int(os.environ["WORLD_SIZE"])
    iterations = (1 + REPEATS_PER_VISIT) * sum(visit.untimed + visit.timed for visit in visits) + 1
    sys.argv = [sys.argv[0], *MODEL, *BOTH_LOSSES, *megatron_arguments]
    sys.argv += ["--train-iters", str(iterations), "--global-batch-size", str(ranks * args.micro_batches)]
    if args.cpu:
        sys.argv += ["--distributed-backend", "gloo", "--use-cpu-initialization"]

    specification = importlib.util.spec_from_file_location("pretrain_gpt_moe", ROOT / "examples" / "pretrain_gpt_moe.py")
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    from megatron.training import get_args, training

    clock = Clock(visits, Latency(), args.disturbed)
    training.train_step = clock.wrap(training.train_step)
    with clock.latency.installed():
        script.main()
    if int(os.environ["RANK"]) == 0:
        megatron = get_args()
        layer = statistics.median(clock.layer_seconds) * 1000
        text = "\n".join(
            [
                machine(gpu=not args.cpu),
                f"{ranks} data-parallel ranks, {megatron.num_layers} MoE layers, {args.micro_batches} micro-batches of "
                f"{megatron.micro_batch_size} x {megatron.seq_length} tokens, hidden size {megatron.hidden_size}, "
                f"{megatron.num_experts} experts, top-{megatron.moe_router_topk}. A layer's forward takes {layer:.1f} ms. "
                f"{args.rounds} rounds of {args.steps} timed steps. {clock.repeats} of {clock.repeats + len(visits)} visits "
                f"were run again because others took more than {args.disturbed:.1%} of the machine's CPU time; in those that "
                f"count they took {clock.others:.2%}.",
                "",
                report(clock, latencies, args.losses),
            ]
        )
        print(text)
        if args.out:
            args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
