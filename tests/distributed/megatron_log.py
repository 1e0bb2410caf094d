"""Megatron's log of auxiliary losses, which is global in a process and sized by the first model that writes to it."""

from __future__ import annotations

import importlib.util
from typing import Any


def forget_logged_losses() -> None:
    """Empty the log."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging"):
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:  # the tracker of 0.18 ends this
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()


def reported(names: list[str], micro_batches: int, layers: int) -> dict[str, float]:
    """What the training loop would print for these names: mean over layers and micro-batches. The log is empty then."""
    values: dict[str, Any] = {}
    arguments: dict[str, Any] = {
        "loss_scale": 1 / micro_batches,
        "iteration": 1,
        "writer": None,
        "force_initialize": True,
        "track_names": names,
        "num_layers": layers,
        "total_loss_dict": values,
    }
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging"):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().report(**arguments)
    else:  # the tracker of 0.18 ends this
        from megatron.core.transformer.moe.moe_utils import track_moe_metrics

        track_moe_metrics(**arguments)
    forget_logged_losses()
    return {name: float(value) for name, value in values.items()}
