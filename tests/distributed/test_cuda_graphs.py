"""A router in a CUDA graph: what its replay must do without Python. The capture flag is faked and the graph recorded on the
CPU (recorded_graph.py); tests/gpu has the same with real graphs."""

from __future__ import annotations

import pytest
import truth
from captured import train_captured
from compare import compare_exact, register_arguments
from truth import Problem
from workers import CaseFailed


@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_replay_counts_and_gives_the_gradient(workers, scope):
    problem = Problem(scope, 2, 3, 4, layers=1, window_steps=2)
    ranks = workers.run(train_captured, 2, problem, register_arguments(problem))
    expected = truth.gradients(problem)
    for result in ranks:
        assert result["collectives"] == (scope != "window"), "the collective belongs into the captured forward"
        assert result["logged"] > 0.9 * (problem.steps - (scope == "window")), "the replays' losses are not in the log"
        for step, actual in enumerate(result["grads"]):
            compare_exact(actual, expected[step][0][1], f"step {step}")
    assert expected[-1][0][1].norm() > 0


@pytest.mark.parametrize("option", [{"metrics": "brief"}, {"start_iter": 1}])
def test_what_needs_python_in_every_forward_is_refused(workers, option):
    problem = Problem("global", 1, 1, layers=1)
    with pytest.raises(CaseFailed, match="not supported with CUDA graphs"):
        workers.run(train_captured, 1, problem, {"scope": "global", **option})
