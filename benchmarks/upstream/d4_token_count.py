"""D4: with a padding mask each rank takes the whole group's token count for its own.

`get_tokens_per_expert_and_token_count` sums the routing map, all-reduces the sum in place, and then counts "local" tokens from
the same tensor, which by now holds the group's. The count scales the loss under `--calculate-per-token-loss`.

Shown: the count that Megatron hands on, on two ranks with different numbers of valid tokens, and the strength of `main_grad`
with per-token loss, without and with a padding mask. (Releases before 0.16 have no padding mask: nothing to show.)

    python benchmarks/upstream/d4_token_count.py

Threads: NVIDIA/Megatron-LM #7481 (open).
"""

from __future__ import annotations

import sys

import side_by_side
from side_by_side import Finding, Pool, Problem, compare, takes_padding_mask, worst_error

VALID = (10, 6)
LENGTH = 16


def local_token_count() -> float:
    """In a worker: what upstream takes for this rank's number of valid tokens."""
    import one_router
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    logits = torch.randn(LENGTH, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    padding = torch.arange(LENGTH) >= VALID[dist.get_rank()]
    (reading,) = one_router.read("global_aux_loss", [(logits, padding)])
    return float(reading.attach_arguments["valid_token_count"])


def show(pool: Pool) -> Finding:
    unmasked = compare(pool, Problem("global", 2, 3, per_token=True))
    rows = [("per-token loss, no mask: gradient, strength", "1.00", f"{unmasked.upstream:.2f}", f"{unmasked.plugin:.2f}")]
    comparisons = [unmasked]
    off, counts = False, "no padding mask in this release"
    if takes_padding_mask():
        taken = pool.run(local_token_count, 2)
        for rank, (own, upstream) in enumerate(zip(VALID, taken)):
            rows.append((f"rank {rank}: its valid tokens", str(own), f"{upstream:.0f}", "not used"))
            off |= abs(upstream - own) > side_by_side.OFF
        masked = compare(pool, Problem("global", 2, 3, per_token=True, masks="uneven"))
        rows.append(("per-token loss, mask: gradient, strength", "1.00", f"{masked.upstream:.2f}", f"{masked.plugin:.2f}"))
        comparisons.append(masked)
        counts = f"ranks with {VALID[0]} and {VALID[1]} valid tokens are taken for {taken[0]:.0f} and {taken[1]:.0f}"
    return Finding(
        side_by_side.defect("D4"),
        upstream_off=off,
        plugin_right=all(comparison.plugin_is_right for comparison in comparisons),
        summary=f"{counts}; {worst_error(comparisons)}",
        header=("case (dp 2)", "truth", "upstream", "plugin"),
        rows=rows,
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D4", show))
