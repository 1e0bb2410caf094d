"""What Megatron logs of a `Problem`."""

from __future__ import annotations

import harness
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
