"""D5: what a coefficient means to `global_aux_loss` depends on the layout and on flags that should not matter.

D2 (too weak by dp), D4 (the group's token count for the rank's own), the token factor of `--calculate-per-token-loss` under
tensor parallelism (mended at 0.19) and the context-parallel factor of the auxiliary losses (missing before 0.16) multiply.

Shown: the strength of `main_grad` on four ranks, in layouts with dp, dp x tp and dp x cp, with and without per-token loss and
padding. This is the table by which a coefficient is translated (docs/upstream.md). The last column is Megatron's plain
`aux_loss` against the truth of its own, local f, so that it shows what the auxiliary losses share.

    python benchmarks/upstream/d5_strength_by_flags.py

Threads: NVIDIA/Megatron-LM #1652 (open), #5047.
"""

from __future__ import annotations

import dataclasses
import sys

import side_by_side
import torch
import truth
from side_by_side import Comparison, Finding, Layout, Pool, Problem, compare, main_grad, takes_padding_mask, worst_error

LAYOUTS = (("dp 4", 4, Layout()), ("dp 2, tp 2", 2, Layout(tp=2)), ("dp 2, cp 2", 2, Layout(cp=2)))


def plain_aux_loss(pool: Pool, problem: Problem, layout: Layout) -> float:
    """Norm of the gradient of Megatron's `aux_loss` over that of its own truth."""
    problem = dataclasses.replace(problem, scope="micro")
    true = torch.cat([g.flatten() for step in truth.gradients(problem) for pair in step for g in pair])
    return float(main_grad(pool, problem, layout, None, {}).norm() / true.norm())


def show(pool: Pool) -> Finding:
    rows, comparisons = [], []
    for masks in ("none", "uneven") if takes_padding_mask() else ("none",):
        for per_token in (False, True):
            for name, dp, layout in LAYOUTS:
                problem = Problem("global", dp, 3, masks=masks, per_token=per_token)
                comparison = compare(pool, problem, layout)
                padding = "" if masks == "none" else ", padding"
                loss = ", per-token loss" if per_token else ""
                rows.append((name + padding + loss, *comparison.cells(), f"{plain_aux_loss(pool, problem, layout):.2f}"))
                comparisons.append(comparison)
    # Times dp: 1.00 everywhere if D2 were all.
    relative = [c.upstream * dp for c, (_, dp, _) in zip(comparisons, LAYOUTS * (len(comparisons) // len(LAYOUTS)))]
    strengths = [c.upstream for c in comparisons]
    return Finding(
        side_by_side.defect("D5"),
        upstream_off=max(relative) / min(relative) > 1.2,
        plugin_right=all(c.plugin_is_right for c in comparisons),
        summary=f"strength {min(strengths):.2f} to {max(strengths):.2f} on four ranks; {worst_error(comparisons)}",
        header=("layout and flags", *Comparison.HEADER, "plain aux_loss, to its own truth"),
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D5", show))
