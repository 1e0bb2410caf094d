"""The load-balancing loss in Megatron's log, read through Megatron's own tracker, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import truth
from layout import Layout
from logged import logged
from truth import Problem


def of_the_log(problem: Problem) -> float:
    """Mean over layers of the LBL with alpha = 1, summed over steps, as Megatron's tracker sums until it is read.

    "dp" and "window": the mean over micro-batches of what the gradient is of. "global": f and p of the whole step.
    """
    sums = [truth.sums(problem, step) for step in range(problem.steps)]
    value = 0.0
    for step in range(problem.steps):
        for layer, (selections_ME, scores_ME, tokens_M) in enumerate(sums[step]):
            if problem.scope == "global":
                selections_ME, scores_ME, tokens_M = (t.sum(0, keepdim=True) for t in (selections_ME, scores_ME, tokens_M))
            elif problem.scope == "window":
                past = [layers[layer] for layers in sums[max(0, step - problem.window_steps) : step]]
                if not past:
                    continue  # f is uniform: no gradient, and 0 in the log
                selections_ME = torch.stack([selections for selections, _, _ in past]).sum((0, 1)).unsqueeze(0)
                tokens_M = torch.stack([tokens for _, _, tokens in past]).mean()
            f_ME = selections_ME / selections_ME.sum(-1, keepdim=True)
            value += problem.experts * float((f_ME * scores_ME).sum(-1).div(tokens_M).mean())
    return value / problem.layers


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(cp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_logged_value(workers, scope, layout, per_token):
    dp = 4 // (layout.tp * layout.cp * layout.pp)
    problem = Problem(scope, dp, 3, 3, window_steps=2, masks="uneven", per_token=per_token, pipeline=(layout.pp, 1))
    value = logged(workers, problem, layout, {"scope": scope, **({"window_steps": 2} if scope == "window" else {})}, {})
    assert value["load_balancing_loss"] == pytest.approx(of_the_log(problem), rel=1e-5)
