"""What a router can be told to do: f counts what it selected, and the gradient flows through its scores, whatever it is."""

from __future__ import annotations

from unittest import mock

import harness
import pytest
import torch
from compare import check
from layout import Layout
from torch import Tensor
from truth import Problem
from workers import CaseFailed

SCOPES = ["global"]


@pytest.mark.parametrize("score, bias", [("softmax", False), ("sigmoid", False), ("sigmoid", True)])
@pytest.mark.parametrize("scope", SCOPES)
def test_scores_and_expert_bias(workers, scope, score, bias):
    """The bias shifts the selection only: the gradient flows through the unbiased scores."""
    check(workers, Problem(scope, 2, 2, 2, score=score, bias=bias))


def replayed(scope: str, repeated: int, per_token: bool) -> float:
    """In a worker. Replays a routing, in which the last tokens' rows repeat one expert; the gradient's relative error."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    import megatron_global_lbl as lbl

    parallel_state.initialize_model_parallel()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    E, topk, T, coeff = 8, 4, 32, 0.02
    generator = torch.Generator().manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=4,
        num_moe_experts=E,
        moe_router_topk=topk,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=coeff,
        use_cpu_initialization=True,
        add_bias_linear=False,
        moe_enable_routing_replay=True,
        calculate_per_token_loss=per_token,
    )
    with lbl.registered(scope=scope):
        router = TopKRouter(config=config, pg_collection=get_default_pg_collection()).train()
        router.set_layer_number(1)
        lbl.chunk(router)
        router.weight.data.normal_(0, 0.5, generator=generator)
        hidden = torch.randn(T, 1, 16, generator=generator)
        indices_TK = torch.randn(T, E, generator=generator).topk(topk).indices
        indices_TK[T - repeated :] = 0
        RouterReplay.set_replay_data([indices_TK])
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        try:
            router(hidden)[0].sum().mul(0).backward()
        finally:
            RouterReplay.clear_global_router_replay_instances()
        lbl.end_step()
    weight = router.weight.detach().double().requires_grad_()
    scores_TE = (hidden[:, 0].double() @ weight.T).softmax(-1)
    counts_E = torch.zeros(T, E, dtype=torch.float64).scatter(1, indices_TK, 1.0).sum(0)
    # With per-token loss p is not divided here: `finalize_model_grads` divides it.
    (coeff * E * (counts_E / counts_E.sum() * scores_TE.sum(0) / (1 if per_token else T)).sum()).backward()
    return float((router.weight.grad.double() - weight.grad).norm() / weight.grad.norm())


@pytest.mark.parametrize("scope", ["dp", "global"])
def test_replayed_routing(workers, scope):
    """Rows that repeat an expert select fewer than top-k, so the counts do not tell how many tokens p is a mean over."""
    for repeated, per_token in ((0, False), (8, True)):
        (error,) = workers.run(replayed, 1, scope, repeated, per_token)
        assert error < 1e-5
    with pytest.raises(CaseFailed, match="gives a token fewer than --moe-router-topk 4 experts .* allowed: a padding mask"):
        workers.run(replayed, 1, scope, 8, False)


@pytest.mark.parametrize("pre_softmax", [False, True])
@pytest.mark.parametrize("router_dtype", ["fp32", "fp64"])
def test_router_dtype_and_softmax_before_or_after(workers, router_dtype, pre_softmax):
    check(workers, Problem("global", 2, 3), router_dtype=router_dtype, moe_router_pre_softmax=pre_softmax)


@pytest.mark.parametrize("score, bias", [("softmax", False), ("sigmoid", True)])
@pytest.mark.parametrize("scope", SCOPES)
def test_group_limited_topk(workers, scope, score, bias):
    """Upstream's `global_aux_loss` counts an unlimited top-k (D6)."""
    problem = Problem(scope, 2, 2, 2, score=score, bias=bias, topk=4, groups=(4, 2))
    check(workers, problem, moe_router_pre_softmax=score == "softmax")


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_token_dropping_counts_the_demand(workers, scope, pad, policy):
    """f counts what was selected before dropping: an expert whose surplus is dropped must not look balanced."""
    options = {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": pad, "moe_token_drop_policy": policy}
    layout = Layout(moe="layer", ep=2, config={"moe_token_dispatcher_type": "alltoall"})
    check(workers, Problem(scope, 2, 2, 2, masks="uneven"), layout, **options)


@pytest.mark.parametrize("scope", ["dp", *SCOPES])
@pytest.mark.parametrize("per_token", [False, True])
def test_beside_other_losses(workers, scope, per_token):
    """In a list with `seq_aux_loss`, and with a z-loss: theirs is Megatron's own gradient, ours is added to it."""
    problem = Problem(scope, 2, 2, 2, per_token=per_token)
    mine = {"load_balancing_type": ["aux_loss", "seq_aux_loss"], "aux_loss_coeff": [problem.coeff, 0.01]}
    theirs = {"load_balancing_type": "seq_aux_loss", "aux_loss_coeff": 0.01}
    check(workers, problem, moe_z_loss_coeff=1e-3, without=theirs, **mine)


@pytest.mark.parametrize("frozen", ["router", "below"])
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_parameters(workers, scope, frozen, recompute):
    check(workers, Problem(scope, 2, 2, 2, layers=3), Layout(frozen=frozen, recompute=recompute))


@pytest.mark.parametrize("dense", [(1,), (1, 3), (2, 3)])
@pytest.mark.parametrize("scope", SCOPES)
def test_dense_layers_between(workers, scope, dense):
    """`--moe-layer-freq`."""
    check(workers, Problem(scope, 2, 2, 2, layers=4, dense=dense))


def run_with_router_fusion(routing_map, *arguments):
    """In a worker: `--moe-router-fusion` with a function of the signature of Transformer Engine's that gives such a map; it has
    none for scores."""
    from megatron.core.transformer.moe import moe_utils

    select = moe_utils.topk_routing_with_score_function

    def fused_topk(*, expert_bias=None, **options):
        probs, selection = select(**options)
        return probs, routing_map(selection)

    fused = {"fused_topk_with_score_function": fused_topk, "fused_compute_score_for_moe_aux_loss": None, "HAVE_TE": True}
    with mock.patch.multiple(moe_utils, create=True, **fused):
        return harness.run(*arguments)


def fused_router(workers, problem: Problem, routing_map, **extra):
    class Fused:
        def run(self, function, world_size, fused, *arguments):
            return workers.run(run_with_router_fusion, world_size, routing_map, *arguments)

    check(Fused(), problem, moe_router_fusion=True, **extra)


def test_router_fusion_is_served(workers):
    """Transformer Engine's scores, which it rounds in some releases, are not asked for."""
    fused_router(workers, Problem("global", 2, 2, 2), torch.clone)
    fused_router(workers, Problem("global", 2, 2, 2, score="sigmoid"), torch.clone)


def test_a_selection_that_is_no_map_is_refused(workers):
    with pytest.raises(CaseFailed, match=r"gave the selection as torch.int32 \[16, 8\] beside probabilities \[16, 8\]"):
        fused_router(workers, Problem("global", 1, 1), Tensor.int)
