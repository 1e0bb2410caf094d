"""Megatron FSDP (`--use-megatron-fsdp`): the gradient that its optimizer is given, with every sharding strategy."""

from __future__ import annotations

import pytest
from compare import check
from fully_sharded import STRATEGIES
from layout import Layout
from several import check as check_script
from test_unfinished_steps import every_other_step_unfinished
from truth import Problem


@pytest.mark.parametrize("scope, per_token", [("global", False), ("global", True)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharding_strategies(workers, strategy, scope, per_token):
    problem = Problem(scope, 2, 3, 3, micro_coeff=0.003, masks="uneven", per_token=per_token)
    check(workers, problem, Layout(fsdp=strategy))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(fsdp="optim_grads_params", tp=2, moe="layer", ep=2, etp=1, overlap_grad_reduce=True),
        Layout(fsdp="optim_grads_params", cp=2, recompute="full", evaluate_between=True),
        Layout(fsdp="optim_grads_params", instances=2, overlap_grad_reduce=True),
        Layout(fsdp="optim", instances=2, overlap_grad_reduce=True),
    ],
    ids=str,
)
def test_layouts(workers, layout):
    dp = 4 // (layout.tp * layout.cp)
    check(workers, Problem("global", dp, 3, 2, masks="uneven"), layout)


@pytest.mark.parametrize("strategy", ["optim", "optim_grads_params"])
def test_bf16(workers, strategy):
    problem = Problem("dp", 2, 3, 2, dtype="bfloat16", hidden=64, seq=64, batch=4, masks="uneven")
    check(workers, problem, Layout(fsdp=strategy), router_dtype="fp32")


def registered_after_the_model(a, handle):
    import megatron_global_lbl as lbl

    handle.remove()
    with lbl.registered(scope="global", micro_coeff=0.003):
        every_other_step_unfinished(a, handle)


@pytest.mark.parametrize("script", [every_other_step_unfinished, registered_after_the_model])
def test_zeroed_gradients_begin_a_step(workers, script):
    """Megatron FSDP hands its `zero_grad_buffer` around by value."""
    problem = Problem("global", 2, 3, 3, masks="uneven", micro_coeff=0.003)
    check_script(workers, script, problem, layout=Layout(fsdp="optim_grads"))
