"""`lbl.chunk`: a custom training loop without Megatron's DistributedDataParallel."""

from __future__ import annotations

import contextlib
import io

import harness
import pytest
import torch
import truth
from compare import compare_exact
from layout import Layout
from truth import Problem

PATHS = pytest.mark.parametrize("fused", [False, True])


def model_of(problem: Problem, extra: dict | None = None):
    """In a worker: the toy, in no wrapper."""
    from megatron.core.transformer import TransformerConfig
    from toy import Chunk

    harness.initialize(Layout())
    config = TransformerConfig(**harness._config_fields(problem, Layout(), extra or {}))
    return Chunk(config, problem, Layout(), 0, 0).train()


def train(problem: Problem, model, step: int) -> None:
    """Forwards and backwards of a step, of which nothing but zero_grad tells the beginning."""
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    model.load(truth.weights(problem, step))
    model.zero_grad(set_to_none=True)
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1 / problem.micro_batches))
    for x, padding in harness.shards_at(problem, step, dist.get_rank(), 0, 1):
        (model(x, padding).sum() * 0).backward()


def gradients(model) -> list[tuple[torch.Tensor, ...]]:
    """[layer] (W, router), averaged over ranks as a custom loop does it."""
    import torch.distributed as dist

    pairs = [(block.below.grad, block.router.weight.grad) for block in model.blocks]
    for pair in pairs:
        for grad in pair:
            dist.all_reduce(grad.div_(dist.get_world_size()))
    return [tuple(grad.clone() for grad in pair) for pair in pairs]


def in_a_loop(problem: Problem, fused: bool, unfinished: bool):
    """In a worker: (gradients by step, printed, whether `forward` is the model's own during and after the registration)."""
    import megatron_global_lbl as lbl

    model, printed, steps = model_of(problem), io.StringIO(), []
    with harness.loss_path(fused), contextlib.redirect_stdout(printed), lbl.registered(scope=problem.scope):
        lbl.chunk(model)
        lbl.chunk(model)  # again changes nothing
        during = "forward" in vars(model)
        for step in range(problem.steps):
            if unfinished:
                train(problem, model, 1000)
            train(problem, model, step)
            lbl.end_step(model)
            lbl.end_step(model)
            steps.append(gradients(model))
    return steps, printed.getvalue(), during, "forward" in vars(model)


@PATHS
@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_the_gradient_is_the_formula(workers, scope, unfinished, fused):
    """`zero_grad(set_to_none=True)` begins a step, and what an unfinished one counted is dropped."""
    problem = Problem(scope, 2, 3, 2, masks="uneven")
    expected = truth.gradients(problem)
    for rank, (steps, printed, during, after) in enumerate(workers.run(in_a_loop, 2, problem, fused, unfinished)):
        assert during and not after
        assert printed.count("their counts are dropped") == (unfinished and rank == 0)
        assert printed.count("acted on 2 of 2 MoE layers") == (rank == 0)
        for step, of_step in enumerate(steps):
            for layer, pair in enumerate(of_step):
                for actual, true in zip(pair, expected[step][layer], strict=True):
                    compare_exact(actual, true, f"rank {rank} step {step} layer {layer}")


def with_a_forward_of_its_own(problem: Problem):
    """In a worker: the gradients, how often the instance's `forward` ran, and whether it comes back."""
    import megatron_global_lbl as lbl

    model, calls = model_of(problem), []
    inner = model.forward

    def own(*args):
        calls.append(None)
        return inner(*args)

    model.forward = own  # as torch.compile may leave it
    with lbl.registered(scope=problem.scope):
        lbl.chunk(model)
        train(problem, model, 0)
        lbl.end_step(model)
        found = gradients(model)
    return found, len(calls), vars(model).get("forward") is own


def test_a_forward_of_the_instance_is_called_and_restored(workers):
    problem = Problem("global", 2, 2, 1, masks="uneven")
    expected = truth.gradients(problem)
    for rank, (found, calls, restored) in enumerate(workers.run(with_a_forward_of_its_own, 2, problem)):
        assert restored and calls == problem.micro_batches
        for layer, pair in enumerate(found):
            for actual, true in zip(pair, expected[0][layer], strict=True):
                compare_exact(actual, true, f"rank {rank} layer {layer}")


def refused(problem: Problem, how: str) -> str:
    """In a worker: the text of the ConfigError."""
    import megatron_global_lbl as lbl

    model = model_of(problem)
    try:
        if how == "before register":
            lbl.chunk(model)
        with lbl.registered(scope="global"):
            if how == "no MoE layer":
                lbl.chunk(torch.nn.Linear(2, 2))
            train(problem, model, 0)
    except lbl.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "how, text",
    [
        ("not named", "trained outside of Megatron's DistributedDataParallel, .* call megatron_global_lbl.chunk.model. once"),
        ("before register", r"chunk\(model\) needs a registration: call megatron_global_lbl.register"),
        ("no MoE layer", r"chunk\(Linear\): no MoE layer for --moe-lbl-scope global in it"),
    ],
)
def test_refused(workers, how, text):
    import re

    (found,) = workers.run(refused, 1, Problem("global", 1, 1), how)
    assert re.search(text, found), found


def served(problem: Problem, fused: bool, register: dict | None):
    """In a worker: what a caller of Megatron's function gets within a forward, and outside of it; for logits of its own."""
    from megatron.core.transformer.moe import router as module

    import megatron_global_lbl as lbl

    model = model_of(problem)
    logits = torch.randn(5, problem.experts, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([False, True, False, False, True])
    results = []

    def diagnostics(router, inputs, output):
        """A monitor in another function of the router's file would be the same."""
        results.append(module.compute_routing_scores_for_aux_loss(logits, 2, "softmax", padding_mask=mask))

    def gating(self, input):
        result = original(self, input)
        diagnostics(self, input, result)
        return result

    original = module.TopKRouter.gating
    module.TopKRouter.gating = gating

    def select(*arguments, **options):  # within `routing`, after the selection
        result = topk(*arguments, **options)
        diagnostics(None, None, None)
        return result

    topk = module.topk_routing_with_score_function
    module.topk_routing_with_score_function = select
    try:
        with harness.loss_path(fused), lbl.registered(**register) if register else contextlib.nullcontext():
            if register:
                lbl.chunk(model)
            train(problem, model, 0)
            diagnostics(None, None, None)
            lbl.end_step()
    finally:
        module.TopKRouter.gating, module.topk_routing_with_score_function = original, topk
    return [(routing_map.detach(), scores.detach(), scores.requires_grad) for routing_map, scores in results]


@PATHS
def test_any_other_caller_of_the_scores_is_served_as_by_megatron(workers, fused):
    problem = Problem("global", 1, 2)
    (plain,) = workers.run(served, 1, problem, fused, None)
    (found,) = workers.run(served, 1, problem, fused, {"scope": "global"})
    assert len(plain) == len(found) == 9
    for (map_0, scores_0, grad_0), (map_1, scores_1, grad_1) in zip(plain, found):
        assert map_0.equal(map_1) and scores_0.equal(scores_1) and grad_0 == grad_1 and not map_1[1].any()
