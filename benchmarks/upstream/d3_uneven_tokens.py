"""D3: with uneven token counts f of `global_aux_loss` does not sum to 1.

Upstream divides the mean of the counts over micro-batches by the tokens of the current micro-batch, and where the ranks hold
different numbers of tokens each takes its own number times the group's size for the total.

Shown: f read back from the gradient of one router in micro-batches of 48, 16 and 32 tokens; the total that two ranks with 10
and 11 tokens assume; and `main_grad` in a whole model with sequences of uneven length, with a padding mask where the release
has one.

    python benchmarks/upstream/d3_uneven_tokens.py

Threads: NVIDIA/Megatron-LM #7213 (open), #7214 (draft).
"""

from __future__ import annotations

import sys

import side_by_side
from side_by_side import Finding, Pool, Problem, compare, takes_padding_mask

TOKENS = (48, 16, 32)


def sums_of_f(scope: str | None, tokens: tuple[tuple[int, ...], ...]) -> list[tuple[float, float]]:
    """In a worker: per micro-batch (sum of f, tokens that the loss took for the total). `tokens` is [micro-batch][rank]."""
    import contextlib

    import one_router
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    import megatron_global_lbl as lbl

    parallel_state.initialize_model_parallel()
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    micro_batches = [(torch.randn(counts[dist.get_rank()], 8, generator=generator), None) for counts in tokens]
    with lbl.registered(scope=scope) if scope else contextlib.nullcontext():
        readings = one_router.read("global_aux_loss" if scope is None else "aux_loss", micro_batches)
    result = []
    for reading, counts in zip(readings, tokens):
        # Upstream's p is a mean over all ranks' tokens (D2), the plugin's over the mean number per rank.
        total = float(reading.loss_arguments.get("total_num_tokens", sum(counts)))
        own = total if scope is None else total / len(counts)
        result.append((float(reading.frequencies(own).sum()), total))
    return result


def show(pool: Pool) -> Finding:
    rows, upstream_off, plugin_right = [], False, True
    over_micro_batches = [pool.run(sums_of_f, 1, scope, tuple((n,) for n in TOKENS))[0] for scope in (None, "global")]
    for tokens, upstream, plugin in zip(TOKENS, *over_micro_batches):
        rows.append((f"micro-batch of {tokens} tokens: sum of f", "1.00", f"{upstream[0]:.2f}", f"{plugin[0]:.2f}"))
        upstream_off |= abs(upstream[0] - 1) > side_by_side.OFF
        plugin_right &= abs(plugin[0] - 1) <= side_by_side.RELATIVE_ERROR
    sums = [upstream[0] for upstream in over_micro_batches[0]]
    over_ranks = [pool.run(sums_of_f, 2, scope, ((10, 11),)) for scope in (None, "global")]
    for rank, (own, upstream, plugin) in enumerate(zip((10, 11), *over_ranks)):
        (upstream,), (plugin,) = upstream, plugin
        rows.append((f"rank {rank} with {own} tokens: total of both", "21", f"{upstream[1]:.0f}", f"{plugin[1]:.0f}"))
        rows.append((f"rank {rank} with {own} tokens: sum of f", "1.00", f"{upstream[0]:.2f}", f"{plugin[0]:.2f}"))
        plugin_right &= abs(plugin[0] - 1) <= side_by_side.RELATIVE_ERROR
    for masks in ("ragged", "uneven") if takes_padding_mask() else ("ragged",):
        comparison = compare(pool, Problem("global", 2, 3, masks=masks))
        what = {"ragged": "uneven lengths", "uneven": "uneven padding"}[masks]
        for text, value in (("gradient, strength", "upstream"), ("gradient, direction off by", "upstream_direction")):
            number = getattr(comparison, value)
            true, plugin_cell = (
                ("1.00", f"{comparison.plugin:.2f}") if value == "upstream" else ("0%", f"{comparison.plugin_direction:.1%}")
            )
            rows.append(
                (f"{what}, dp 2: {text}", true, f"{number:.2f}" if value == "upstream" else f"{number:.1%}", plugin_cell)
            )
        plugin_right &= comparison.plugin_is_right
    return Finding(
        side_by_side.defect("D3"),
        upstream_off=upstream_off,
        plugin_right=plugin_right,
        summary="sum of f "
        + ", ".join(f"{s:.2f}" for s in sums)
        + f" for {', '.join(map(str, TOKENS))} tokens; plugin "
        + ", ".join(f"{plugin[0]:.2f}" for plugin in over_micro_batches[1]),
        header=("case", "truth", "upstream", "plugin"),
        rows=rows,
        notes=["the plugin's gradient is compared with the truth as a vector: relative error <= 1e-5 in every case"],
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D3", show))
