"""D1: the counters of `global_aux_loss` are float buffers, so a bf16 model rounds them.

Upstream keeps `global_tokens_per_expert` and `ga_steps` as float buffers of the router. `Float16Module` casts the buffers of
a bf16 model to bf16, which has 8 significant bits: counts are rounded at once, and `ga_steps` stops at 256, because 256 + 1
rounds to 256. f drifts with the number of micro-batches and in the end no longer sums to 1. The plugin's counts are int64 and
no buffers.

Shown: one real `TopKRouter` in Megatron's `Float16Module`, 600 micro-batches of 64 tokens. f is read back from the gradient of
the scores; the truth is counted from the router's own routing maps.

    python benchmarks/upstream/d1_rounded_counters.py

Threads: no issue names it; NVIDIA/Megatron-LM #7081 mended the same mistake for the expert bias.
"""

from __future__ import annotations

import sys

import side_by_side
from side_by_side import Finding, Pool

MICRO_BATCHES = 600
SHOWN_AT = (1, 16, 64, 256, 300, 600)


def frequencies(scope: str | None) -> list[tuple[list[float], list[int]]]:
    """In a worker: per micro-batch (f of the gradient, selections so far); scope None is upstream."""
    import contextlib

    import one_router
    import torch
    from megatron.core import parallel_state

    import megatron_global_lbl as lbl

    parallel_state.initialize_model_parallel()
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(64, 8, generator=generator) + torch.linspace(0, 1.5, 8) for _ in range(MICRO_BATCHES)]
    loss_type = "global_aux_loss" if scope is None else "aux_loss"
    with lbl.registered(scope=scope) if scope else contextlib.nullcontext():
        readings = one_router.read(loss_type, [(micro_batch, None) for micro_batch in logits], bf16=True)
    so_far = torch.stack([reading.selections for reading in readings]).cumsum(0)
    return [(reading.frequencies().tolist(), counts.tolist()) for reading, counts in zip(readings, so_far)]


def show(pool: Pool) -> Finding:
    seen = {name: pool.run(frequencies, 1, scope)[0] for name, scope in (("upstream", None), ("plugin", "global"))}
    rows, worst = [], {"upstream": 0.0, "plugin": 0.0}
    for m in range(MICRO_BATCHES):
        cells = [str(m + 1), "1.0000"]
        for name in ("upstream", "plugin"):
            f, counts = seen[name][m]
            off = max(abs(value * sum(counts) / count - 1) for value, count in zip(f, counts))
            worst[name] = max(worst[name], off)
            cells += [f"{sum(f):.4f}", f"{off:.1e}" if off < side_by_side.OFF else f"{off:.1%}"]
        if m + 1 in SHOWN_AT:
            rows.append(tuple(cells))
    return Finding(
        side_by_side.defect("D1"),
        upstream_off=worst["upstream"] > side_by_side.OFF,
        plugin_right=worst["plugin"] <= side_by_side.RELATIVE_ERROR,
        summary=f"f off by up to {worst['upstream']:.0%} within {MICRO_BATCHES} micro-batches; plugin {worst['plugin']:.0e}",
        header=("micro-batches", "true sum of f", "upstream's", "its f off by up to", "plugin's", "its f off by up to"),
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D1", show))
