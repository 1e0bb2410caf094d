"""What Megatron logs of a `Problem`, and what it should."""

from __future__ import annotations

import harness
import truth
from layout import Layout
from megatron_log import reported
from truth import Problem
from workers import Pool

NAMES = {"aux_loss": "load_balancing_loss", "global_aux_loss": "global_load_balancing_loss"}
"""By the type of the loss."""


def logged(
    pool: Pool, problem: Problem, layout: Layout, register: dict | None, extra: dict, names: list[str] | None = None
) -> dict[str, float]:
    """Logged value by name, on rank 0, after the problem's last step; by default for the name of the loss that is on."""
    names = names or [NAMES[extra.get("load_balancing_type", "aux_loss")]]
    return pool.run(_run, layout.world_size(problem), problem, layout, register, extra, names)[0]


def _run(problem: Problem, layout: Layout, register: dict | None, extra: dict, names: list[str]) -> dict[str, float]:
    harness.run(problem, layout, register, extra)
    return reported(names, problem.micro_batches, problem.layers)


def of_the_log(problem: Problem) -> float:
    """Mean over layers of the LBL with alpha = 1, summed over steps, as Megatron's tracker sums until it is read.

    "dp": the mean over micro-batches of what the gradient is of. "global": f and p of the whole step.
    """
    sums = [truth.sums(problem, step) for step in range(problem.steps)]
    value = 0.0
    for step in range(problem.steps):
        for selections_ME, scores_ME, tokens_M in sums[step]:
            if problem.scope == "global":
                selections_ME, scores_ME, tokens_M = (t.sum(0, keepdim=True) for t in (selections_ME, scores_ME, tokens_M))
            f_ME = selections_ME / selections_ME.sum(-1, keepdim=True)
            value += problem.experts * float((f_ME * scores_ME).sum(-1).div(tokens_M).mean())
    return value / problem.layers
