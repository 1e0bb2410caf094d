"""Hooks `TopKRouter`, where Megatron applies its auxiliary losses (0.14 to 0.19).

Why here: the router is the one place that has the selections, the scores and the padding mask of a micro-batch, and every
layout (TP, EP, CP, PP, MTP, recompute) runs through it. Replaced are

    TopKRouter.routing                     gives one forward a place to collect its parts, then attaches the loss
    router.topk_routing_with_score_function  reveals the selection: expert bias, group limits and replay included, token
                                           dropping not yet applied. An overloaded expert whose surplus is dropped must not
                                           look balanced, so demand is counted, as in GShard and Switch
    router.compute_routing_scores_for_aux_loss  saves the selection that only upstream's losses need (scores.py)
    TopKRouter._apply_aux_loss             reveals the scores, and leaves its own loss out while ours is on
    TopKRouter._apply_global_aux_loss      the same for upstream's global loss, which is taken over (0.15 and later)

Untouched: routing itself, dispatch, z-loss, sequence-level loss, expert bias, logging.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_global_lbl.engine import Engine
from megatron_global_lbl.facts import RouterFacts
from megatron_global_lbl.hook import compatibility
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.hook.scores import scores_only
from megatron_global_lbl.hook.step import current_iteration
from megatron_global_lbl.passes import Pass, current_pass
from megatron_global_lbl.settings import ConfigError

ROUTER = "megatron.core.transformer.moe.router"
OTHER_LOSSES = ("seq_aux_loss",)
LOSS_METHODS = {"aux_loss": "_apply_aux_loss", "global_aux_loss": "_apply_global_aux_loss"}


@dataclass
class _Forward:
    """One router forward, from the outside in."""

    router: object
    selection: Tensor | None = None
    scores: Tensor | None = None


def install(patches: Patches, engine: Engine) -> None:
    """Let every `TopKRouter` of this process report to `engine`."""
    forwards: list[_Forward] = []

    def wrap_routing(original):
        def routing(self, logits, padding_mask=None, **kwargs):
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            forwards.append(_Forward(self))
            try:
                probs, routing_map = original(self, logits, **kwargs)
            finally:
                forward = forwards.pop()
            which = current_pass(training=self.training, recomputed=compatibility.recomputes_router(self.config))
            if which is Pass.NONE:
                return probs, routing_map
            facts = engine.facts(self, lambda: router_facts(self))
            if facts is None:
                return probs, routing_map
            assert forward.selection is not None
            probs = engine.route(
                self,
                facts,
                which=which,
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

    def wrap_scores(original):
        def compute_routing_scores_for_aux_loss(logits, topk, score_function, fused=False, padding_mask=None, **kwargs):
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            forward = forwards[-1] if forwards else None
            if forward is not None and engine.replaces_loss(current_iteration()):
                facts = engine.facts(forward.router, lambda: router_facts(forward.router))
                scores = None
                if facts is not None and facts.only_loss:
                    scores = scores_only(logits, score_function, fused, padding_mask)
                if scores is not None:
                    return forward.selection, scores
            return original(logits, topk, score_function, fused=fused, **kwargs)

        return compute_routing_scores_for_aux_loss

    def wrap_loss(loss_type):
        def make(original):
            def apply_loss(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs):
                facts = engine.facts(self, lambda: router_facts(self)) if forwards else None
                if facts is not None and facts.loss_type == loss_type:
                    forwards[-1].scores = scores_for_aux_loss
                    if engine.replaces_loss(current_iteration()):
                        return probs
                return original(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs)

            return apply_loss

        return make

    patches.wrap(ROUTER, "TopKRouter.routing", wrap_routing)
    patches.wrap(ROUTER, "topk_routing_with_score_function", wrap_topk)
    patches.wrap(ROUTER, "compute_routing_scores_for_aux_loss", wrap_scores)
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


def router_facts(router) -> RouterFacts | None:
    """What the engine needs to know of a router; None if it has no loss that the scope acts on.

    Raises:
        ConfigError: the router's configuration is one in which the counts would be wrong.
    """
    config = router.config
    compatibility.refuse_unsupported_config(config)
    found = loss_type_and_coeff(router)
    if found is None:
        return None
    loss_type, coeff = found
    is_mtp = getattr(router, "is_mtp_layer", False)  # an attribute since 0.17
    repeated = is_mtp and getattr(config, "mtp_use_repeated_layer", False) and config.mtp_num_layers
    # A repeated MTP layer adds its loss once per repetition; Megatron gives each an equal share.
    applications = config.mtp_num_layers if repeated else 1
    share = 1.0 / applications
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
        loss_type=loss_type,
        only_loss=not any(router.get_aux_loss_coeff(kind) > 0 for kind in OTHER_LOSSES),
        coeff=coeff * share,
        stage=stage,
        model=model,
        pipeline_stage=compatibility.pipeline_stage(),
        topk=router.topk,
        recomputed=compatibility.recomputes_router(config),
        applications=applications,
        per_token=config.calculate_per_token_loss,
        backward_scale=backward_scale,
        log=log,
    )
