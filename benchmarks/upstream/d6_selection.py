"""D6: f of `global_aux_loss` counts a plain top-k of the scores, not the experts that the router selected.

`compute_routing_scores_for_aux_loss` repeats the top-k without expert bias and without group limits (and without routing
replay), so f describes a routing that did not happen. The same holds for Megatron's other auxiliary losses.

Shown: f read back from the gradient of one router, against the router's own routing map, and `main_grad` in a whole model.

    python benchmarks/upstream/d6_selection.py

Threads: NVIDIA/Megatron-LM #2767, #5195 (closed).
"""

from __future__ import annotations

import sys

import side_by_side
from side_by_side import Finding, Pool, Problem, compare, worst_error

CASES = {
    "expert bias": {"bias": True, "moe_router_score_function": "sigmoid"},
    "group-limited top-k": {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_score_function": "sigmoid"},
}
PROBLEMS = {
    "expert bias": Problem("global", 1, 3, score="sigmoid", bias=True),
    "group-limited top-k": Problem("global", 1, 3, score="sigmoid", groups=(4, 1)),
}


def frequencies(scope: str | None, options: dict) -> tuple[list[float], list[int]]:
    """In a worker: (f of the gradient, selections) of one micro-batch."""
    import contextlib

    import one_router
    import torch
    from megatron.core import parallel_state

    import megatron_global_lbl as lbl

    parallel_state.initialize_model_parallel()
    options = dict(options)
    bias = torch.linspace(0.3, -0.3, 8) if options.pop("bias", False) else None
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) + torch.linspace(0, 1.5, 8)
    with lbl.registered(scope=scope) if scope else contextlib.nullcontext():
        loss_type = "global_aux_loss" if scope is None else "aux_loss"
        (reading,) = one_router.read(loss_type, [(logits, None)], expert_bias=bias, **options)
    return reading.frequencies().tolist(), reading.selections.tolist()


def show(pool: Pool) -> Finding:
    rows, off, right, summary, comparisons = [], False, True, [], []
    for case, options in CASES.items():
        seen = {name: pool.run(frequencies, 1, scope, options)[0] for name, scope in (("up", None), ("plugin", "global"))}
        counts = seen["up"][1]
        true = [count / sum(counts) for count in counts]
        most = max(range(len(true)), key=lambda i: abs(seen["up"][0][i] - true[i]))
        wrong = {name: max(abs(a - b) for a, b in zip(f, true)) for name, (f, _) in seen.items()}
        rows.append(
            (
                f"{case}: f of the expert most off",
                f"{true[most]:.3f}",
                f"{seen['up'][0][most]:.3f}",
                f"{seen['plugin'][0][most]:.3f}",
            )
        )
        comparison = compare(pool, PROBLEMS[case])
        rows.append(
            (
                f"{case}: gradient, direction off by",
                "0%",
                f"{comparison.upstream_direction:.1%}",
                f"{comparison.plugin_direction:.1%}",
            )
        )
        comparisons.append(comparison)
        off |= wrong["up"] > side_by_side.OFF
        right &= wrong["plugin"] <= side_by_side.RELATIVE_ERROR and comparison.plugin_is_right
        summary.append(f"{case} {wrong['up']:.2f}")
    return Finding(
        side_by_side.defect("D6"),
        upstream_off=off,
        plugin_right=right,
        summary="f off by up to: " + ", ".join(summary) + f"; {worst_error(comparisons)}",
        header=("case (one rank)", "truth", "upstream", "plugin"),
        rows=rows,
        notes=[
            "the plugin's gradient is compared with the truth as a vector: relative error <= 1e-5 in both cases",
            "token dropping is no case: counting the demand before dropping is right (GShard, Switch), and the plugin does so",
        ],
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D6", show))
