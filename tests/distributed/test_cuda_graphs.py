"""A router in a CUDA graph: what its replay must do without Python. The capture flag is faked and the graph recorded on the
CPU (recorded_graph.py); tests/gpu has the same with real graphs."""

from __future__ import annotations

import pytest
import truth
from captured import train_captured
from compare import compare_exact, register_arguments
from core_cases import RELEASE
from test_balance_record import expected
from truth import Problem, sums
from workers import CaseFailed


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_replay_counts_and_gives_the_gradient(workers, scope):
    problem = Problem(scope, 2, 3, 4, layers=1)
    ranks = workers.run(train_captured, 2, problem, register_arguments(problem))
    true = truth.gradients(problem)
    for result in ranks:
        assert not result["collectives"]
        assert result["logged"] > 0.9 * problem.steps, "the replays' losses are not in the log"
        for step, actual in enumerate(result["grads"]):
            compare_exact(actual, true[step][0][1], f"step {step}")
    assert true[-1][0][1].norm() > 0


def test_start_iter_is_refused(workers):
    """A replay cannot change the loss."""
    problem = Problem("global", 1, 1, layers=1)
    with pytest.raises(CaseFailed, match="--moe-lbl-start-iter 1 does not work with CUDA graphs of the router"):
        workers.run(train_captured, 1, problem, {"scope": "global", "start_iter": 1})


def test_metrics_see_replays(workers):
    problem = Problem("global", 2, 3, 3, layers=1)
    ranks = workers.run(train_captured, 2, problem, {"scope": "global", "metrics": "detailed"})
    of_steps = [expected(problem, step, "global") for step in range(problem.steps)]
    (load_E,) = sum(C.sum(0) for step in range(problem.steps) for C, _, _ in sums(problem, step)).unsqueeze(0)
    for result in ranks:
        told = result["metrics"]
        assert told["moe_lbl/max_vio"] == pytest.approx(float(load_E.max() / load_E.mean()) - 1, rel=1e-5)
        assert told["moe_lbl/lbl_micro"] == pytest.approx(sum(step["lbl_micro"][0] for step in of_steps) / 3, rel=1e-5)
        assert told["moe_lbl/balance_sequences"] == pytest.approx(of_steps[0]["balance"][0])


@pytest.mark.skipif(RELEASE < (0, 15), reason="combined 1F1B came with Megatron-Core 0.15")
def test_combined_1f1b_is_refused(workers):
    """It runs layers outside of the chunk's forward, so nothing would give the replays their gradient."""
    problem = Problem("global", 1, 1, layers=1)
    with pytest.raises(CaseFailed, match="layer 0 is captured in a CUDA graph .* with --overlap-moe-expert-parallel-comm"):
        workers.run(train_captured, 1, problem, {"scope": "global"}, False, None, True)
