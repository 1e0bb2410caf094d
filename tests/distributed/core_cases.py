"""The core of the matrix: the cases that every supported Megatron-Core release runs (`make test-versions`, marked `core`).

Chosen is what releases do differently: the scale of auxiliary losses (no CP factor before 0.16, per-token losses under TP
before 0.19), process groups, padding masks, dispatchers, recomputation.
"""

from __future__ import annotations

import importlib.metadata
import os

from layout import Layout
from truth import Problem

from megatron_global_lbl.hook.versions import release

# From its metadata: 0.15 cannot be imported without a GPU or the workers' stand-in for one. A source tree has none.
VERSION = os.environ.get("MEGATRON_RELEASE") or importlib.metadata.version("megatron-core")
RELEASE = release(VERSION)

CORE = {
    *(
        f"test_scopes[{scope}-2-3-{per_token}-{masks}]"
        for scope in ("dp", "global")
        for per_token in (False, True)
        for masks in ("none", "uneven")
    ),
    *(
        f"test_parallel_layouts[{layout}-{per_token}]"
        for layout in ("global-tp2", "global-cp2", "global-tp2-cp2", "global-pp2", "global-ep2-layer", "global-ep4-layer")
        for per_token in (False, True)
    ),
    "test_parallel_layouts[global-pp2-vpp2-False]",
    "test_parallel_layouts[global-tp2-ep4-etp1-layer-False]",
    "test_recomputation[global-pp2-recompute-full]",
    "test_recomputation[dp-ep2-layer-recompute-selective]",
    "test_data_parallel_options[False-tp2-pp2-overlap-distopt]",
    "test_data_parallel_options[True-overlap]",
    "test_low_precision[global-bfloat16-data]",
    "test_scores_and_expert_bias[global-sigmoid-True]",
    "test_group_limited_topk[global-sigmoid-True]",
    "test_upstreams_global_aux_loss_is_taken_over[global]",
    "test_one_backward_of_both[global-full]",
    "test_replays_give_the_gradient_and_the_log[dp-data-False]",
    "test_replays_give_the_gradient_and_the_log[global-data-True]",
}


def masks_of_release(problem: Problem, layout: Layout) -> str:
    """Routers take a padding mask since 0.16: before, uneven numbers of tokens come as sequences of other lengths, which the
    all-gather dispatcher and the comparison in low precision do not take."""
    if RELEASE >= (0, 16) or problem.masks != "uneven":
        return problem.masks
    if problem.dtype != "float32":
        return "none"
    all_gather = layout.moe == "layer" and layout.config.get("moe_token_dispatcher_type") != "alltoall"
    return "none" if all_gather else "ragged"
