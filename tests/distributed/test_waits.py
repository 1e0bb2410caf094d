"""Where the training waits for the loss' collectives: never in a forward."""

from __future__ import annotations

from collections import Counter

import harness
import pytest
import several
from layout import Layout
from truth import Problem

LAYERS, MICRO_BATCHES, STEPS = 2, 3, 3
PROBLEM = Problem("global", 2, MICRO_BATCHES, STEPS, layers=LAYERS)


def recorded(problem, layout, register, extra):
    """In a worker. The all-reduces over several ranks."""
    from latency import Latency

    latency = Latency()
    with latency.installed():
        harness.run(problem, layout, register, extra)
    return latency.reduced


def reduced(problem, layout, register, extra):
    """In a worker. How many there are by (phase of the start, phase of the first wait)."""
    return Counter((entry.started, entry.waited) for entry in recorded(problem, layout, register, extra))


def of_the_loss(workers, register, recompute=None, **extra):
    """Beyond those of `aux_loss`, which has none over data-parallel ranks."""
    layout = Layout(recompute=recompute)
    ranks = workers.run(reduced, 2, PROBLEM, layout, register, extra)
    plain = workers.run(reduced, 2, PROBLEM, layout, None, {})
    assert all(counts == ranks[0] for counts in ranks)
    assert plain[0] and not any("forward" in phases for phases in plain[0])
    return ranks[0] - plain[0]


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_one_all_reduce_per_micro_batch_is_waited_for_in_the_backward(workers, scope, recompute):
    counts = of_the_loss(workers, {"scope": scope}, recompute)
    assert counts == {("forward", "backward"): MICRO_BATCHES * STEPS}


def test_metrics_wait_for_nothing_until_they_are_asked_for(workers):
    """Over data-parallel ranks; what TP x CP ranks sum at a step's end is waited for at the next, or by `Handle.remove`."""
    counts = of_the_loss(workers, {"scope": "global", "metrics": "detailed"})
    assert counts == {("forward", "backward"): MICRO_BATCHES * STEPS}
    problem = Problem("global", 1, MICRO_BATCHES, STEPS, layers=LAYERS)
    layout = Layout(tp=2)
    both = [workers.run(reduced, 2, problem, layout, {"scope": "global", **more}, {}) for more in ({}, {"metrics": "brief"})]
    assert both[1][0] - both[0][0] == {("step end", "step end"): STEPS}


def payloads(problem, layout, register, extra):
    """In a worker. Their bytes, by (phase of the start, phase of the first wait)."""
    found: dict[tuple, set[int]] = {}
    for entry in recorded(problem, layout, register, extra):
        found.setdefault((entry.started, entry.waited), set()).add(entry.payload)
    return found


def test_what_travels(workers):
    """As benchmarks/scaling_model.py has it."""
    import scaling_model as model

    experts = PROBLEM.experts
    for scope in ("dp", "global"):
        found = workers.run(payloads, 2, PROBLEM, Layout(), {"scope": scope}, {})[0]
        assert found["forward", "backward"] == {LAYERS * experts * model.BYTES}
    found = workers.run(payloads, 2, PROBLEM, Layout(), None, {"load_balancing_type": "global_aux_loss"})[0]
    assert experts * model.UPSTREAM_BYTES in found["forward", "forward"]


def left_under_way(problem, layout, register):
    """In a worker. A forward whose step never comes, before the registration is removed."""
    from latency import Latency

    latency = Latency()

    def script(a, handle):
        a.begin()
        latency.in_forward = True
        a.forward(0)
        latency.in_forward = False

    with latency.installed():
        several.run(script, (several.Spec(problem),), layout, register, True, ())
    return Counter((entry.started, entry.waited) for entry in latency.reduced)


def test_nothing_is_left_under_way(workers):
    """Over TP x CP for the share of a micro-batch loss, and over the stage."""
    problem = Problem("global", 1, 1, 1, layers=LAYERS, micro_coeff=0.003)
    for counts in workers.run(left_under_way, 2, problem, Layout(tp=2), {"scope": "global", "micro_coeff": 0.003}):
        assert counts == {("forward", "step end"): 2}
