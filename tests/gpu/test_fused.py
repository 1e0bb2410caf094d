"""The Triton kernels of core/fused on a GPU: against PyTorch in float64, in `main_grad`, in CUDA graphs, and how many run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import truth
from captured import train_captured
from compare import check, compare_exact, register_arguments
from kernel_cases import Case, check_kernels
from layout import Layout
from truth import Problem

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: compiles the kernels and runs them"),
]
RANKS = max(1, min(torch.cuda.device_count(), 4))
SCOPES = ["dp", "global", "window"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_kernels_are_the_formula(score_function, dtype):
    for tokens, experts, topk in [(4096, 128, 8), (65537, 100, 8), (0, 8, 2), (1, 1, 1), (333, 2050, 8), (5000, 8, 2)]:
        for padded in (False, True):
            check_kernels(Case(tokens, experts, topk, score_function, dtype, padded), "cuda")


def test_the_last_program_sees_all_shares():
    """Many launches of many programs each: the same bits every time, and exact counts."""
    from megatron_global_lbl.core.fused import launch
    from megatron_global_lbl.settings import Scope

    tokens, experts = 32768, 128
    logits = torch.randn(tokens, experts, device="cuda")
    selection = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(8).indices, True)
    ticket = torch.zeros(1, dtype=torch.int32, device="cuda")
    step_C = torch.zeros(experts + 1, dtype=torch.int64, device="cuda")
    found = [
        launch.count(
            logits,
            selection,
            None,
            score_function="softmax",
            copies=1,
            ticket=ticket,
            step_C=step_C,
            scope=Scope.WINDOW,
            add_sums_to=None,
        )
        for _ in range(500)
    ]
    expected = selection.sum(0)
    assert all(bool((counts[0] == expected).all()) for counts, _ in found)
    assert all(sums.equal(found[0][1]) for _, sums in found)
    assert step_C.tolist() == [*(500 * expected).tolist(), 500]
    assert ticket.item() == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", SCOPES)
def test_main_grad(gpu_workers, scope, recompute, score):
    problem = Problem(scope, RANKS, 3, 3, window_steps=2, masks="uneven", score=score, experts=6)
    check(gpu_workers, problem, Layout(recompute=recompute), fused=True)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_main_grad_with_a_micro_batch_share(gpu_workers, scope, per_token):
    problem = Problem(scope, RANKS, 3, 3, window_steps=2, masks="uneven", per_token=per_token, micro_coeff=0.005)
    check(gpu_workers, problem, fused=True)


@pytest.mark.parametrize("router_dtype", ["fp32", None])
@pytest.mark.parametrize("scope", SCOPES)
def test_main_grad_of_a_bf16_model(gpu_workers, scope, router_dtype):
    problem = Problem(scope, RANKS, 3, 2, dtype="bfloat16", hidden=64, seq=64, batch=4, masks="uneven")
    check(gpu_workers, problem, fused=True, **({"router_dtype": router_dtype} if router_dtype else {}))


@pytest.mark.parametrize("scope", SCOPES)
def test_plain_path(gpu_workers, scope):
    """The reference, which MEGATRON_GLOBAL_LBL_FUSED=0 asks for."""
    check(gpu_workers, Problem(scope, RANKS, 3, 3, window_steps=2, masks="uneven"), fused=False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_in_a_cuda_graph(gpu_workers, scope, fused):
    problem = Problem(scope, RANKS, 3, 4, layers=1, window_steps=2)
    expected = truth.gradients(problem)
    for result in gpu_workers.run(train_captured, RANKS, problem, register_arguments(problem), True, fused):
        assert result["fused"] == fused
        for step, actual in enumerate(result["grads"]):
            compare_exact(actual, expected[step][0][1], f"step {step}")


@pytest.fixture
def one_rank():
    import routers

    routers.start(gpu=True)
    yield
    routers.stop()


@pytest.mark.parametrize("router_dtype", ["fp32", None])
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3"])
def test_three_kernels(one_rank, model, router_dtype):
    """Per layer and micro-batch; `global` adds the counts of the two micro-batches that wait when the first backward comes."""
    from router_cost import time_on_gpu

    losses = ["none", "aux_loss", *SCOPES]
    times = time_on_gpu(model, losses, tokens=4096, router_dtype=router_dtype, rounds=1)
    kernels = {name: figures.kernels_forward + figures.kernels_backward for name, figures in times.items()}
    more = {name: round(kernels[name] - kernels["none"], 2) for name in losses}
    assert more["window"] == 2 and more["dp"] == 3 and more["global"] <= 4, more
    assert more["aux_loss"] > 10, more
