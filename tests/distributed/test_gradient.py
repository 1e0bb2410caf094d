"""The heart: the gradient in `main_grad` equals the float64 formula, for every scope and setting (data parallelism)."""

from __future__ import annotations

import contextlib
import io

import harness
import pytest
from compare import check
from core_cases import RELEASE
from layout import Layout
from truth import Problem

SCOPES = ["dp", "global"]


@pytest.mark.parametrize("masks", ["none", "uneven", "empty_rank", "ragged"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dp, micro_batches", [(1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize("scope", SCOPES)
def test_scopes(workers, scope, dp, micro_batches, per_token, masks):
    if masks == "empty_rank" and dp == 1:
        pytest.skip("with one rank and no valid token there is no gradient")
    steps = {"dp": 1, "global": 2}[scope]
    problem = Problem(scope, dp, micro_batches, steps, per_token=per_token, masks=masks)
    check(workers, problem)


@pytest.mark.parametrize("scope", SCOPES)
def test_eight_micro_batches(workers, scope):
    check(workers, Problem(scope, 2, 8, 2))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_micro_coeff_is_added(workers, scope, per_token):
    problem = Problem(scope, 2, 3, 3, per_token=per_token, masks="uneven", micro_coeff=0.005)
    check(workers, problem)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_group_size(workers, scope, group_size):
    check(workers, Problem(scope, 4, 2, 3, masks="uneven", group_size=group_size))


@pytest.mark.parametrize("scope", SCOPES)
def test_start_iter_is_crossed(workers, scope):
    """Before it, Megatron's own loss. Even tokens: upstream's is right there."""
    check(workers, Problem(scope, 2, 3, 4, start_iter=2))


@pytest.mark.parametrize("scope", SCOPES)
def test_batch_size_ramps_up(workers, scope):
    check(workers, Problem(scope, 2, 4, 4, ramp_up=(1, 2), masks="uneven"))


@pytest.mark.parametrize("scope", SCOPES)
def test_evaluation_between_steps_counts_nothing(workers, scope):
    check(workers, Problem(scope, 2, 2, 3), Layout(evaluate_between=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_skipped_step_leaves_nothing_behind(workers, scope):
    """Its gradients are not finite, so the optimizer skips it."""
    check(workers, Problem(scope, 2, 2, 3, masks="uneven"), Layout(overflow_at=1))


@pytest.mark.parametrize("scope", ["global"])
def test_upstreams_global_aux_loss_is_replaced(workers, scope):
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


def test_what_replacing_it_changes_is_logged_once(workers):
    problem, extra = Problem("global", 2, 2, 2), {"load_balancing_type": "global_aux_loss"}
    printed = workers.run(what_is_printed, 2, problem, Layout(), {"scope": "global"}, extra)
    assert printed[0].count("global_aux_loss is replaced") == 1 and "rises by a factor of 2" in printed[0]
    assert printed[1] == ""
    (plain,) = workers.run(what_is_printed, 1, Problem("global", 1, 2), Layout(), {"scope": "global"}, {})
    assert "global_aux_loss" not in plain
