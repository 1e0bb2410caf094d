"""The load-balancing loss in Megatron's log, read through Megatron's own tracker, against the formula in float64."""

from __future__ import annotations

import pytest
from layout import Layout
from logged import logged, of_the_log
from truth import Problem


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(cp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_logged_value(workers, scope, layout, per_token):
    dp = 4 // (layout.tp * layout.cp * layout.pp)
    problem = Problem(scope, dp, 3, 3, masks="uneven", per_token=per_token, pipeline=(layout.pp, 1))
    value = logged(workers, problem, layout, {"scope": scope}, {})
    assert value["load_balancing_loss"] == pytest.approx(of_the_log(problem), rel=1e-5)
