"""The gradient in `main_grad` on GPUs with NCCL, as many as there are: the part of tests/distributed that fits."""

from __future__ import annotations

import pytest
import torch
import truth
from captured import train_captured
from compare import check, compare_exact, register_arguments
from layout import Layout
from truth import Problem
from whole_iterations import WARM_UP, train
from whole_iterations import check as check_whole_iterations

pytestmark = pytest.mark.gpu
RANKS = max(1, min(torch.cuda.device_count(), 4))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_data_parallel(gpu_workers, scope, recompute, per_token):
    problem = Problem(scope, RANKS, 3, 3, per_token=per_token, masks="uneven")
    check(gpu_workers, problem, Layout(recompute=recompute))


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_bf16(gpu_workers, scope):
    problem = Problem(scope, RANKS, 3, 2, dtype="bfloat16", hidden=64, seq=64, batch=4, masks="uneven")
    check(gpu_workers, problem, router_dtype="fp32")


@pytest.mark.skipif(RANKS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(moe="layer", ep=2)], ids=str)
def test_layouts(gpu_workers, layout):
    dp = RANKS // (layout.tp * layout.pp)
    check(gpu_workers, Problem("global", dp, 4, 2, masks="uneven"), layout)


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_cuda_graphs(gpu_workers, scope):
    """Captured once, replayed ever after; with several GPUs the collective is inside the graph."""
    problem = Problem(scope, RANKS, 3, 4, layers=1)
    expected = truth.gradients(problem)
    for result in gpu_workers.run(train_captured, RANKS, problem, register_arguments(problem), True):
        for step, actual in enumerate(result["grads"]):
            compare_exact(actual, expected[step][0][1], f"step {step}")


@pytest.mark.parametrize("layout", [Layout(), Layout(recompute="full")], ids=str)
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_cuda_graphs_of_whole_iterations(gpu_workers, scope, layout):
    """Megatron's own wrapper: two steps in Python, then forwards, backwards and `finalize_model_grads` in one graph."""
    problem = Problem(scope, RANKS, 3, WARM_UP + 4, masks="uneven")
    arguments = (problem, layout, register_arguments(problem), None, None, WARM_UP, True)
    check_whole_iterations(gpu_workers.run(train, RANKS, *arguments), problem)
