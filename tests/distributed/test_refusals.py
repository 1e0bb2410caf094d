"""What cannot be right says so; nothing is silently wrong."""

from __future__ import annotations

import harness
import pytest
import torch
from layout import Layout
from several import check
from truth import Problem, inputs
from workers import CaseFailed


def stray_forward(problem, layout, register):
    """A forward in training mode without gradients between the training forwards, as a careless evaluation would do it."""
    import torch

    original = harness._my_shards

    def shards_after_a_stray_forward(problem, layout, step):
        x, _ = inputs(problem, step)
        for router in routers:
            with torch.no_grad():
                router(x[0, 0])
        return original(problem, layout, step)

    routers = []
    record = harness._record_selections
    harness._record_selections = lambda chunks: routers.extend(b.router for c in chunks for b in c.blocks) or record(chunks)
    harness._my_shards = shards_after_a_stray_forward
    try:
        return harness.run(problem, layout, register)
    finally:
        harness._my_shards, harness._record_selections = original, record


@pytest.mark.parametrize("recompute", [None, "full"])
def test_forwards_without_gradients_count_nothing(workers, recompute):
    problem, layout = Problem("global", 1, 2), Layout(recompute=recompute)
    plain = workers.run(harness.run, 1, problem, layout, {"scope": "global"})
    stray = workers.run(stray_forward, 1, problem, layout, {"scope": "global"})
    for number, pair in plain[0]["grads"][0].items():
        assert all(a.equal(b) for a, b in zip(pair, stray[0]["grads"][0][number], strict=True))


def recomputed_by_pytorch(problem, layout, register):
    """Checkpointed by something that the plugin is not told of."""
    import toy
    from torch.utils.checkpoint import checkpoint

    original = toy.tensor_parallel.checkpoint
    toy.tensor_parallel.checkpoint = lambda function, _, *inputs: checkpoint(function, *inputs, use_reentrant=True)
    try:
        return harness.run(problem, layout, register)
    finally:
        toy.tensor_parallel.checkpoint = original


def test_recomputation_that_is_not_megatrons(workers):
    problem = Problem("global", 1, 2)
    with pytest.raises(CaseFailed, match="layer 1 runs inside a backward, but .* not counted.*--recompute-granularity full"):
        workers.run(recomputed_by_pytorch, 1, problem, Layout(recompute="full"), {"scope": "global"})


def test_both_losses_in_one_list(workers):
    problem = Problem("global", 1, 1)
    both = {"load_balancing_type": ["aux_loss", "global_aux_loss"], "aux_loss_coeff": [0.01, 0.01]}
    with pytest.raises(CaseFailed, match="aux_loss global_aux_loss: which of them it should act on is ambiguous; allowed"):
        workers.run(harness.run, 1, problem, Layout(), {"scope": "global"}, both)


def test_routers_that_run_several_times_per_micro_batch(workers):
    """As the flag does before training, for whoever has no flags; a field since 0.18."""
    with pytest.raises(CaseFailed, match="--moe-lbl-scope global is not supported with --mlp-chunks-for-training 2"):
        workers.run(harness.run, 1, Problem("global", 1, 1), Layout(), {"scope": "global"}, {"mlp_chunks_for_training": 2})


def twice_in_one_forward(a, handle):
    a.begin()
    blocks = a.toy.blocks
    a.toy.blocks = torch.nn.ModuleList([*blocks, blocks[0]])
    try:
        a.micro_batch(0)
    finally:
        a.toy.blocks = blocks


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_a_layer_that_runs_twice_in_one_forward(workers, scope):
    """Ranks could do so unequally often, and their tables would not fit together."""
    refused = "MoE layer 0 ran 2 times in one forward of its model chunk, and has 1 row.* Call the model once per micro-batch"
    check(workers, twice_in_one_forward, Problem(scope, 2, 2, 1), refused=refused)


def fully_sharded(problem, layout, register):
    from megatron.core.distributed import DistributedDataParallel

    name = DistributedDataParallel.__name__
    DistributedDataParallel.__name__ = "TorchFullyShardedDataParallel"
    try:
        return harness.run(problem, layout, register)
    finally:
        DistributedDataParallel.__name__ = name


def test_pytorch_fsdp2(workers):
    with pytest.raises(CaseFailed, match="TorchFullyShardedDataParallel; allowed: Megatron's DDP"):
        workers.run(fully_sharded, 1, Problem("global", 1, 1), Layout(), {"scope": "global"})


def routing_replaced_since(problem, layout, register):
    """As a framework's own patch does it: without calling what was there."""
    from megatron.core.transformer.moe.router import TopKRouter

    original, build = TopKRouter.routing, harness.build

    def build_and_replace(*arguments):
        TopKRouter.routing = original
        return build(*arguments)

    harness.build = build_and_replace
    try:
        return harness.run(problem, layout, register)
    finally:
        harness.build = build


def test_a_router_that_somebody_else_replaced_since(workers):
    with pytest.raises(CaseFailed, match=r"no router of this step reported .*TopKRouter.routing was replaced after"):
        workers.run(routing_replaced_since, 1, Problem("global", 1, 1), Layout(), {"scope": "global"})
