"""The heart: the gradient in `main_grad` equals the float64 formula, to 1e-5 relative in fp32."""

from __future__ import annotations

import dataclasses

import harness
import pytest
import truth
from harness import Layout
from truth import Problem

RELATIVE_ERROR = 1e-5
DATA_PARALLEL = Layout()


def register_arguments(problem: Problem) -> dict:
    arguments = {"scope": problem.scope, "group_size": problem.group_size}
    arguments |= {"micro_coeff": problem.micro_coeff, "start_iter": problem.start_iter}
    if problem.scope == "window":
        arguments["window_steps"] = problem.window_steps
    return arguments


def relative_error(actual, expected) -> float:
    expected_norm = expected.norm()
    difference = (actual.double() - expected).norm()
    return float(difference / expected_norm) if expected_norm > 0 else float(difference)


def check(workers, problem: Problem, layout: Layout = DATA_PARALLEL, sync: str = "overlap", **extra) -> None:
    """Every layer's gradients on every rank, every step, against the truth."""
    expected = truth.gradients(problem)
    arguments = register_arguments(problem) | {"sync": sync}
    ranks = workers.run(harness.run, layout.world_size(problem), problem, layout, arguments, extra)
    compared = 0
    for rank, result in enumerate(ranks):
        for step, by_layer in enumerate(result["grads"]):
            for number, pair in by_layer.items():
                for name, actual, true in zip(("below", "router"), pair, expected[step][number - 1]):
                    error = relative_error(actual, true)
                    assert error <= RELATIVE_ERROR, f"rank {rank} step {step} layer {number} {name}: {error:.2e}"
                    compared += int(true.norm() > 0)
    assert compared >= problem.layers, "nothing but zero gradients was compared"


@pytest.mark.parametrize("masks", ["none", "uneven", "empty_rank"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3, 4])
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_scopes(workers, scope, dp, micro_batches, per_token, masks):
    if masks == "empty_rank" and dp == 1:
        pytest.skip("with one rank and no valid token there is no gradient")
    steps = {"dp": 1, "global": 2, "window": 4}[scope]
    problem = Problem(scope, dp, micro_batches, steps, window_steps=2, per_token=per_token, masks=masks)
    check(workers, problem)


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
@pytest.mark.parametrize("per_token", [False, True])
def test_micro_coeff_is_added(workers, scope, per_token):
    problem = Problem(scope, 2, 3, 3, window_steps=2, per_token=per_token, masks="uneven", micro_coeff=0.005)
    check(workers, problem)


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_group_size(workers, scope, group_size):
    check(workers, Problem(scope, 4, 2, 3, window_steps=2, masks="uneven", group_size=group_size))


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_start_iter_is_crossed(workers, scope):
    """Before it, Megatron's own loss; a window has been filling meanwhile. Even tokens: upstream's is right there."""
    check(workers, Problem(scope, 2, 3, 4, window_steps=8, start_iter=2))


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_blocking_gives_the_same_bits(workers, scope):
    problem = Problem(scope, 4, 3, 2, masks="uneven")
    results = [
        workers.run(harness.run, 4, problem, DATA_PARALLEL, register_arguments(problem) | {"sync": sync})
        for sync in ("overlap", "blocking")
    ]
    for overlap, blocking in zip(*results):
        assert str(overlap["grads"]) == str(blocking["grads"])
        for step_a, step_b in zip(overlap["grads"], blocking["grads"]):
            for number in step_a:
                assert all(a.equal(b) for a, b in zip(step_a[number], step_b[number]))


@pytest.mark.parametrize("score, bias", [("softmax", False), ("sigmoid", False), ("sigmoid", True)])
@pytest.mark.parametrize("scope", ["global", "window"])
def test_scores_and_expert_bias(workers, scope, score, bias):
    """f counts what the router selected, the expert bias included; the gradient flows through the unbiased scores."""
    check(workers, Problem(scope, 2, 2, 2, score=score, bias=bias))


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_evaluation_between_steps_counts_nothing(workers, scope):
    check(workers, Problem(scope, 2, 2, 3), evaluate_between=True)


@pytest.mark.parametrize("scope", ["global", "window"])
def test_upstreams_global_aux_loss_is_taken_over(workers, scope):
    """Same coefficient, same gradient as with `aux_loss`; upstream's own is `dp` times too weak."""
    check(workers, Problem(scope, 4, 2, 2), load_balancing_type="global_aux_loss")


@pytest.mark.parametrize("loss_scale", [1024.0])
def test_loss_scale(workers, loss_scale):
    check(workers, Problem("global", 2, 2), Layout(loss_scale=loss_scale))


def pipelined(problem: Problem, stages: int) -> Problem:
    """1F1B: when stage s runs the backward of m, it has run min(stages - 1 - s, M) more forwards than m + 1."""
    per_stage, M = problem.layers // stages, problem.micro_batches
    seen = tuple(
        tuple(tuple(range(min(M, stages - layer // per_stage + m))) for m in range(M)) for layer in range(problem.layers)
    )
    return dataclasses.replace(problem, seen=seen)


@pytest.mark.parametrize("masks, per_token", [("none", False), ("uneven", False), ("uneven", True)])
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(cp=2), Layout(pp=2), Layout(tp=2, cp=2), Layout(tp=2, pp=2), Layout(cp=2, pp=2)],
    ids=lambda layout: f"tp{layout.tp}cp{layout.cp}pp{layout.pp}",
)
@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_layouts(workers, scope, layout, masks, per_token):
    dp = 4 // (layout.tp * layout.cp * layout.pp)
    problem = Problem(scope, dp, 3, 2, masks=masks, per_token=per_token, micro_coeff=0.003)
    check(workers, pipelined(problem, layout.pp) if layout.pp > 1 else problem, layout)


def test_overlap_grad_reduce(workers):
    check(workers, Problem("global", 2, 3), Layout(overlap_grad_reduce=True))
