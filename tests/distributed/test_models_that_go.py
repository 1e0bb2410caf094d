"""A resumed custom loop, and models that come and go."""

from __future__ import annotations

import dataclasses

import pytest
from layout import Layout
from several import Spec, check
from truth import Problem

SCOPES = ["dp", "global"]


def segment(a, scope):
    """A training loop with a clock of its own, resumed at the model's step."""
    import megatron_global_lbl as lbl

    with lbl.registered(scope=scope, start_iter=a.problem.start_iter, iteration=lambda: a.step_number):
        while a.step_number < a.problem.steps:
            a.step()


@pytest.mark.parametrize("scope", SCOPES)
def test_start_iter_follows_the_iteration_of_a_custom_loop(workers, scope):
    """Even tokens: Megatron's own loss, before it, is right there."""
    problem = Problem(scope, 2, 3, start_iter=3)
    for first, end in ((0, 2), (2, 5)):
        spec = Spec(dataclasses.replace(problem, steps=end), first=first)
        check(workers, segment, spec, layout=Layout(), register={}, args=(scope,))


def replaced(a, b, together, handle):
    """`b` takes over from `a`; every rank collects `a` before another step of `b`, the first rank never."""
    import gc
    import weakref

    import torch.distributed as dist

    rank = dist.get_rank()
    for _ in range(3):
        a.step()
        if together:
            b.step()
    kept = a.toy if rank == 0 else None
    alive = weakref.ref(a.toy.blocks[0].router)
    gc.disable()
    try:
        a.drop()
        while b.step_number < b.problem.steps:
            if rank and b.step_number >= b.problem.steps - 4 + rank - 1:
                gc.collect()
                assert alive() is None, "the old model is still there"
            b.step()
    finally:
        gc.enable()
    return kept is None


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_that_goes_at_another_time_on_every_rank(workers, scope, together):
    a = Problem(scope, 4, 2, 3, masks="uneven")
    b = dataclasses.replace(a, steps=7 if together else 4, micro_batches=3, seed=99)
    check(workers, replaced, a, b, args=(together,))
