"""D7: `global_aux_loss` waits for the network in the forward, once per MoE layer and micro-batch.

f is needed in the backward only. Upstream reduces the counts over TP x CP x DP with a blocking all-reduce in the router's
forward; the plugin starts the reduction there and waits for it in the backward.

Shown: all-reduces issued and waited for inside the routers' forward and outside of it, counted from outside by replacing
`torch.distributed.all_reduce`, for one training step on two data-parallel ranks with two layers and three micro-batches.
What a wait costs depends on the network; `benchmarks/step_cost.py` is about that.

    python benchmarks/upstream/d7_blocking_collectives.py

Threads: none.
"""

from __future__ import annotations

import sys
from typing import Any

import side_by_side
from side_by_side import Finding, Layout, Pool, Problem

PROBLEM = Problem("global", 2, 3)


def count(problem: Problem, layout: Layout, register: dict | None, extra: dict) -> dict[str, int]:
    """In a worker: numbers of all-reduces that a router's forward issued, and where they were waited for."""
    import harness
    import torch.distributed as dist
    from megatron.core.transformer.moe.router import TopKRouter

    counted = {"issued": 0, "waited for in the forward": 0, "waited for later": 0}
    inside: list[bool] = []
    all_reduce, forward = dist.all_reduce, TopKRouter.forward

    class Work:
        def __init__(self, work: Any) -> None:
            self._work = work

        def wait(self, *args: Any) -> Any:
            counted["waited for in the forward" if inside else "waited for later"] += 1
            return self._work.wait(*args)

    def counting_all_reduce(*args: Any, **kwargs: Any) -> Any:
        work = all_reduce(*args, **kwargs)
        if not inside:
            return work
        counted["issued"] += 1
        if kwargs.get("async_op", False) and work is not None:
            return Work(work)
        counted["waited for in the forward"] += 1
        return work

    def marked_forward(*args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    dist.all_reduce, TopKRouter.forward = counting_all_reduce, marked_forward
    try:
        harness.run(problem, layout, register, extra)
    finally:
        dist.all_reduce, TopKRouter.forward = all_reduce, forward
    return counted


def show(pool: Pool) -> Finding:
    runs = {
        "upstream aux_loss (local f)": (None, {}),
        "upstream global_aux_loss": (None, side_by_side.UPSTREAM),
        "plugin, scope global": (side_by_side.PLUGIN, {}),
    }
    seen = {name: pool.run(count, 2, PROBLEM, Layout(), register, extra)[0] for name, (register, extra) in runs.items()}
    blocking = {name: counted["waited for in the forward"] for name, counted in seen.items()}
    comparison = side_by_side.compare(pool, PROBLEM)
    return Finding(
        side_by_side.defect("D7"),
        upstream_off=blocking["upstream global_aux_loss"] > 0,
        plugin_right=not blocking["plugin, scope global"] and comparison.plugin_is_right,
        summary=f"{blocking['upstream global_aux_loss']} waits in the forward for {PROBLEM.layers} layers x "
        f"{PROBLEM.micro_batches} micro-batches; plugin {blocking['plugin, scope global']}",
        header=("2 layers x 3 micro-batches", "issued in the forward", "waited for there", "waited for later"),
        rows=[(name, *map(str, counted.values())) for name, counted in seen.items()],
        notes=["the plugin starts one reduction per micro-batch for all layers, at the end of the model's forward"],
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D7", show))
