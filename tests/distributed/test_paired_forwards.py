"""Two forwards of a layer before the backward of both, as in DPO (chosen and rejected), and checkpoints within checkpoints."""

from __future__ import annotations

import compare
import pytest
from layout import Layout
from several import check
from truth import Problem

SCOPES = ["dp", "global"]
RECOMPUTE = [None, "full", "selective", "nested"]


def chosen_and_rejected(a, order, handle):
    for _ in range(a.problem.steps):
        a.begin()
        for m in range(0, a.problem.micro_batches, 2):
            chosen, rejected = a.forward(m), a.forward(m + 1)
            if order == "together":
                a.backward(chosen, rejected)
            else:
                for output in (chosen, rejected) if order == "chosen first" else (rejected, chosen):
                    a.backward(output)
        a.end()


def pairs(scope: str, **options) -> Problem:
    """Two pairs per step; every sequence has a length of its own."""
    return Problem(scope, 2, 4, 3, masks="ragged", together=2, **options)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("scope", SCOPES)
def test_one_backward_of_both(workers, scope, recompute):
    problem = pairs(scope, micro_coeff=0.003)
    check(workers, chosen_and_rejected, problem, layout=Layout(recompute=recompute), args=("together",))


@pytest.mark.parametrize("order, recompute", [("chosen first", "full"), ("rejected first", None), ("rejected first", "full")])
@pytest.mark.parametrize("scope", SCOPES)
def test_one_backward_after_the_other(workers, scope, order, recompute):
    check(workers, chosen_and_rejected, pairs(scope), layout=Layout(recompute=recompute), args=(order,))


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", SCOPES)
def test_per_token_loss(workers, scope, recompute):
    problem = pairs(scope, micro_coeff=0.003, per_token=True)
    check(workers, chosen_and_rejected, problem, layout=Layout(recompute=recompute), args=("together",))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_checkpoint_within_a_checkpoint(workers, scope):
    """In Megatron's own schedule, one forward per backward."""
    problem = Problem(scope, 2, 3, 3, masks="uneven", micro_coeff=0.003)
    compare.check(workers, problem, Layout(recompute="nested"))
