"""A model with process groups of its own, in a process in which Megatron's `parallel_state` was never initialised."""

from __future__ import annotations

import numpy as np
import pytest
from several import Spec, check
from truth import Problem, sums

from megatron_global_lbl.metrics import read

SCOPES = ["dp", "global"]


def with_own_step_ends(a, handle):
    import megatron_global_lbl as lbl

    for _ in range(a.problem.steps):
        a.begin()
        for m in range(a.problem.micro_batches):
            a.micro_batch(m)
        a.end_without_finalize(lambda: lbl.end_step(a.chunks))


def with_megatrons_finalize(a, handle):
    """It takes a collection of process groups; Megatron's schedule would ask `parallel_state`."""
    for _ in range(a.problem.steps):
        a.begin()
        for m in range(a.problem.micro_batches):
            a.micro_batch(m)
        a.end()


@pytest.mark.parametrize("script", [with_own_step_ends, with_megatrons_finalize])
@pytest.mark.parametrize("scope", SCOPES)
def test_without_parallel_state(workers, tmp_path, scope, script):
    problem = Problem(scope, 2, 2, 4, masks="uneven", micro_coeff=0.003)
    register = {"scope": scope, "micro_coeff": 0.003}
    register["metrics_dir"] = str(tmp_path)
    check(workers, script, Spec(problem, groups="all"), register=register, initialize=False)
    (run,) = read(tmp_path)
    assert run.iterations.tolist() == list(range(1, problem.steps + 1)) and run.notes == []
    for step, load in enumerate(run.load(range(problem.steps))):
        counts = np.stack([C.sum(0).numpy() for C, _, _ in sums(problem, step)])
        np.testing.assert_allclose(load, counts / counts.mean(axis=1, keepdims=True), rtol=1e-3)  # float16
