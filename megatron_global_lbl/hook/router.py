"""Hooks `TopKRouter`, where Megatron applies its auxiliary losses (0.14 to 0.19).

Why here: the router is the one place that has the selections, the scores and the padding mask of a micro-batch, and every
layout (TP, EP, CP, PP, MTP, recompute) runs through it. Replaced are

    TopKRouter.routing                     gives one forward a place to collect its parts, then attaches the loss
    router.topk_routing_with_score_function  reveals the selection: expert bias, group limits and replay included, token
                                           dropping not yet applied. An overloaded expert whose surplus is dropped must not
                                           look balanced, so demand is counted, as in GShard and Switch
    TopKRouter._apply_aux_loss             reveals the scores, and leaves its own loss out while ours is on
    TopKRouter._apply_global_aux_loss      the same for upstream's global loss, which is taken over (0.15 and later)

Untouched: routing itself, dispatch, z-loss, sequence-level loss, expert bias, logging.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_global_lbl.engine import Engine
from megatron_global_lbl.facts import RouterFacts
from megatron_global_lbl.hook import compatibility
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.hook.step import current_iteration
from megatron_global_lbl.settings import ConfigError

ROUTER = "megatron.core.transformer.moe.router"
LOSS_METHODS = {"aux_loss": "_apply_aux_loss", "global_aux_loss": "_apply_global_aux_loss"}


@dataclass
class _Forward:
    """One router forward, from the outside in."""

    selection: Tensor | None = None
    scores: Tensor | None = None


def install(patches: Patches, engine: Engine) -> None:
    """Let every `TopKRouter` of this process report to `engine`."""
    forwards: list[_Forward] = []

    def wrap_routing(original):
        def routing(self, logits, padding_mask=None, **kwargs):
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            forwards.append(_Forward())
            try:
                probs, routing_map = original(self, logits, **kwargs)
            finally:
                forward = forwards.pop()
            if not (self.training and torch.is_grad_enabled()):
                return probs, routing_map
            if forward.scores is None:
                engine.route_without_loss()
                return probs, routing_map
            assert forward.selection is not None
            probs = engine.route(
                self,
                lambda: router_facts(self),
                probs=probs,
                scores=forward.scores,
                selection=forward.selection,
                padding_mask=None if padding_mask is None else padding_mask.reshape(-1),
                iteration=current_iteration(),
            )
            return probs, routing_map

        return routing

    def wrap_topk(original):
        def topk_routing_with_score_function(*args, **kwargs):
            probs, routing_map = original(*args, **kwargs)
            if forwards:
                forwards[-1].selection = routing_map
            return probs, routing_map

        return topk_routing_with_score_function

    def wrap_loss(loss_type):
        def make(original):
            def apply_loss(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs):
                if forwards and loss_type_and_coeff(self) and loss_type_and_coeff(self)[0] == loss_type:
                    forwards[-1].scores = scores_for_aux_loss
                    if engine.replaces_loss(current_iteration()):
                        return probs
                return original(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs)

            return apply_loss

        return make

    patches.wrap(ROUTER, "TopKRouter.routing", wrap_routing)
    patches.wrap(ROUTER, "topk_routing_with_score_function", wrap_topk)
    for loss_type, method in LOSS_METHODS.items():
        if loss_type == "aux_loss" or compatibility.has_global_aux_loss():
            patches.wrap(ROUTER, f"TopKRouter.{method}", wrap_loss(loss_type))


def loss_type_and_coeff(router) -> tuple[str, float] | None:
    """The loss that the scope acts on and its coefficient, or None if this router has none.

    Raises:
        ConfigError: the router has both losses: which one should become global is not to be guessed.
    """
    found = [(kind, router.get_aux_loss_coeff(kind)) for kind in LOSS_METHODS]
    found = [(kind, coeff) for kind, coeff in found if coeff > 0]
    if len(found) > 1:
        raise ConfigError(
            "--moe-router-load-balancing-type has both aux_loss and global_aux_loss; allowed with --moe-lbl-scope: one of "
            "them, and --moe-lbl-micro-coeff for a micro-batch loss beside it"
        )
    return found[0] if found else None


def router_facts(router) -> RouterFacts:
    """What the engine needs to know of a router.

    Raises:
        ConfigError: the router's configuration is one in which the counts would be wrong.
    """
    config = router.config
    compatibility.refuse_unsupported_config(config)
    found = loss_type_and_coeff(router)
    assert found is not None
    loss_type, coeff = found
    is_mtp = getattr(router, "is_mtp_layer", False)  # an attribute since 0.17
    repeated = is_mtp and getattr(config, "mtp_use_repeated_layer", False) and config.mtp_num_layers
    # A repeated MTP layer adds its loss once per repetition; Megatron gives each an equal share.
    share = 1.0 / config.mtp_num_layers if repeated else 1.0
    stage, model = compatibility.process_groups(router)
    backward_scale = compatibility.backward_scale(model, config)
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    layer_number = router.layer_number
    if is_mtp:
        layer_number += config.num_layers
    log_key = {"aux_loss": "load_balancing_loss", "global_aux_loss": "global_load_balancing_loss"}[loss_type]

    def log(loss_sum: Tensor) -> None:
        compatibility.log_aux_loss(log_key, loss_sum * share, layer_number, num_layers, model)

    return RouterFacts(
        key=f"mtp.{router.layer_number}" if is_mtp else str(router.layer_number),
        coeff=coeff * share,
        stage=stage,
        model=model,
        pipeline_stage=compatibility.pipeline_stage(),
        topk=router.topk,
        per_token=config.calculate_per_token_loss,
        backward_scale=backward_scale,
        log=log,
    )
