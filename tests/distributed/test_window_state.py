"""`state_dict` and `load_state_dict` of a loop of one's own, and windows of models that come and go."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from layout import Layout
from several import Spec, check
from truth import Problem

SCOPES = ["dp", "global", "window"]


def to_bytes(state) -> bytes:
    """As a checkpoint on disk has it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def from_bytes(state: bytes):
    return torch.load(io.BytesIO(state), weights_only=True)


def segment(a, state, load_after_steps, handle):
    """Load, train to the problem's end, save; the state may come when some steps have been made with the layers."""
    for _ in range(load_after_steps):
        a.step(1000)
    if state is not None:
        handle.load_state_dict(from_bytes(state))
    while a.step_number < a.problem.steps:
        a.step()
    return to_bytes(handle.state_dict())


def train_in_segments(workers, problem: Problem, ends: list[int], layouts: list[Layout], load_after_steps: int = 0) -> None:
    """A training that is stopped and resumed after the steps in `ends`, in another layout each time."""
    first, state = 0, None
    for end, layout in zip(ends, layouts, strict=True):
        spec = Spec(dataclasses.replace(problem, steps=end), first=first)
        again = load_after_steps if first else 0
        ranks = check(workers, segment, spec, layout=layout, args=(state, again))
        first, state = end, ranks[-1]["value"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masks", ["none", "uneven"])
def test_another_tensor_and_context_parallel_size(workers, masks, per_token):
    problem = Problem("window", 2, 3, window_steps=3, masks=masks, per_token=per_token)
    layouts = [Layout(), Layout(tp=2), Layout(cp=2), Layout()]
    train_in_segments(workers, problem, [2, 4, 6, 8], layouts)


@pytest.mark.parametrize("load_after_steps", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
def test_start_iter_is_counted_on(workers, scope, load_after_steps):
    """Even tokens: Megatron's own loss, before it, is right there. The state comes before or after the first forwards."""
    problem = Problem(scope, 2, 3, window_steps=2, start_iter=3)
    train_in_segments(workers, problem, [2, 5], [Layout(), Layout()], load_after_steps)


@pytest.mark.parametrize("load_after_steps", [0, 1])
@pytest.mark.parametrize(
    "changed, names", [({"topk": 3}, r"(?s)(?=.*\b2\b)(?=.*\b3\b)"), ({"experts": 12}, r"(?s)(?=.*\b8\b)(?=.*\b12\b)")]
)
def test_another_router(workers, changed, names, load_after_steps):
    problem = Problem("window", 2, 2, 2, window_steps=2)
    (state, _) = [rank["value"] for rank in check(workers, segment, problem, args=(None, 0))]
    other = Spec(dataclasses.replace(problem, steps=3, **changed), first=2)
    check(workers, segment, other, args=(state, load_after_steps), refused=names)


def save_two(a, b, handle):
    for _ in range(3):
        a.step()
        b.step()
    try:
        handle.state_dict()
    except ValueError as error:
        refused = str(error)
    else:
        refused = "nothing was refused"
    return {"a": to_bytes(handle.state_dict(model=a.chunks)), "b": to_bytes(handle.state_dict(model=b.toy)), "refused": refused}


def resume_two(a, b, states, met, handle):
    if met:
        a.step(1000)
        b.step(1000)
    handle.load_state_dict(from_bytes(states["b"]), model=b.chunks)
    handle.load_state_dict(from_bytes(states["a"]), model=a.toy)
    b.step()
    for _ in range(2):
        a.step()
    b.step()


@pytest.mark.parametrize("met", [False, True])
def test_two_models(workers, met):
    a = Problem("window", 2, 2, 3, window_steps=2, masks="uneven")
    b = dataclasses.replace(a, micro_batches=3, seed=99)
    ranks = check(workers, save_two, a, b)
    assert all("model" in rank["value"]["refused"] for rank in ranks), ranks[0]["value"]["refused"]
    resumed = [Spec(dataclasses.replace(problem, steps=5), first=3) for problem in (a, b)]
    check(workers, resume_two, *resumed, args=(ranks[0]["value"], met))


def load_without_a_model(a, b, states, handle):
    a.step()
    b.step()
    handle.load_state_dict(from_bytes(states["a"]))


def test_two_models_and_a_state_for_nobody(workers):
    a = Problem("window", 2, 2, 3, window_steps=2)
    ranks = check(workers, save_two, a, dataclasses.replace(a, seed=99))
    again = [Spec(dataclasses.replace(a, seed=seed, steps=4)) for seed in (a.seed, 99)]
    check(workers, load_without_a_model, *again, args=(ranks[0]["value"],), refused="model")


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
    a = Problem(scope, 4, 2, 3, window_steps=2, masks="uneven")
    b = dataclasses.replace(a, steps=7 if together else 4, micro_batches=3, seed=99)
    check(workers, replaced, a, b, args=(together,))
