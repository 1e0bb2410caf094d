"""Two models in one process: each has the gradient that it would have alone, however their steps are entangled."""

from __future__ import annotations

import pytest
from several import Spec, check
from truth import Problem

SCOPES = ["dp", "global"]


def two(scope: str, *, a: int = 4, b: int = 4, **options) -> tuple[Problem, Problem]:
    """Problems of two models that make `a` and `b` steps."""
    first = Problem(scope, 2, 2, a, masks="uneven", **options)
    return first, Problem(scope, 2, 3, b, masks="uneven", seed=99, **options)


def in_turn(a, b, pattern, handle):
    for name in pattern:
        {"A": a, "B": b}[name].step()


@pytest.mark.parametrize("pattern", ["ABABABAB", "AABAABAABAAB", "AAABABAB"])
@pytest.mark.parametrize("scope", SCOPES)
def test_trained_in_turn(workers, scope, pattern):
    check(workers, in_turn, *two(scope, a=pattern.count("A"), b=pattern.count("B")), args=(pattern,))


def a_finalized_before_bs_backward(a, b, handle):
    for _ in range(4):
        a.begin()
        b.begin()
        for m in range(1):
            a.micro_batch(m)
        for m in range(2):
            b.micro_batch(m)
        of_a, of_b = a.forward(1), b.forward(2)
        a.backward(of_a)
        a.end()
        b.backward(of_b)
        b.end()


@pytest.mark.parametrize("scope", SCOPES)
def test_forwards_of_both_before_the_first_backward(workers, scope):
    check(workers, a_finalized_before_bs_backward, *two(scope))


def b_every_second_step(a, b, handle):
    for _ in range(3):
        b.begin()
        b.micro_batch(0)
        a.step()
        b.micro_batch(1)
        a.step()
        b.micro_batch(2)
        b.end()


@pytest.mark.parametrize("scope", SCOPES)
def test_one_accumulates_over_two_steps_of_the_other(workers, scope):
    check(workers, b_every_second_step, *two(scope, a=6, b=3))


def own_step_ends(a, b, which, handle):
    import megatron_global_lbl as lbl

    for _ in range(3):
        for model in (a, b):
            model.begin()
            for m in range(model.problem.micro_batches):
                model.micro_batch(m)
            model.end_without_finalize(
                {
                    "chunks": lambda chunks=model.chunks: lbl.end_step(chunks),
                    "module": lambda module=model.toy: lbl.end_step(module),
                    "nothing": lbl.end_step,
                }[which]
            )


@pytest.mark.parametrize("which", ["chunks", "module", "nothing"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_loop_says_whose_step_is_over(workers, scope, which):
    """`end_step` without a model ends the step of every layer that ran: of the one model whose turn it is."""
    check(workers, own_step_ends, *two(scope, a=3, b=3), args=(which,))


def both_end_together(a, b, handle):
    import megatron_global_lbl as lbl

    for _ in range(3):
        for model in (a, b):
            model.begin()
        for model in (a, b):
            for m in range(model.problem.micro_batches):
                model.micro_batch(m)
        for model, say in ((a, lbl.end_step), (b, lambda: None)):
            model.end_without_finalize(say)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_step_end_for_both(workers, scope):
    check(workers, both_end_together, *two(scope, a=3, b=3))


def alternate(a, b, handle):
    for _ in range(4):
        a.step()
        b.step()


@pytest.mark.parametrize("scope", SCOPES)
def test_process_groups_of_their_own(workers, scope):
    """A over four ranks, B over each half of them: the halves train two models."""
    _, b = two(scope)
    whole = Problem(scope, 4, 2, 4, masks="uneven")
    check(workers, alternate, Spec(whole), Spec(b, groups="halves"))


@pytest.mark.parametrize("scope", SCOPES)
def test_one_step_end_for_both_with_process_groups_of_their_own(workers, scope):
    _, b = two(scope, a=3, b=3)
    whole = Problem(scope, 4, 2, 3, masks="uneven")
    check(workers, both_end_together, Spec(whole), Spec(b, groups="halves"))


NO_LOSS = {"load_balancing_type": "none", "aux_loss_coeff": 0.0}


@pytest.mark.parametrize("first", ["with", "without"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_without_auxiliary_loss_beside_one_with(workers, scope, first):
    a, _ = two(scope)
    specs = [Spec(a), Spec(Problem(scope, 2, 3, 4, seed=99, coeff=0.0), extra=NO_LOSS)]
    check(workers, alternate, *(specs if first == "with" else reversed(specs)), register=arguments(a))


def arguments(problem: Problem) -> dict:
    return {"scope": problem.scope}


def two_steps(a, handle):
    a.step()
    a.step()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_without_auxiliary_loss_alone(workers, scope):
    spec = Spec(Problem(scope, 2, 2, 2, coeff=0.0), extra=NO_LOSS)
    check(workers, two_steps, spec, register={"scope": scope}, refused="has nothing to act on")


def built_anew():
    """In a worker. Models that come and go under one registration: what of them is kept, and what their metrics are called."""
    import gc

    import harness
    from layout import Layout
    from megatron.core import parallel_state

    import megatron_global_lbl as lbl

    kept, keys = [], []
    with lbl.registered(scope="global", metrics="brief") as handle:
        for _ in range(3):
            harness._train(Problem("global", 1, 2, 1), Layout(), {})
            parallel_state.destroy_model_parallel()
            gc.collect()
            kept.append((len(handle._steps.layers), len(handle._metrics._intervals)))
            keys.append({key.removesuffix("max_vio") for key in handle.metrics() if key.endswith("max_vio")})
    return kept, keys


def test_a_model_that_is_gone_is_forgotten(workers):
    """But for its last interval, which is still to be told."""
    ((kept, keys),) = workers.run(built_anew, 1)
    assert kept == [(0, 1)] * 3
    assert keys == [{"moe_lbl/"}, {"moe_lbl/model2/"}, {"moe_lbl/model3/"}]
