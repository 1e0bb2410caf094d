"""Steps that come to nothing, and forwards that are not trained on: the next step is right, or an error says why not."""

from __future__ import annotations

import pytest
import torch
from layout import Layout
from several import LOST, check
from truth import Problem

SCOPES = ["dp", "global"]
RECOMPUTE = [None, "full"]


def problem(scope: str, steps: int, dp: int = 2) -> Problem:
    return Problem(scope, dp, 3, steps, masks="uneven", micro_coeff=0.003)


def unfinished(model) -> None:
    """Forwards and backwards of a step, without its end."""
    model.begin(LOST)
    for m in range(model.problem.micro_batches):
        model.micro_batch(m)


def with_interruptions(a, where, handle):
    for _ in range(2):
        a.interrupted(where)
        a.step()
        a.step()


@pytest.mark.parametrize("where", ["between", "forward", "backward"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("scope", ["global"])
def test_a_step_that_raised(workers, scope, recompute, where):
    """On all ranks, between two micro-batches or within a forward or backward; training goes on with the next step."""
    check(workers, with_interruptions, problem(scope, 4), layout=Layout(recompute=recompute), args=(where,))


def every_other_step_unfinished(a, handle):
    for _ in range(3):
        unfinished(a)
        a.step()


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_without_an_end(workers, scope, recompute):
    check(workers, every_other_step_unfinished, problem(scope, 3), layout=Layout(recompute=recompute))


def one_unfinished(a, handle):
    unfinished(a)
    a.step()


def test_dropping_a_step_is_said_by_one_rank(workers):
    ranks = check(workers, one_unfinished, problem("global", 1))
    assert [rank["printed"].count("their counts are dropped") for rank in ranks] == [1, 0]


def two_unfinished_in_a_row(a, handle):
    a.step()
    unfinished(a)
    unfinished(a)
    a.step()


NAMES_BOTH_ENDS = r"(?s)(?=.*finalize_model_grads)(?=.*end_step)"


@pytest.mark.parametrize("scope", SCOPES)
def test_two_steps_in_a_row_without_an_end(workers, scope):
    check(workers, two_unfinished_in_a_row, problem(scope, 2), refused=NAMES_BOTH_ENDS)


def stray_before_the_step(a, handle):
    for _ in range(3):
        a.load(LOST)
        a.toy.train()
        a.forward(0)
        a.forward(1)
        a.step()


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("scope", SCOPES)
def test_forwards_never_trained_on_before_a_step(workers, scope, recompute):
    check(workers, stray_before_the_step, problem(scope, 3), layout=Layout(recompute=recompute))


def stray_within_a_step(a, at, handle):
    a.step()
    a.begin()
    for m in range(a.problem.micro_batches):
        if m == at:
            a.forward(0)
        a.micro_batch(m)
    if at == a.problem.micro_batches:
        a.forward(0)
    a.end()


@pytest.mark.parametrize("at, recompute", [(0, None), (1, "full"), (3, None)])
@pytest.mark.parametrize("scope", SCOPES)
def test_forwards_never_trained_on_within_a_step(workers, scope, recompute, at):
    """With gradients, so nobody can know it before the step's end: before, between and after its micro-batches."""
    layout = Layout(recompute=recompute)
    check(
        workers,
        stray_within_a_step,
        problem(scope, 2),
        layout=layout,
        refused=r"(?s)(?=.*no_grad\(\))(?=.*eval\(\))",
        args=(at,),
    )


def quiet_forwards_within(a, handle):
    for _ in range(a.problem.steps):
        a.begin()
        for m in range(a.problem.micro_batches):
            output = a.forward(m)
            with torch.no_grad():
                a.forward(0)
            a.backward(output)
            with torch.no_grad():
                a.forward(1)
        a.end()


@pytest.mark.parametrize("recompute", [None, "full", "selective", "nested"])
@pytest.mark.parametrize("scope", SCOPES)
def test_training_mode_forwards_under_no_grad(workers, scope, recompute):
    """As for log-probabilities; with recomputation, too, whose first forwards are without gradients as well."""
    check(workers, quiet_forwards_within, problem(scope, 3), layout=Layout(recompute=recompute))


def backward_after_the_registration(a, register):
    import megatron_global_lbl as lbl

    a.begin()
    with lbl.registered(**register):
        output = a.forward(0)
    a.backward(output)


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", SCOPES)
def test_registered_around_the_forward_only(workers, scope, recompute):
    one = Problem(scope, 2, 1)
    arguments = {"scope": scope}
    says = r"(?is)(?=.*regist)(?=.*step)"
    layout = Layout(recompute=recompute)
    check(workers, backward_after_the_registration, one, layout=layout, register={}, refused=says, args=(arguments,))
