"""The same gradient in every parallel layout, with every option of the training that must not change it."""

from __future__ import annotations

import pytest
from compare import check
from layout import Layout
from truth import Problem

SCOPES = ["dp", "global"]
EXPERTS = Layout(moe="layer", ep=2)
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}


def problem_for(scope: str, layout: Layout, **options) -> Problem:
    """A problem that fills four ranks, with two layers per pipeline chunk where the layout has several."""
    dp = 4 // (layout.tp * layout.cp * layout.pp)
    micro_batches = 4 if layout.chunks > 1 else 3
    layers = max(2, layout.pp * layout.chunks)
    return Problem(scope, dp, micro_batches, 2, micro_coeff=0.003, layers=layers, **options)


LAYOUTS = [
    Layout(tp=2),
    Layout(cp=2),
    Layout(pp=2),
    Layout(tp=2, cp=2),
    Layout(tp=2, pp=2),
    Layout(cp=2, pp=2),
    Layout(pp=2, chunks=2),
    Layout(tp=2, pp=2, chunks=2),
    EXPERTS,
    Layout(moe="layer", ep=4, config=ALLTOALL),
    Layout(moe="layer", ep=2, tp=2),
    Layout(moe="layer", ep=4, tp=2, etp=1, config=ALLTOALL),
    Layout(moe="layer", ep=2, pp=2),
    Layout(moe="layer", ep=2, cp=2, config=ALLTOALL),
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_parallel_layouts(workers, scope, layout, per_token):
    check(workers, problem_for(scope, layout, masks="uneven", per_token=per_token), layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parallel_layouts_without_masks(workers, layout):
    check(workers, problem_for("global", layout), layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(recompute="full"),
        Layout(recompute="selective"),
        Layout(moe="layer", ep=2, recompute="selective"),
        Layout(pp=2, recompute="full"),
        Layout(pp=2, recompute="selective"),
        Layout(pp=2, chunks=2, recompute="full"),
        Layout(tp=2, pp=2, moe="layer", ep=2, etp=1, recompute="full"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", SCOPES)
def test_recomputation(workers, scope, layout):
    check(workers, problem_for(scope, layout, masks="uneven"), layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(overlap_grad_reduce=True),
        Layout(distributed_optimizer=True),
        Layout(distributed_optimizer=True, overlap_grad_reduce=True, moe="layer", ep=2),
        Layout(distributed_optimizer=True, overlap_grad_reduce=True, pp=2, tp=2),
        Layout(loss_scale=1024.0, pp=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_token", [False, True])
def test_data_parallel_options(workers, layout, per_token):
    check(workers, problem_for("global", layout, masks="uneven", per_token=per_token), layout)


@pytest.mark.parametrize(
    "dtype, layout",
    [
        ("bfloat16", Layout()),
        ("bfloat16", Layout(moe="layer", ep=2, tp=2)),
        ("bfloat16", Layout(pp=2, chunks=2, distributed_optimizer=True)),
        ("float16", Layout(loss_scale=65536.0)),
        ("float16", Layout(loss_scale=4096.0, cp=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", SCOPES)
def test_low_precision(workers, scope, dtype, layout):
    """f is exact: it is compared through what the low-precision routers selected."""
    problem = problem_for(scope, layout, dtype=dtype, masks="uneven", hidden=64, seq=64, batch=4)
    check(workers, problem, layout, router_dtype="fp32")


@pytest.mark.parametrize("applications", [1, 2])
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(recompute="full")], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_multi_token_prediction(workers, scope, layout, applications):
    """A MoE layer of multi-token prediction, applied once or (`--mtp-use-repeated-layer`) twice with half the strength."""
    problem = Problem(scope, 2 // layout.pp, 3, 2, masks="uneven", mtp_applications=applications, micro_coeff=0.003)
    check(workers, problem, layout)


def test_pipeline_stage_without_moe_layers(workers):
    for scope in SCOPES:
        check(workers, Problem(scope, 2, 3, 2, layers=4, dense=(1, 2)), Layout(pp=2))


def test_other_lengths_on_every_rank(workers):
    """Token counts that differ over ranks and micro-batches without a mask, with tensor and pipeline parallelism."""
    for layout in (Layout(tp=2), Layout(pp=2)):
        for per_token in (False, True):
            check(workers, problem_for("global", layout, masks="ragged", per_token=per_token), layout)
