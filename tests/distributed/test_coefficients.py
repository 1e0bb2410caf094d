"""A coefficient that changes while training: the gradient follows from the next forward on."""

from __future__ import annotations

import pytest
from layout import Layout
from several import Spec, check
from truth import Problem

SCOPES = ["dp", "global"]
CHANGES = [(0.1, 0.1, 0.01, 0.01), (0.0, 0.1, 0.1), (0.1, 0.0, 0.1, 0.1), (0.0, 0.0, 0.0, 0.1)]


def problem(scope: str, coeffs: tuple) -> Problem:
    return Problem(scope, 2, 3, len(coeffs), masks="uneven", coeffs=coeffs)


def change_by_step(a, handle):
    for step in range(a.problem.steps):
        a.config.moe_aux_loss_coeff = a.problem.coeff_at(step, 0)
        a.step()


@pytest.mark.parametrize("scope, recompute", [("dp", None), ("global", None), ("global", "full")])
@pytest.mark.parametrize("coeffs", CHANGES, ids=str)
def test_between_steps(workers, scope, coeffs, recompute):
    spec = Spec(problem(scope, coeffs), extra={"aux_loss_coeff": coeffs[0]})
    check(workers, change_by_step, spec, layout=Layout(recompute=recompute))


def change_in_a_list(a, in_place, handle):
    for step in range(a.problem.steps):
        if in_place:
            a.config.moe_aux_loss_coeff[0] = a.problem.coeff_at(step, 0)
        else:
            a.config.moe_aux_loss_coeff = [a.problem.coeff_at(step, 0), 0.0]
        a.step()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_several_kinds_of_balancing(workers, scope, in_place):
    """`moe_router_load_balancing_type` as a list, and its coefficients as one."""
    coeffs = (0.1, 0.0, 0.1, 0.01)
    extra = {"load_balancing_type": ["aux_loss", "seq_aux_loss"], "aux_loss_coeff": [coeffs[0], 0.0]}
    check(workers, change_in_a_list, Spec(problem(scope, coeffs), extra=extra), args=(in_place,))


def change_within_a_step(a, handle):
    for step in range(a.problem.steps):
        a.begin()
        a.config.moe_aux_loss_coeff = a.problem.coeff_at(step, 0)
        for m in range(a.problem.micro_batches):
            output = a.forward(m)
            a.config.moe_aux_loss_coeff = a.problem.coeff_at(step, min(m + 1, a.problem.micro_batches - 1))
            a.backward(output)
        a.end()


@pytest.mark.parametrize("scope", SCOPES)
def test_between_a_forward_and_its_backward(workers, scope):
    """The forward's coefficient holds for its micro-batch."""
    coeffs = ((0.1, 0.1, 0.01), (0.05, 0.0, 0.02), (0.0, 0.1, 0.0))
    check(workers, change_within_a_step, Spec(problem(scope, coeffs), extra={"aux_loss_coeff": 0.1}))
