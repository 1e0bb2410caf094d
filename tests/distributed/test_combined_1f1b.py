"""Combined 1F1B (`--overlap-moe-expert-parallel-comm`): a forward runs together with another micro-batch's backward, layer by
layer. Megatron's own schedule and plan, with expert parallelism; the layers are the toy's (schedule_plan.py)."""

from __future__ import annotations

import dataclasses

import pytest
from compare import check
from core_cases import RELEASE
from layout import Layout
from test_counters import counted_tokens
from truth import Problem

pytestmark = pytest.mark.skipif(RELEASE < (0, 19), reason="the toy has the names of Megatron-Core 0.19's schedule plan")
COMBINED = Layout(moe="layer", ep=2, combined=True, config={"moe_token_dispatcher_type": "alltoall"})
INTERLEAVED = dataclasses.replace(COMBINED, pp=2, chunks=2)


@pytest.mark.parametrize("scope, per_token", [("dp", False), ("global", True)])
def test_gradient(workers, scope, per_token):
    problem = Problem(scope, 2, 4, 2, micro_coeff=0.003, layers=3, per_token=per_token)
    check(workers, problem, COMBINED)


def test_gradient_with_pipeline_parallelism(workers):
    check(workers, Problem("global", 2, 4, 2, micro_coeff=0.003, layers=8), INTERLEAVED)


# By layer: the micro-batches that f holds in the backward of micro-batch 0, 1, 2, 3. Together with that backward runs the next
# forward, from the first layer on, while the backward comes from the last: they meet in the middle.
NEXT = [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}]
OWN = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]


@pytest.mark.parametrize("layers, expected", [(3, [OWN] * 3), (4, [OWN] * 4)])
def test_micro_batches_in_f(workers, layers, expected):
    """Micro-batch m has 2^m valid tokens per rank, so the number of tokens in f tells which micro-batches it holds."""
    problem = Problem("global", 2, 4, layers=layers, seq=8, batch=1, masks="powers", combined=True)
    for of_rank in workers.run(counted_tokens, 2, problem, COMBINED, {"scope": "global"}):
        for number in range(1, layers + 1):
            seen = [{m for m in range(4) if tokens // problem.dp >> m & 1} for tokens in of_rank[str(number - 1)]]
            assert seen[:4] == expected[number - 1] == problem.seen(0, number), f"layer {number}"
