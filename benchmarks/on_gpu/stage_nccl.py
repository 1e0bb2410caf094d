"""Stage 3: one rank whose NCCL all-reduces are forced (forced.py): no host synchronisation, CUDA graphs, constant memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from stage import Stage, paths

paths()

import torch  # noqa: E402
from forced import counted_all_reduces, forced_reductions  # noqa: E402

LAYERS, MICRO_BATCHES, TOKENS = 2, 3, 1024
SYNCED_STEPS = 3
MEMORY_STEPS = (20, 200)


@contextmanager
def no_host_synchronisation(cpu: bool) -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    if not cpu:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not cpu:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def steps_of(variant: str) -> Iterator[Callable[[], None]]:
    """A step of a few routers with a loss: all micro-batches, then the step's end."""
    from models import MODELS
    from routers import VARIANTS, backward, build, end_of_step, micro_batch

    size = MODELS["qwen3-30b-a3b"]
    stack = build(size, VARIANTS[variant], "fp32", layers=LAYERS)
    hidden, gradient = micro_batch(size, TOKENS)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            backward(stack(hidden), gradient)
        end_of_step(stack)

    with VARIANTS[variant].active(stack):
        yield step


def without_synchronisation(variant: str, cpu: bool) -> int:
    """Steps under "error"; how many all-reduces a step issued."""
    with steps_of(variant) as step, counted_all_reduces() as issued:
        for _ in range(SYNCED_STEPS):  # NCCL's communicators, buffers, Megatron's log
            step()
        issued.number = 0
        with no_host_synchronisation(cpu):
            for _ in range(SYNCED_STEPS):
                step()
    return issued.number // SYNCED_STEPS


def memory_growth(variant: str, steps: tuple[int, int]) -> int:
    """Bytes that PyTorch's allocator holds more after the last step than after the first ones."""
    with steps_of(variant) as step:
        held = 0
        for number in range(1, steps[1] + 1):
            step()
            if number in steps:
                torch.cuda.synchronize()
                gc.collect()
                held = torch.cuda.memory_allocated() - held
    return held


def largest_difference(grads: list, others: list) -> float:
    """Of the steps: the norm of the difference, relative to the other's norm."""
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(grads, others))


def captured_equals_eager(scope: str, cpu: bool) -> dict:
    """One layer captured once and replayed over several steps, against the float64 truth and against the same layer eager.

    Raises:
        AssertionError: a gradient is off by more than 1e-5, or an all-reduce went into the graph, whose micro-batch is unknown.
    """
    import harness
    import truth
    from captured import train_captured
    from compare import compare_exact, register_arguments
    from layout import Layout
    from megatron.core import parallel_state
    from truth import Problem

    problem = Problem(scope, 1, 3, 4, layers=1)
    expected = truth.gradients(problem)
    with counted_all_reduces() as issued:
        replayed = train_captured(problem, register_arguments(problem), not cpu)["grads"]
    parallel_state.destroy_model_parallel()
    eager = harness.run(problem, Layout(), register_arguments(problem))["grads"]
    parallel_state.destroy_model_parallel()
    eager = [by_layer[1][1] for by_layer in eager]
    for step in range(problem.steps):
        compare_exact(eager[step], expected[step][0][1], f"eager, step {step}")
        compare_exact(replayed[step], expected[step][0][1], f"replayed, step {step}")
    assert issued.captured == 0, "an all-reduce was captured"
    difference = largest_difference(replayed, eager)
    return {"replayed against eager, relative": f"{difference:.1e}"}


def _require_that_synchronisation_raises() -> None:
    number = torch.ones((), device="cuda")
    try:
        with no_host_synchronisation(cpu=False):
            number.item()
    except RuntimeError:
        return
    raise AssertionError("`.item()` did not raise")


def main() -> None:
    stage = Stage("nccl")
    if stage.cpu:
        import megatron_cpu

        megatron_cpu.install()
    from megatron.core import parallel_state
    from routers import VARIANTS, plain_path, start

    start(gpu=not stage.cpu)
    if not stage.cpu:
        with stage.check("a host synchronisation is noticed (control)"):
            _require_that_synchronisation_raises()
    with stage.check("Megatron's router without a loss does not synchronise (control)"):
        without_synchronisation("none", stage.cpu)
    ours = [name for name, variant in VARIANTS.items() if variant.register]
    with forced_reductions():
        for variant in ours:
            expected = MICRO_BATCHES + VARIANTS[variant].has_metrics  # of metrics: over TP x CP, at the step's end
            with stage.check(f"no host synchronisation, {expected} all-reduces per step: {variant}") as entry:
                entry["all-reduces per step"] = found = without_synchronisation(variant, stage.cpu)
                assert found == expected, f"{found} all-reduces per step"
        for variant in ours:
            steps = (2, 4) if stage.cpu else MEMORY_STEPS
            with stage.check(f"memory after step {steps[1]} as after step {steps[0]}: {variant}") as entry:
                entry["bytes more"] = growth = memory_growth(variant, steps)
                assert growth == 0, f"{growth} bytes more"
        parallel_state.destroy_model_parallel()
        for variant in [name for name in ours if not VARIANTS[name].has_metrics]:
            with stage.check(f"CUDA graph of a layer, replayed: {variant}") as entry:
                with plain_path() if VARIANTS[variant].plain else nullcontext():
                    entry.update(captured_equals_eager(dict(VARIANTS[variant].register)["scope"], stage.cpu))
            if parallel_state.model_parallel_is_initialized():  # after a failure
                parallel_state.destroy_model_parallel()
    gc.collect()  # a communicator cannot end before the graphs that hold its work
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
