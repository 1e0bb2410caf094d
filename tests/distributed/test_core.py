"""The core of the matrix: what `make test-versions` runs on every supported Megatron-Core release."""

from __future__ import annotations

import importlib.metadata
import os

import pytest
from compare import check
from layout import Layout
from truth import Problem

from megatron_global_lbl.hook.versions import release

pytestmark = pytest.mark.core

# From its metadata: 0.15 cannot be imported without a GPU or the workers' stand-in for one.
VERSION = importlib.metadata.version("megatron-core")
RELEASE = release(VERSION)
# Routers take a padding mask since 0.16; before, uneven numbers of tokens come as sequences of other lengths.
UNEVEN = "uneven" if RELEASE >= (0, 16) else "ragged"
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}

CASES = {
    "tensor": (Problem("global", 2, 3, 2, masks=UNEVEN, micro_coeff=0.003), Layout(tp=2)),
    "context": (Problem("global", 2, 3, 2, micro_coeff=0.003), Layout(cp=2)),
    "tensor-context": (Problem("window", 1, 3, 3), Layout(tp=2, cp=2)),
    "pipeline": (Problem("global", 2, 4, 2), Layout(pp=2)),
    "interleaved": (Problem("global", 1, 4, 2, layers=4), Layout(pp=2, chunks=2)),
    "experts": (Problem("global", 2, 2, 2, masks=UNEVEN), Layout(moe="layer", ep=2, config=ALLTOALL)),
    "experts-tensor": (Problem("global", 2, 2, 2), Layout(moe="layer", tp=2, ep=2, etp=1)),
    "recompute-pipeline": (Problem("global", 2, 4, 2), Layout(pp=2, recompute="full")),
    "recompute-experts": (Problem("dp", 2, 3, 2), Layout(moe="layer", ep=2, recompute="selective")),
    "distributed-optimizer": (Problem("global", 2, 3, 2), Layout(distributed_optimizer=True, overlap_grad_reduce=True)),
    "expert-bias": (Problem("window", 2, 2, 2, score="sigmoid", bias=True), Layout()),
    "groups": (Problem("global", 2, 2, 2, score="sigmoid", bias=True, topk=4, groups=(4, 2)), Layout()),
    "bf16": (Problem("global", 2, 3, 2, dtype="bfloat16", hidden=64, seq=32), Layout(config={"moe_router_dtype": "fp32"})),
}


def worker_release() -> str:
    from megatron_global_lbl.hook.versions import installed_version

    return installed_version()


def test_release(workers):
    """The workers run the release that is asked for, not one that happens to be found first."""
    wanted = os.environ.get("MEGATRON_RELEASE", VERSION)
    assert [version.split("+")[0] for version in workers.run(worker_release, 4)] == [wanted] * 4


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masks", ["none", UNEVEN])
@pytest.mark.parametrize("scope", ["dp", "global", "window"])
def test_scopes(workers, scope, masks, per_token):
    check(workers, Problem(scope, 4, 3, 3, window_steps=2, masks=masks, per_token=per_token))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_layouts(workers, name, per_token):
    """Where releases scale differently: no CP factor before 0.16, per-token losses under TP before 0.19."""
    problem, layout = CASES[name]
    problem = Problem(**{**vars(problem), "per_token": per_token})
    check(workers, problem, layout)


def test_upstreams_global_aux_loss_is_taken_over(workers):
    if RELEASE < (0, 15):
        pytest.skip("global_aux_loss exists since 0.15")
    check(workers, Problem("global", 4, 2, 2), load_balancing_type="global_aux_loss")
