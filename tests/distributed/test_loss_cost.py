"""What the loss of a model chunk launches and keeps, against Megatron's own, on two data-parallel ranks. Counts, no times.

On the CPU that is the plain path, but for the last test, in which Triton's interpreter runs the kernels of core/fused.
The GPU's own counts are in tests/gpu/test_router_cost.py, times in benchmarks/router_cost.py and host_cost.py.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from models import MODELS

SCOPES = ["dp", "global"]
LAYERS = 8  # of router_cost.py
METRICS_STEPS = [(8, 2), (8, 4), (16, 2)]  # layers, micro-batches

# Launches per step are counted in whole steps: of one micro-batch, in which the step's end weighs most, and of more.
STEPS = [
    ("qwen3-30b-a3b", "fp32", 8, 1),
    ("qwen3-30b-a3b", "fp32", 8, 2),
    ("qwen3-30b-a3b", "fp32", 8, 8),
    ("qwen3-30b-a3b", "fp32", 48, 1),
    ("qwen3-30b-a3b", "fp32", 48, 2),
    ("deepseek-v3", "fp32", 8, 1),
    ("paper-3.4b-a0.6b", None, 8, 1),
]

# What is counted begins at the scores; the product of full size that makes them would take most of the time.
with_small_hidden = mock.patch.dict(MODELS, {name: replace(size, hidden=64) for name, size in MODELS.items()})


@with_small_hidden
def measure(model: str, losses: list[str], router_dtype: str | None):
    """In a worker. By loss, of a micro-batch of 8 layers: launches beyond routers without a loss, host waits, collectives, kept
    (bytes per token, bytes)."""
    import router_cost
    import routers
    from megatron_log import forget_logged_losses

    routers.start_megatron()
    forget_logged_losses()  # Megatron sizes its log by the first model of a process
    without = router_cost.counts_at(model, "none", router_dtype)
    none = without[0]
    result = {}
    for loss in losses:
        with_loss = router_cost.counts_at(model, loss, router_dtype)
        counts = with_loss[0]
        launches = len(counts.forward) + len(counts.backward) - len(none.forward) - len(none.backward)
        kept = router_cost.kept_bytes(with_loss, without)
        result[loss] = (launches, counts.host_waits, counts.collectives, kept)
    return result


@pytest.mark.parametrize(
    "model, router_dtype", [("qwen3-30b-a3b", "fp32"), ("deepseek-v3", "fp32"), ("paper-3.4b-a0.6b", None)]
)
def test_less_than_aux_loss(workers, model, router_dtype):
    costs = workers.run(measure, 2, model, ["aux_loss", "global_aux_loss", *SCOPES], router_dtype)[0]
    launches, _, collectives, kept = costs["aux_loss"]
    assert launches > 10 * LAYERS and not collectives, "Megatron's aux_loss was not measured"
    assert costs["global_aux_loss"][2] == ["allreduce_"] * LAYERS
    for scope in SCOPES:
        assert costs[scope][0] <= launches - 12 * LAYERS, f"{scope} does not launch much less than aux_loss: {costs}"
        assert costs[scope][0] < costs["global_aux_loss"][0], f"{scope} launches as much as global_aux_loss: {costs}"
        assert costs[scope][1] == [], f"{scope} makes the host wait for the device"
        assert costs[scope][2] == ["allreduce_"], "one reduction per micro-batch for all layers"
        # The score function's own output is the same for all; what is added to it must be less.
        assert costs[scope][3][0] <= kept[0] and costs[scope][3][1] < kept[1], f"{scope} keeps more than aux_loss: {costs}"


@with_small_hidden
def launches_of_steps(model: str, losses: list[str], router_dtype: str | None, layers: int, micro_batches: int):
    """In a worker. Launches of a whole step by loss, beyond those of routers without a loss."""
    import router_cost
    import routers
    from megatron_log import forget_logged_losses

    routers.start_megatron()
    forget_logged_losses()
    sizes = {"router_dtype": router_dtype, "layers": layers, "micro_batches": micro_batches}
    none, *counts = (router_cost.launches_of_step(model, loss, tokens=16, **sizes) for loss in ["none", *losses])
    return {loss: launches - none for loss, launches in zip(losses, counts)}


def test_metrics_cost_a_copy_per_micro_batch(workers):
    """For all layers together, and per step a few launches; the host waits for nothing."""
    names = ["dp", "global", "dp brief", "global brief"]
    costs = workers.run(measure, 2, "qwen3-30b-a3b", names, "fp32")[0]
    sizes = {number: workers.run(launches_of_steps, 2, "qwen3-30b-a3b", names, "fp32", *number)[0] for number in METRICS_STEPS}
    for scope in SCOPES:
        brief = f"{scope} brief"
        assert costs[brief][1] == [], f"{brief} makes the host wait for the device"
        assert costs[brief][2] == ["allreduce_"]
        assert costs[brief][0] == costs[scope][0] + 1, costs
        more = {number: launches[brief] - launches[scope] for number, launches in sizes.items()}
        assert more[8, 4] - more[8, 2] == 2, f"one copy per micro-batch: {more}"
        assert more[16, 2] == more[8, 2] <= 24, f"per step, for any number of layers: {more}"


@pytest.mark.parametrize("model, router_dtype, layers, micro_batches", STEPS)
def test_a_step_launches_less_than_with_aux_loss(workers, model, router_dtype, layers, micro_batches):
    costs = workers.run(launches_of_steps, 2, model, ["aux_loss", *SCOPES], router_dtype, layers, micro_batches)[0]
    assert costs["aux_loss"] > 10 * layers * micro_batches, "Megatron's aux_loss was not measured"
    assert all(costs[scope] < costs["aux_loss"] for scope in SCOPES), costs


@with_small_hidden
def kernels_on_the_logits(model: str):
    """In a worker. By loss, of a micro-batch of 8 layers: launches and kept bytes, beyond those of routers without a loss; the
    kernels' names, and the traffic of those on [T, E] (bytes per layer, token and expert)."""
    import harness
    import router_cost
    import routers
    from megatron_log import forget_logged_losses
    from models import MODELS

    routers.start_megatron()
    forget_logged_losses()
    tokens = 64
    none = router_cost.count(model, "none", tokens=tokens, router_dtype="fp32")
    result = {}
    for loss in ["aux_loss", *SCOPES]:
        with harness.loss_path(loss != "aux_loss"):
            counts = router_cost.count(model, loss, tokens=tokens, router_dtype="fp32")
        ours = [op for op in (*counts.forward, *counts.backward) if op.name.endswith("_kernel")]
        launches = len(counts.forward) + len(counts.backward) - len(none.forward) - len(none.backward)
        traffic = sum(op.traffic for op in ours if op.name != "rows_kernel") / tokens / MODELS[model].experts / LAYERS
        result[loss] = (launches, [op.name for op in ours], counts.kept - none.kept, traffic)
    return result


def test_kernels_on_the_logits(workers):
    """Two launches per layer and what they read and write: logits and selection; logits, gradient in and out. One for the
    gradient rows of all layers."""
    costs = workers.run(kernels_on_the_logits, 2, "paper-3.4b-a0.6b")[0]
    kernels = ["count_kernel"] * LAYERS + ["rows_kernel"] + ["logits_kernel"] * LAYERS
    for scope in SCOPES:
        launches, names, kept, traffic = costs[scope]
        assert names == kernels, costs
        assert launches - len(kernels) <= 7, f"for the tables of a micro-batch: {costs}"
        assert kept < costs["aux_loss"][2], costs
        assert 17 <= traffic < 18.5, f"{scope}: {traffic:.1f} bytes per token and expert"  # and what is of size [E]
    assert costs["aux_loss"][0] > 10 * LAYERS, "Megatron's aux_loss was not measured"
