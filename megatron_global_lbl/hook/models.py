"""The MoE routers of a model."""

from __future__ import annotations

from typing import Any

from torch import nn


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
    from megatron.core.transformer.moe.router import TopKRouter

    named: dict[str, nn.Module] = {}
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        for router in (module for module in chunk.modules() if isinstance(module, TopKRouter)):
            key, twins = layer_key(router), 1
            name = key
            while name in named:
                twins += 1
                name = f"{key}#{twins}"
            named[name] = router
    return named
