"""The MoE routers of a model."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from megatron_global_lbl.hook import refusals
from megatron_global_lbl.hook.loss_log import KEYS
from megatron_global_lbl.settings import ConfigError

ROUTER = "megatron.core.transformer.moe.router"


def router_class() -> Any:
    """Megatron's `TopKRouter`, also where a framework has put a subclass under its name."""
    found = importlib.import_module(ROUTER).TopKRouter
    return next((c for c in found.__mro__ if c.__module__ == ROUTER and c.__name__ == "TopKRouter"), found)


def refuse_other_routers(model: nn.Module, chosen: str) -> None:
    """
    Raises:
        ConfigError: a MoE layer of Megatron's has a loss by its configuration, and a router that is no `TopKRouter`.
    """
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    for layer in (module for module in model.modules() if isinstance(module, BaseMoELayer)):
        router = getattr(layer, "router", None)
        found = refusals.losses(layer.config) if isinstance(router, nn.Module) else {}
        if not isinstance(router, router_class()) and any(found.get(kind, 0) > 0 for kind in KEYS):
            kind = type(router)
            place = getattr(sys.modules.get(kind.__module__), "__file__", kind.__module__)
            raise ConfigError(
                f"{chosen} cannot reach MoE layer {layer_key(layer)}: its router {kind.__name__} ({place}) is no TopKRouter of "
                "Megatron's. Let it extend megatron.core.transformer.moe.router.TopKRouter, or remove the --moe-lbl flags"
            )


def layer_key(router: Any) -> str:
    """Names a layer within its model: its number, or "mtp.N" for multi-token prediction (told apart since 0.17).

    Numbers are from 0, as in Megatron's own log (`moe/load_balancing_loss_layer_3`) and its checkpoints (`decoder.layers.3`); a
    router outside of a model has none and is "None".
    """
    number = None if router.layer_number is None else router.layer_number - 1
    return f"mtp.{number}" if getattr(router, "is_mtp_layer", False) else str(number)


def routers_of(model: nn.Module | list[nn.Module]) -> dict[str, nn.Module]:
    """By `layer_key`, in the order of the model; a name that comes again (multi-token prediction before 0.17) gets a number.

    Args:
        model: a module, or the list of a model's chunks on this rank, wrapped in DDP or not.
    """
    router_type = router_class()
    named: dict[str, nn.Module] = {}
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        for router in (module for module in chunk.modules() if isinstance(module, router_type)):
            key, twins = layer_key(router), 1
            name = key
            while name in named:
                twins += 1
                name = f"{key}#{twins}"
            named[name] = router
    return named
