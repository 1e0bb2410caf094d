"""What the plugin says in Megatron's log."""

from __future__ import annotations


def takeover_notice(data_parallel_size: int) -> str:
    """What must be said when a scope takes over upstream's `global_aux_loss` (docs/upstream.md, D2)."""
    dp = data_parallel_size
    return (
        f"!! Megatron's global_aux_loss is taken over: its gradient is {dp} (the data-parallel size) times too weak, so "
        f"the strength rises by a factor of {dp}. To keep the former strength divide --moe-aux-loss-coeff by {dp}."
    )
