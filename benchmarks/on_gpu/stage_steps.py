"""Stage 5: how much longer a training step of 8 Qwen3-30B-A3B-shaped layers takes than with `aux_loss`.

The loss' all-reduces are forced on the one GPU (the group over which it counts says that it has two ranks) and end later by a
delay, by a kernel that spins on a stream of its own: time is lost only where somebody waits for it (benchmarks/latency.py). The
reductions of DDP are left as they are. A ratio is taken within a round, in which every loss has its turn; medians over rounds.
"""

from __future__ import annotations

import statistics
import time

from stage import Stage, paths

paths()

import torch  # noqa: E402
from forced import pretended_size  # noqa: E402
from latency import Latency  # noqa: E402
from routers import STEP_VARIANTS, VARIANTS, device_of_tensors, start, stop  # noqa: E402

REFERENCE, CONTROL = "aux_loss", "aux_loss (again)"
# Microseconds of a small all-reduce in docs/scaling.md: none; 16 and 256 GPUs; 256 GPUs on a slow cluster.
DELAYS = (0.0, 25.0, 65.0, 166.0)
MICRO_BATCHES, STEPS = 2, 2
LEAST_ROUNDS = 3
RESERVE = 8  # seconds


def groups_of_the_loss(model: torch.nn.Module) -> set[str]:
    """Names of the groups over which routers count."""
    from megatron.core.transformer.moe.router import TopKRouter

    return {module.tp_dp_cp_group.group_name for module in model.modules() if isinstance(module, TopKRouter)}


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


def summary(delay: float, seconds: dict[str, list[float]], reduced: dict[str, int]) -> list[dict]:
    """One row per loss."""
    rows = []
    for name, times in seconds.items():
        ratios = sorted(time / reference for time, reference in zip(times, seconds[REFERENCE]))
        rows.append(
            {
                "delay": delay,
                "loss": name,
                "step, ms": round(statistics.median(times) * 1000, 3),
                "ratio": round(statistics.median(ratios), 4),
                "smallest": round(ratios[0], 4),
                "largest": round(ratios[-1], 4),
                "rounds": len(ratios),
                "all-reduces of the loss per step": reduced[name],
            }
        )
    return rows


def main() -> None:
    stage = Stage("steps")
    if stage.cpu:
        import megatron_cpu

        megatron_cpu.install()
    start(gpu=not stage.cpu)
    with stage.check("a step's time is measured with every loss"):
        measure(stage)
    stop()


def measure(stage: Stage) -> None:
    """Rounds until the time is up; the results so far are saved after every round."""
    from qwen3_layers import Shape, build, loss_of, run_step

    shape = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, experts=8, topk=2, ffn=32, tokens=64)
    shape = shape if stage.cpu else Shape()
    _, model = build(shape)
    place = {"dtype": torch.bfloat16, "device": device_of_tensors()}
    batches = [torch.randn(shape.tokens, 1, shape.hidden, **place) for _ in range(MICRO_BATCHES)]
    names = [*STEP_VARIANTS, CONTROL]
    delays = DELAYS[:1] + DELAYS[2:3] if stage.quick else DELAYS
    stage.data["model"] = vars(shape) | {"micro-batches": MICRO_BATCHES, "timed steps per visit": STEPS}
    latency = Latency()
    if not stage.cpu:
        stage.data["delay, measured in us"] = {}
        for delay in delays[1:]:
            latency.seconds = delay / 1e6
            stage.data["delay, measured in us"][f"{delay:g}"] = round(measured_delay(latency), 1)
    seconds: dict[float, dict[str, list[float]]] = {delay: {name: [] for name in names} for delay in delays}
    reduced: dict[str, int] = {}
    launched: list[float] = []

    def visit(name: str, delay: float) -> float:
        latency.seconds = delay / 1e6
        with loss_of(VARIANTS[name.removesuffix(" (again)")], model):
            run_step(model, shape, batches)
            torch.cuda.synchronize()
            latency.reduced.clear()
            begin = time.perf_counter()
            for _ in range(STEPS):
                run_step(model, shape, batches)
            launching = time.perf_counter() - begin
            torch.cuda.synchronize()
            launched.append(launching / (time.perf_counter() - begin))
            took = (time.perf_counter() - begin) / STEPS
        reduced[name] = len(latency.reduced) // STEPS
        return took

    with pretended_size(groups_of_the_loss(model)), latency.installed():
        for name in names:  # nobody's first step counts: kernels are chosen, buffers and NCCL's communicators made
            visit(name, 0.0)
        number, longest = 0, 0.0
        # Of the least rounds each is begun, so a stage that has too little time shows what it has.
        while number < (1 if stage.cpu else LEAST_ROUNDS) or stage.left > RESERVE + longest:
            begin = time.monotonic()
            order = names[number % len(names) :] + names[: number % len(names)]
            for delay in delays:
                for name in order:
                    seconds[delay][name].append(visit(name, delay))
            number, longest = number + 1, max(longest, time.monotonic() - begin)
            # Near 1 the step is as long as the host needs to launch it, and its time says nothing about the GPU.
            stage.data["launched after, of a step"] = round(statistics.median(launched), 3)
            stage.data["rows"] = [row for delay in delays for row in summary(delay, seconds[delay], reduced)]
            stage.save()
            if stage.cpu:
                break
    if not stage.cpu:
        stage.data["memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    expected = shape.layers * MICRO_BATCHES
    for name, count in reduced.items():
        right = 0 if name.startswith(REFERENCE) else 1 if name.startswith("window") else expected
        assert count == right, f"{name}: {count} all-reduces of the loss per step, not {right}"


if __name__ == "__main__":
    main()
