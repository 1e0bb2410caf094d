"""The same gradient in `main_grad` with the Triton kernels of core/fused, which Triton's interpreter runs on the CPU."""

from __future__ import annotations

import pytest
from compare import check
from layout import Layout
from truth import Problem

SCOPES = ["dp", "global"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_fused_kernels(workers, scope, per_token):
    problem = Problem(scope, 2, 2, 3, per_token=per_token, masks="uneven", micro_coeff=0.005 * per_token)
    check(workers, problem, fused=True)


@pytest.mark.parametrize("scope", SCOPES)
def test_fused_kernels_recomputed_in_a_pipeline(workers, scope):
    problem = Problem(scope, 1, 3, 2, masks="uneven", score="sigmoid", experts=6)
    check(workers, problem, Layout(pp=2, recompute="full"), fused=True)
