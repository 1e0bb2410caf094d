"""D2: the gradient of `global_aux_loss` is too weak by the data-parallel size.

Upstream divides the local scores by the token count of the whole TP x CP x DP group, as if the ranks' losses were to be
summed. Megatron's DDP then averages over the data-parallel ranks, which divides by their number once more. The logged value
is summed, so it looks right.

Shown: `main_grad` of a two-layer model after Megatron's own schedule, DDP and `finalize_model_grads`, at data-parallel size 1,
2 and 4, as a multiple of the float64 truth, and with it what Megatron logs for the same step.

    python benchmarks/upstream/d2_strength.py

Threads: NVIDIA/Megatron-LM #3672 (open), pull requests #3768 and #3769 (closed), #5007 (open).
"""

from __future__ import annotations

import sys

import side_by_side
from logged import logged
from side_by_side import Comparison, Finding, Layout, Pool, Problem, compare, true_values, worst_error


def show(pool: Pool) -> Finding:
    rows, comparisons = [], {}
    for dp in (1, 2, 4):
        problem = Problem("global", dp, 3)
        comparisons[dp] = compare(pool, problem)
        value = logged(pool, problem, Layout(), None, side_by_side.UPSTREAM)["global_load_balancing_loss"]
        rows.append((f"dp {dp}", *comparisons[dp].cells(), f"{true_values(problem)[1]:.3f}", f"{value:.3f}"))
    weak = {dp: comparison.upstream for dp, comparison in comparisons.items()}
    return Finding(
        side_by_side.defect("D2"),
        upstream_off=any(comparisons[dp].upstream_is_off for dp in (2, 4)),
        plugin_right=all(comparison.plugin_is_right for comparison in comparisons.values()),
        summary="strength "
        + ", ".join(f"{value:.2f} at dp {dp}" for dp, value in weak.items())
        + f"; {worst_error(comparisons.values())}",
        header=("layout", *Comparison.HEADER, "its loss by the formula", "what it logs"),
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D2", show))
