"""What cannot be right says so; nothing is silently wrong."""

from __future__ import annotations

import harness
import pytest
from compare import register_arguments
from layout import Layout
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


def test_training_mode_forwards_that_are_not_trained_on(workers):
    problem = Problem("global", 1, 2)
    with pytest.raises(CaseFailed, match=r"2|1 forwards of the router .* call model.eval\(\)"):
        workers.run(stray_forward, 1, problem, Layout(recompute="full"), {"scope": "global"})


def test_without_recomputation_they_count_nothing(workers):
    problem = Problem("global", 1, 2)
    plain = workers.run(harness.run, 1, problem, Layout(), {"scope": "global"})
    stray = workers.run(stray_forward, 1, problem, Layout(), {"scope": "global"})
    for number, pair in plain[0]["grads"][0].items():
        assert all(a.equal(b) for a, b in zip(pair, stray[0]["grads"][0][number], strict=True))


def test_recomputation_that_megatron_does_not_know_of(workers):
    problem = Problem("global", 1, 2)
    hidden = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    with pytest.raises(CaseFailed, match="first forward was not counted.*--recompute-granularity full"):
        workers.run(harness.run, 1, problem, Layout(recompute="full"), {"scope": "global"}, hidden)


@pytest.mark.parametrize("scope, micro_coeff", [("dp", 0.0), ("global", 0.001)])
def test_repeated_multi_token_prediction_with_recomputation(workers, scope, micro_coeff):
    problem = Problem(scope, 1, 2, mtp_applications=2, micro_coeff=micro_coeff)
    with pytest.raises(CaseFailed, match="--mtp-use-repeated-layer and recomputation; allowed"):
        workers.run(harness.run, 1, problem, Layout(recompute="full"), register_arguments(problem))


def test_both_losses_in_one_list(workers):
    problem = Problem("global", 1, 1)
    both = {"load_balancing_type": ["aux_loss", "global_aux_loss"], "aux_loss_coeff": [0.01, 0.01]}
    with pytest.raises(CaseFailed, match="has both aux_loss and global_aux_loss; allowed"):
        workers.run(harness.run, 1, problem, Layout(), {"scope": "global"}, both)


def fully_sharded(problem, layout, register):
    from megatron.core.distributed import DistributedDataParallel

    name = DistributedDataParallel.__name__
    DistributedDataParallel.__name__ = "FullyShardedDataParallel"
    try:
        return harness.run(problem, layout, register)
    finally:
        DistributedDataParallel.__name__ = name


def test_megatron_fsdp(workers):
    with pytest.raises(CaseFailed, match="FullyShardedDataParallel .* yet; allowed: Megatron's DDP"):
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
