"""The heart: the gradient in `main_grad` equals the float64 formula, to 1e-5 relative in fp32."""

from __future__ import annotations

import harness
import pytest
import truth
from harness import Layout
from truth import Problem

RELATIVE_ERROR = 1e-5


def register_arguments(problem: Problem) -> dict:
    arguments = {"scope": problem.scope, "group_size": problem.group_size}
    arguments |= {"micro_coeff": problem.micro_coeff, "start_iter": problem.start_iter}
    if problem.scope == "window":
        arguments["window_steps"] = problem.window_steps
    return arguments


def relative_error(actual, expected) -> float:
    expected_norm = expected.norm()
    difference = (actual.double() - expected).norm()
    return float(difference / expected_norm) if expected_norm > 0 else float(difference)


def check(workers, problem: Problem, layout: Layout = Layout(), sync: str = "overlap", **extra) -> None:
    """Every layer's gradients on every rank, every step, against the truth."""
    expected = truth.gradients(problem)
    arguments = register_arguments(problem) | {"sync": sync}
    ranks = workers.run(harness.run, layout.world_size(problem), problem, layout, arguments, extra)
    compared = 0
    for rank, result in enumerate(ranks):
        for step, by_layer in enumerate(result["grads"]):
            for number, pair in by_layer.items():
                for name, actual, true in zip(("below", "router"), pair, expected[step][number - 1]):
                    error = relative_error(actual, true)
                    assert error <= RELATIVE_ERROR, f"rank {rank} step {step} layer {number} {name}: {error:.2e}"
                    compared += int(true.norm() > 0)
    assert compared >= problem.layers, "nothing but zero gradients was compared"


@pytest.mark.parametrize("masks", ["none", "uneven", "empty_rank"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3, 4])
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_scopes(workers, scope, dp, micro_batches, per_token, masks):
    if masks == "empty_rank" and dp == 1:
        pytest.skip("with one rank and no valid token there is no gradient")
    steps = {"dp": 1, "global": 2, "window": 4}[scope]
    problem = Problem(scope, dp, micro_batches, steps, window_steps=2, per_token=per_token, masks=masks)
    check(workers, problem)
