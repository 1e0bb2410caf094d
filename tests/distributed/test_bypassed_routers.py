"""Routers that are not, or not only, Megatron's: they are right, or one error before the optimizer names them."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import compare
import harness
import pytest
import several
import torch
from core_cases import RELEASE
from layout import Layout
from truth import Problem
from workers import CaseFailed

PROBLEM = Problem("global", 1, 2)
FILE = r"test_bypassed_routers.py:\d+\)"
PATHS = pytest.mark.parametrize("fused", [False, True])


def own_routing(router_class):
    class OwnRouting(router_class):
        def routing(self, logits, *args, **kwargs):
            return select(logits)

    return OwnRouting


def own_forward(router_class):
    class OwnForward(router_class):
        def forward(self, input, *args, **kwargs):
            return select(self.gating(input))

    return OwnForward


def select(logits):
    logits = logits.flatten(0, 1)
    return logits.softmax(-1), torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1).bool()


def own_loss(router_class):
    class OwnLoss(router_class):
        """Reads the scores, as a loss does."""

        def _apply_aux_loss(self, probs, scores_for_aux_loss, *args, **kwargs):
            return probs + scores_for_aux_loss.sum() * 0

        _apply_global_aux_loss = _apply_aux_loss

    return OwnLoss


def extended(router_class):
    class Extended(router_class):
        """Calls Megatron's methods, and reads what they are given."""

        def forward(self, input, *args, **kwargs):
            return super().forward(input * 1, *args, **kwargs)

        def routing(self, logits, *args, **kwargs):
            probs, routing_map = super().routing(logits, *args, **kwargs)
            return probs * 1, routing_map

        def _apply_aux_loss(self, probs, scores_for_aux_loss, *args, **kwargs):
            assert scores_for_aux_loss.shape == probs.shape
            return super()._apply_aux_loss(probs * 1, scores_for_aux_loss, *args, **kwargs)

    return Extended


def run(change, fused, *arguments):
    """In a worker: `harness.run` after a change, which a test module's function makes."""
    with ExitStack() as stack, harness.loss_path(fused):
        change(stack)
        return harness.run(*arguments)


def refused(workers, change, match: str, fused: bool | None = None, register: dict | None = None, **extra) -> None:
    """One ConfigError at the first step's end or before."""
    with pytest.raises(CaseFailed, match=match) as found:
        workers.run(run, 1, change, fused, PROBLEM, Layout(), register or {"scope": "global"}, extra)
    assert "AssertionError" not in str(found.value) and str(found.value).count("settings.ConfigError: ") == 1


class Changed:
    """Workers for `compare.check` in which a change is made first."""

    def __init__(self, workers, change) -> None:
        self._workers, self._change = workers, change

    def run(self, function, world_size, fused, *arguments):
        return self._workers.run(run, world_size, self._change, fused, *arguments)


class InAllLayers:
    """A change: all routers of the model are of this class."""

    def __init__(self, make) -> None:
        self.make = make

    def __call__(self, stack) -> None:
        import toy

        stack.enter_context(mock.patch.object(toy, "TopKRouter", self.make(toy.TopKRouter)))


def in_the_second_layer(stack):
    import toy

    original, mine = toy.TopKRouter, own_routing(toy.TopKRouter)
    build = toy._router

    def router(config, number, *arguments):
        with mock.patch.object(toy, "TopKRouter", mine if number == 2 else original):
            return build(config, number, *arguments)

    stack.enter_context(mock.patch.object(toy, "_router", router))


@PATHS
@pytest.mark.parametrize("make, method", [(own_routing, "OwnRouting.routing"), (own_forward, "OwnForward.forward")])
def test_a_subclass_with_its_own_routing(workers, make, method, fused):
    match = rf"scope global did not act on MoE layer\(s\) 0, 1: {method} \(.*{FILE} does not call .*Let it call super\(\)"
    refused(workers, InAllLayers(make), match, fused)


def test_in_some_layers(workers):
    refused(workers, in_the_second_layer, rf"did not act on MoE layer\(s\) 1: OwnRouting.routing \(.*{FILE}")


def test_that_only_metrics_would_miss(workers):
    register = {"scope": "micro", "metrics": "brief"}
    match = rf"--moe-lbl-metrics brief did not record MoE layer\(s\) 1: OwnRouting.routing \(.*{FILE}"
    refused(workers, in_the_second_layer, match, register=register)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_subclass_that_extends(workers, recompute):
    problem = Problem("global", 2, 2, 2, masks="uneven")
    compare.check(Changed(workers, InAllLayers(extended)), problem, Layout(recompute=recompute))


def test_a_subclass_that_reads_the_scores_is_not_fused(workers):
    with pytest.raises(AssertionError, match="another auxiliary loss or a subclass of the router needs the scores"):
        compare.check(Changed(workers, InAllLayers(extended)), PROBLEM, fused=True)


def replaced_before(stack):
    from megatron.core.transformer.moe.router import TopKRouter

    stack.enter_context(mock.patch.object(TopKRouter, "routing", lambda self, logits, **kwargs: select(logits)))


@PATHS
def test_routing_replaced_before_register(workers, fused):
    match = (
        rf"selection of MoE layer 0 is unknown: TopKRouter.routing \(.*{FILE} does not select through .*"
        "topk_routing_with_score_function. Let it call that function"
    )
    refused(workers, replaced_before, match, fused)


@PATHS
@pytest.mark.parametrize("kind, method", [("aux_loss", "_apply_aux_loss"), ("global_aux_loss", "_apply_global_aux_loss")])
def test_a_subclass_with_its_own_loss(workers, kind, method, fused):
    match = rf"loss of MoE layer 0 was not replaced: OwnLoss.{method} \(.*{FILE} does not call"
    refused(workers, InAllLayers(own_loss), match, fused, load_balancing_type=kind)


def with_an_attribute(stack):
    import toy

    def router(*arguments):
        built = build(*arguments)
        built.routing = lambda logits, **kwargs: select(logits)
        return built

    build = toy._router
    stack.enter_context(mock.patch.object(toy, "_router", router))


@PATHS
def test_routing_of_an_instance(workers, fused):
    refused(workers, with_an_attribute, rf"did not act on MoE layer\(s\) 0, 1: TopKRouter.routing \(.*{FILE}", fused)


def set_after_a_step(a, handle):
    a.step()
    a.toy.blocks[1].router.routing = lambda logits, **kwargs: select(logits)
    a.step()


def test_routing_of_an_instance_set_later(workers):
    problem = Problem("global", 1, 2, 2)
    several.check(
        workers, set_after_a_step, problem, refused=rf"did not act on MoE layer\(s\) 1: TopKRouter.routing \(.*{FILE}"
    )


def replaced_class(stack):
    """As Primus does it by default."""
    from megatron.core.transformer.moe import router

    subclass = extended(router.TopKRouter)
    stack.enter_context(mock.patch.object(router, "TopKRouter", subclass))
    InAllLayers(lambda _: subclass)(stack)


def test_the_class_replaced_by_a_subclass_that_extends(workers):
    compare.check(Changed(workers, replaced_class), Problem("global", 2, 2, 2))


def end_without_a_model(a, handle):
    import megatron_global_lbl as lbl

    a.begin()
    a.micro_batch(0)
    a.end_without_finalize(lbl.end_step)


def ended_by_itself():
    """In a worker: a custom training loop."""
    with ExitStack() as stack:
        InAllLayers(own_routing)(stack)
        return several.run(end_without_a_model, (several.Spec(PROBLEM),), Layout(), {"scope": "global"}, True, ())


def test_a_loop_that_ends_its_steps_itself(workers):
    (result,) = workers.run(ended_by_itself, 1)
    assert "did not act on MoE layer(s) 0, 1: OwnRouting.routing" in str(result["refused"])


def other_router(stack):
    """A whole MoE layer whose router only has Megatron's interface."""
    import toy
    from megatron.core.transformer.moe.router import Router

    class Balanced(Router):
        def routing(self, logits):
            return select(logits)

        def forward(self, input, *args, **kwargs):
            return self.routing(self.gating(input))

    build = toy._moe_layer

    def layer(config, number, is_mtp):
        built = build(config, number, is_mtp)
        built.router = Balanced(config, *toy._process_groups(Router).values())
        return built

    stack.enter_context(mock.patch.object(toy, "_moe_layer", layer))


def test_a_router_that_is_no_topkrouter(workers):
    with pytest.raises(CaseFailed, match=r"cannot reach MoE layer 0: its router Balanced \(.*\.py\) is no TopKRouter"):
        workers.run(run, 1, other_router, None, PROBLEM, Layout(moe="layer"), {"scope": "global"})


class Diagnosed:
    """A change: the router diagnostics of Megatron-Core 0.20 are on, which read the scores of its losses."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, stack) -> None:
        from megatron.core import tensor_observation

        def observe(owner, name, kind, tensor, tp_shard_dim):
            self.seen.append(tensor.detach().clone())

        kinds = frozenset({"router_diagnostics"})
        stack.enter_context(tensor_observation.capture_tensor_observations(observe, kinds))


def diagnosed(fused, register):
    change = Diagnosed()
    run(change, fused, PROBLEM, Layout(), register)
    return change.seen


@pytest.mark.core
@pytest.mark.skipif(RELEASE < (0, 20), reason="router diagnostics came with Megatron-Core 0.20")
@PATHS
def test_router_diagnostics(workers, fused):
    (alone,) = workers.run(diagnosed, 1, fused, None)
    (seen,) = workers.run(diagnosed, 1, fused, {"scope": "global"})
    assert len(alone) == len(seen) == 4 and all(a.equal(b) and a.any() for a, b in zip(alone, seen))
    compare.check(Changed(workers, Diagnosed()), Problem("global", 2, 2, 2), fused=fused)
