"""Megatron's full-iteration CUDA graphs: forwards, backwards and `finalize_model_grads` replayed without Python. The graph is
recorded on the CPU (recorded_graph.py); tests/gpu has the same with a real one."""

from __future__ import annotations

from collections import Counter

import pytest
import several
from compare import register_arguments
from core_cases import RELEASE
from faked_graph import FakedGraph
from latency import Latency
from layout import Layout
from truth import Problem, sums
from whole_iterations import WARM_UP, check, train
from workers import CaseFailed

STEPS = WARM_UP + 3


@pytest.mark.parametrize(
    "scope, layout, per_token",
    [
        ("dp", Layout(), False),
        ("dp", Layout(recompute="full"), True),
        ("global", Layout(), True),
        ("global", Layout(tp=2), False),
        ("global", Layout(recompute="full"), False),
    ],
    ids=str,
)
def test_replays_give_the_gradient_and_the_log(workers, scope, layout, per_token):
    if per_token and RELEASE < (0, 18):
        pytest.skip("before Megatron-Core 0.18 finalize_model_grads asks for the number of tokens on the host")
    # Before 0.16 routers take no mask, and a graph takes no sequences of other lengths.
    masks = "uneven" if RELEASE >= (0, 16) else "none"
    problem = Problem(scope, 2, 3, STEPS, per_token=per_token, micro_coeff=0.003, masks=masks)
    check(workers.run(train, layout.world_size(problem), problem, layout, register_arguments(problem)), problem)


def test_metrics_see_replays(workers):
    problem = Problem("global", 2, 3, STEPS)
    ranks = workers.run(train, 2, problem, Layout(), {"scope": "global", "metrics": "brief"})
    check(ranks, problem)
    of_layers = zip(*(sums(problem, step) for step in range(STEPS)))
    loads = [sum(C.sum(0) for C, _, _ in of_steps) for of_steps in of_layers]
    for result in ranks:
        worst = max(float(load_E.max() / load_E.mean()) - 1 for load_E in loads)
        assert result["metrics"]["moe_lbl/max_vio_worst"] == pytest.approx(worst, rel=1e-5)
        assert result["metrics"]["moe_lbl/balance_sequences"] == 2 * problem.batch * problem.dp  # of 1, 2 and 3 micro-batches


@pytest.mark.skipif(RELEASE < (0, 18), reason="a paged stash exists since Megatron-Core 0.18")
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_an_attempt_that_a_paged_stash_gives_up(workers, scope):
    """A replay overflows, its step runs again in Python, and so do the next until the graph is captured anew."""
    problem = Problem(scope, 2, 2, STEPS + WARM_UP + 2, masks="uneven")
    check(workers.run(train, 2, problem, Layout(), register_arguments(problem), STEPS - 1), problem)


class _Phases(Latency):
    """Tells whether a phase is captured, too."""

    def phase(self) -> str:
        return FakedGraph.capturing * "captured " + super().phase()


def reduced(problem, layout, register, extra):
    """In a worker: all-reduces by (phase of the start, phase of the first wait)."""
    latency = _Phases()
    with latency.installed():
        train(problem, layout, register, extra=extra)
    return Counter((entry.started, entry.waited) for entry in latency.reduced if "forward" in entry.started)


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_the_graph_waits_where_the_counts_are_used(workers, scope):
    """In the backward, as without a graph; with coefficient 0 nobody uses them, and the graph waits at its end."""
    problem = Problem(scope, 2, 3, STEPS)
    for coefficient, waited in ((0.02, "backward"), (0.0, "step end")):
        ranks = workers.run(reduced, 2, problem, Layout(), {"scope": scope}, {"aux_loss_coeff": coefficient})
        forwards = problem.micro_batches
        captured = ("captured forward", f"captured {waited}")
        assert ranks[0] == {("forward", waited): forwards * WARM_UP, captured: forwards}


def test_what_needs_python_in_every_step_is_refused(workers):
    """Also without Megatron's arguments; and a graph in which the loss would be made."""
    problem = Problem("global", 1, 1, STEPS)
    with pytest.raises(CaseFailed, match="--moe-lbl-start-iter 1 does not work with CUDA graphs"):
        workers.run(train, 1, problem, Layout(), {"scope": "global", "start_iter": 1})
    with pytest.raises(
        CaseFailed, match="layer 0 runs for the first time while a CUDA graph is captured: run a training step.*warmup"
    ):
        workers.run(train, 1, problem, Layout(), {"scope": "global"}, None, {}, 0)


def captures_its_steps_itself(a, handle):
    a.step()
    with FakedGraph():
        a.step()


def test_a_step_end_in_somebody_elses_graph_is_refused(workers):
    problem = Problem("global", 1, 1, 2)
    several.check(workers, captures_its_steps_itself, problem, refused="the step's end is captured .*: use Megatron's Full")
