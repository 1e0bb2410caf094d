"""D9: with a padding mask `global_aux_loss` hands a floating-point token count to Transformer Engine's fused loss kernel.

Without a mask the count is a Python integer. With one Megatron divides a sum by top-k, which makes a float32 tensor; since
NVIDIA/TransformerEngine#2898 (in 2.18) a tensor is read as one 64-bit integer on the device.

Shown here: the type of the argument, on the CPU, where it is on its way to the kernel (`--moe-router-fusion` passes it on
unchanged). NOT shown here: the kernel itself and what it makes of the argument; that needs a GPU and Transformer Engine
>= 2.18. The plugin does not call this kernel: its gradient needs E numbers, and it is compared with the truth.

    python benchmarks/upstream/d9_fused_count_dtype.py

Threads: NVIDIA/TransformerEngine#2898.
"""

from __future__ import annotations

import sys

import side_by_side
from side_by_side import Finding, Pool, Problem, compare, takes_padding_mask


def count_handed_over(scope: str | None, with_mask: bool) -> str:
    """In a worker: type of the token count in the call of the loss function; "not called" if it is not called."""
    import contextlib

    import one_router
    import torch
    from megatron.core import parallel_state

    import megatron_global_lbl as lbl

    parallel_state.initialize_model_parallel()
    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(16) >= 10 if with_mask else None
    with lbl.registered(scope=scope) if scope else contextlib.nullcontext():
        (reading,) = one_router.read("global_aux_loss", [(logits, mask)])
    if "total_num_tokens" not in reading.loss_arguments:
        return "not called"
    count = reading.loss_arguments["total_num_tokens"]
    return str(count.dtype) if isinstance(count, torch.Tensor) else type(count).__name__


def show(pool: Pool) -> Finding:
    rows, kinds = [], {}
    masks = (False, True) if takes_padding_mask() else (False,)
    for with_mask in masks:
        kinds[with_mask] = [pool.run(count_handed_over, 1, scope, with_mask)[0] for scope in (None, "global")]
        rows.append(("padding mask" if with_mask else "no mask", "an integer", *kinds[with_mask]))
    comparison = compare(pool, Problem("global", 2, 3, masks="uneven" if takes_padding_mask() else "none"))
    seen = kinds[masks[-1]][0]
    return Finding(
        side_by_side.defect("D9"),
        upstream_off="float" in seen,
        plugin_right=all(plugin == "not called" for _, plugin in kinds.values()) and comparison.plugin_is_right,
        summary=f"{seen} handed over with{'' if masks[-1] else 'out'} a mask (the kernel itself: not run); plugin: "
        f"{kinds[masks[-1]][1]}",
        header=("case", "what the kernel reads", "upstream hands over", "plugin"),
        rows=rows,
        notes=["the kernel was not run: it needs a GPU and Transformer Engine >= 2.18"],
    )


if __name__ == "__main__":
    sys.exit(side_by_side.main("D9", show))
