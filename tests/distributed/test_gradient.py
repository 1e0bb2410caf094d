"""The heart: the gradient in `main_grad` equals the float64 formula, for every scope and setting (data parallelism)."""

from __future__ import annotations

import contextlib
import io

import harness
import pytest
from compare import check, register_arguments, run_ranks
from core_cases import RELEASE
from layout import Layout
from truth import Problem

SCOPES = ["dp", "global", "window"]


@pytest.mark.parametrize("masks", ["none", "uneven", "empty_rank", "ragged"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dp, micro_batches", [(1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize("scope", SCOPES)
def test_scopes(workers, scope, dp, micro_batches, per_token, masks):
    if masks == "empty_rank" and dp == 1:
        pytest.skip("with one rank and no valid token there is no gradient")
    steps = {"dp": 1, "global": 2, "window": 4}[scope]
    problem = Problem(scope, dp, micro_batches, steps, window_steps=2, per_token=per_token, masks=masks)
    check(workers, problem)


@pytest.mark.parametrize("scope", SCOPES)
def test_eight_micro_batches(workers, scope):
    check(workers, Problem(scope, 2, 8, 2))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_micro_coeff_is_added(workers, scope, per_token):
    problem = Problem(scope, 2, 3, 3, window_steps=2, per_token=per_token, masks="uneven", micro_coeff=0.005)
    check(workers, problem)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_group_size(workers, scope, group_size):
    check(workers, Problem(scope, 4, 2, 3, window_steps=2, masks="uneven", group_size=group_size))


@pytest.mark.parametrize("scope", SCOPES)
def test_start_iter_is_crossed(workers, scope):
    """Before it, Megatron's own loss; a window has been filling meanwhile. Even tokens: upstream's is right there."""
    check(workers, Problem(scope, 2, 3, 4, window_steps=8, start_iter=2))


@pytest.mark.parametrize("scope", SCOPES)
def test_batch_size_ramps_up(workers, scope):
    check(workers, Problem(scope, 2, 4, 4, window_steps=2, ramp_up=(1, 2), masks="uneven"))


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", SCOPES)
def test_blocking_gives_the_same_bits(workers, scope, recompute):
    problem, layout = Problem(scope, 4, 3, 2, masks="uneven"), Layout(recompute=recompute)
    results = [run_ranks(workers, problem, layout, register_arguments(problem) | {"sync": s}) for s in ("overlap", "blocking")]
    compared = 0
    for overlap, blocking in zip(*results):
        for step_a, step_b in zip(overlap["grads"], blocking["grads"], strict=True):
            for number in step_a:
                assert all(a.equal(b) for a, b in zip(step_a[number], step_b[number], strict=True))
                compared += 1
    assert compared == 4 * problem.steps * problem.layers


@pytest.mark.parametrize("scope", SCOPES)
def test_evaluation_between_steps_counts_nothing(workers, scope):
    check(workers, Problem(scope, 2, 2, 3), Layout(evaluate_between=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_skipped_step_leaves_nothing_behind(workers, scope):
    """Its gradients are not finite, so the optimizer skips it; in a window its selections count as any step's."""
    check(workers, Problem(scope, 2, 2, 3, window_steps=1, masks="uneven"), Layout(overflow_at=1))


@pytest.mark.parametrize("scope", ["global", "window"])
def test_upstreams_global_aux_loss_is_taken_over(workers, scope):
    """Same coefficient, same gradient as with `aux_loss`; upstream's own is `dp` times too weak."""
    if RELEASE < (0, 15):
        pytest.skip("global_aux_loss exists since 0.15")
    check(workers, Problem(scope, 4, 2, 2), load_balancing_type="global_aux_loss")


def what_is_printed(problem, layout, register, extra) -> str:
    """In a worker: the standard output of a training."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        harness.run(problem, layout, register, extra)
    return output.getvalue()


def test_register_says_once_what_taking_over_changes(workers):
    problem, extra = Problem("global", 2, 2, 2), {"load_balancing_type": "global_aux_loss"}
    printed = workers.run(what_is_printed, 2, problem, Layout(), {"scope": "global"}, extra)
    assert printed[0].count("global_aux_loss is taken over") == 1 and "rises by a factor of 2" in printed[0]
    assert printed[1] == ""
    assert workers.run(what_is_printed, 1, Problem("global", 1, 2), Layout(), {"scope": "global"}, {}) == [""]
