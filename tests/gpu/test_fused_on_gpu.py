"""The Triton kernels of core/fused on a GPU: against the formula in float64, in `main_grad`, and in CUDA graphs.

Where Triton is, the other tests of this folder run them, too; how many run is in test_router_cost.py.
"""

from __future__ import annotations

import pytest
import torch
import truth
from captured import train_captured
from compare import check, compare_exact, register_arguments
from kernel_cases import Case, check_kernels, check_rows
from layout import Layout
from truth import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: compiles the kernels and runs them"),
]
RANKS = max(1, min(torch.cuda.device_count(), 4))
SCOPES = ["dp", "global"]
CASES = [  # few types and numbers of experts: every one of them is compiled
    Case(4096, 128, 8, "softmax", torch.float32, False),
    Case(65537, 128, 8, "softmax", torch.float32, True),
    Case(0, 128, 8, "softmax", torch.float32, True),
    Case(1, 128, 8, "softmax", torch.float32, True),
    Case(4096, 128, 8, "sigmoid", torch.float32, True),
    Case(4096, 128, 8, "sqrtsoftplus", torch.float32, True),
    Case(16384, 100, 8, "softmax", torch.bfloat16, True),
    Case(5000, 100, 8, "sigmoid", torch.float16, False),
    Case(333, 2050, 8, "sqrtsoftplus", torch.bfloat16, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case))
def test_compiled_kernels_are_the_formula(case):
    check_kernels(case, "cuda")


def test_the_last_program_sees_all_shares():
    """Many launches of many programs each: the same bits every time, and exact counts."""
    from megatron_global_lbl.core.fused import forward

    tokens, experts = 32768, 128
    logits = torch.randn(tokens, experts, device="cuda")
    selection = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(8).indices, True)
    ticket = torch.zeros((), dtype=torch.int32, device="cuda")
    found = []
    for _ in range(500):
        counts_E, sums_E = torch.empty(experts, dtype=torch.int32, device="cuda"), torch.empty(experts, device="cuda")
        forward.count_into(counts_E, sums_E, logits, selection, None, score_function="softmax", ticket=ticket)
        found.append((counts_E, sums_E))
    expected = selection.sum(0)
    assert all(bool((counts_E == expected).all()) for counts_E, _ in found)
    assert all(sums_E.equal(found[0][1]) for _, sums_E in found)
    assert ticket.item() == 0


@pytest.mark.parametrize("experts", [128, 100])
def test_gradient_rows_are_the_formula(experts):
    check_rows(experts, "cuda")


@pytest.mark.parametrize("scope", SCOPES)
def test_sigmoid_recomputed(gpu_workers, scope):
    problem = Problem(scope, RANKS, 3, 3, masks="uneven", score="sigmoid", experts=6)
    check(gpu_workers, problem, Layout(recompute="full"), fused=True)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_micro_batch_share(gpu_workers, scope):
    check(gpu_workers, Problem(scope, RANKS, 3, 3, masks="uneven", micro_coeff=0.005), fused=True)


@pytest.mark.parametrize("scope", SCOPES)
def test_logits_in_bf16(gpu_workers, scope):
    """Without `--moe-router-dtype fp32`."""
    problem = Problem(scope, RANKS, 3, 2, dtype="bfloat16", hidden=64, seq=64, batch=4, masks="uneven")
    check(gpu_workers, problem, fused=True)


@pytest.mark.parametrize("scope", SCOPES)
def test_plain_path(gpu_workers, scope):
    """The reference, which MEGATRON_GLOBAL_LBL_FUSED=0 asks for."""
    check(gpu_workers, Problem(scope, RANKS, 3, 3, masks="uneven"), fused=False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_captured(gpu_workers, scope, fused):
    problem = Problem(scope, RANKS, 3, 4, layers=1)
    expected = truth.gradients(problem)
    for result in gpu_workers.run(train_captured, RANKS, problem, register_arguments(problem), True, fused):
        assert result["fused"] == fused
        for step, actual in enumerate(result["grads"]):
            compare_exact(actual, expected[step][0][1], f"step {step}")
