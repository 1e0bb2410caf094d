"""The losses in Megatron's log, and the message about a `global_aux_loss` that is replaced."""

from __future__ import annotations

import functools
import importlib.util

import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.core.router import RouterInfo
from megatron_global_lbl.settings import Scope, Settings

KEYS = {"aux_loss": "load_balancing_loss", "global_aux_loss": "global_load_balancing_loss"}
"""Megatron's name in the log of each loss that a scope acts on."""


@functools.cache
def _has_metrics_tracker() -> bool:
    return importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None


def log_aux_loss(name: str, loss: Tensor, layer_number: int, num_layers: int, model: dist.ProcessGroup) -> None:
    """Hand a layer's loss to Megatron's own logging, which sums over TP x CP and averages over data-parallel ranks."""
    if _has_metrics_tracker():
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().record(name, loss, layer_number, num_layers, reduce_group=model)
    else:  # the tracker of 0.18 ends this
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, loss, layer_number, num_layers, reduce_group=model)


class Takeover:
    """Logs once what replacing upstream's `global_aux_loss` changes (docs/upstream.md, D2)."""

    def __init__(self, settings: Settings) -> None:
        self._logged = settings.scope is Scope.MICRO

    def say(self, info: RouterInfo) -> None:
        """At a forward of a router with this loss; the first rank of a stage prints."""
        if self._logged:
            return
        self._logged = True
        if info.leads_stage:
            dp = info.data_parallel_size
            print(
                f"> moe-lbl: !! Megatron's global_aux_loss is replaced: its gradient is {dp} (the data-parallel size) times "
                f"too weak, so the strength rises by a factor of {dp}. To keep the former strength divide "
                f"--moe-aux-loss-coeff by {dp}. The routers' global_tokens_per_expert stays 0: --moe-lbl-metrics shows the "
                "balance.",
                flush=True,
            )
