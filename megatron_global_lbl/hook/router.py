"""Hooks `TopKRouter`, where Megatron applies its auxiliary losses (0.14 to 0.19).

Why here: the router is the one place that has the selections, the scores and the padding mask of a micro-batch, and every
layout (TP, EP, CP, PP, MTP, recompute) runs through it. Replaced are

    TopKRouter.routing                     decides once what a forward is, lets it collect its parts, attaches the loss
    router.topk_routing_with_score_function  takes the loss on the logits where kernels compute it (core/fused), and
                                           reveals the selection: expert bias, group limits and replay included, token
                                           dropping not yet applied. An overloaded expert whose surplus is dropped must not
                                           look balanced, so demand is counted, as in GShard and Switch
    router.compute_routing_scores_for_aux_loss  saves the selection that only upstream's losses need (scores.py)
    TopKRouter._apply_aux_loss             reveals the scores, and leaves its own loss out while ours is on
    TopKRouter._apply_global_aux_loss      the same for upstream's global loss, which is taken over (0.15 and later)

Untouched: routing itself, dispatch, z-loss, sequence-level loss, expert bias, logging.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_global_lbl.core.engine import Engine
from megatron_global_lbl.core.router_forward import RouterForward
from megatron_global_lbl.core.router_info import RouterInfo, RouterLoss
from megatron_global_lbl.hook import compatibility, log, refusals, scores
from megatron_global_lbl.hook.models import layer_key
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron

ROUTER = "megatron.core.transformer.moe.router"
OTHER_LOSSES = ("seq_aux_loss",)
LOSS_METHODS = {"aux_loss": "_apply_aux_loss", "global_aux_loss": "_apply_global_aux_loss"}


def install(patches: Patches, engine: Engine) -> None:
    """Let every `TopKRouter` of this process report to `engine`."""
    forwards: list[RouterForward] = []
    takeover = log.Takeover(engine.settings)
    chosen = refusals.asked_for(engine.settings)

    def wrap_routing(original):
        def routing(self, logits, padding_mask=None, **kwargs):
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            forward = begin(self) if self.training else None
            if forward is None:
                return original(self, logits, **kwargs)
            forward.sequences = logits.shape[1] if logits.dim() > 2 else 1
            forwards.append(forward)
            forward.score_function = self.score_function
            try:
                probs, routing_map = original(self, logits, **kwargs)
            finally:
                forwards.pop()
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            replays = getattr(self, "router_replay", None) is not None  # since 0.16
            if replays and forward.replaces and not self.config.calculate_per_token_loss:
                refusals.refuse_repeated_experts(forward.selection, mask, self.topk, chosen)
            return engine.finish(forward, probs=probs, padding_mask=mask), routing_map

        return routing

    def begin(router) -> RouterForward | None:
        if not _acts(router):
            engine.note_router_without_loss(router)
            if not engine.looks_on or router.routing_type in refusals.UNSEEN:
                return None
        if engine.was_trained(router) and _gradient_is_gone(router):
            engine.begin_step([router])
        loss = _loss(router)
        forward = engine.begin(router, lambda: _info(router, chosen), loss)
        if forward is not None and forward.replaces and loss is not None:
            takeover.say(loss.kind, forward.layer.info)
        return forward

    def wrap_topk(original):
        def topk_routing_with_score_function(logits, *args, **kwargs):
            if not forwards:
                return original(logits, *args, **kwargs)
            forward = forwards[-1]
            known = scores.known(forward.score_function, logits.dtype)
            logits = engine.before_selection(forward, logits, forward.score_function if known else None)
            probs, routing_map = original(logits, *args, **kwargs)
            forward.selection = _require_map(routing_map, probs)
            return probs, routing_map

        return topk_routing_with_score_function

    def wrap_scores(original):
        def compute_routing_scores_for_aux_loss(logits, topk, score_function, fused=False, padding_mask=None, **kwargs):
            forward = forwards[-1] if forwards else None
            if forward is not None and forward.attached is not None:
                return forward.selection, None  # nobody needs them: the loss is on the logits already
            if forward is not None and forward.replaces and forward.loss.alone:
                own = scores.scores_only(logits, score_function, padding_mask)
                if own is not None:
                    return forward.selection, own
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            routing_map, of_losses = original(logits, topk, score_function, fused=fused, **kwargs)
            if forward is not None and forward.loss is None:  # of another loss: what looks on may have them
                forward.scores = of_losses
            return routing_map, of_losses

        return compute_routing_scores_for_aux_loss

    def wrap_loss(kind):
        def make(original):
            def apply_loss(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs):
                if forwards and forwards[-1].loss is not None and forwards[-1].loss.kind == kind:
                    forwards[-1].scores = scores_for_aux_loss
                    if forwards[-1].replaces:
                        return probs
                return original(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs)

            return apply_loss

        return make

    patches.wrap(ROUTER, "TopKRouter.routing", wrap_routing)
    patches.wrap(ROUTER, "topk_routing_with_score_function", wrap_topk)
    patches.wrap(ROUTER, "compute_routing_scores_for_aux_loss", wrap_scores)
    for kind, method in LOSS_METHODS.items():
        if kind == "aux_loss" or compatibility.has_global_aux_loss():
            patches.wrap(ROUTER, f"TopKRouter.{method}", wrap_loss(kind))


def _require_map(routing_map, probs: Tensor) -> Tensor:
    """The selection, if it is one that can be counted.

    Raises:
        UnsupportedMegatron: it is something else (a fused kernel of another release, a replaced function).
    """
    if isinstance(routing_map, Tensor) and routing_map.dtype is torch.bool and routing_map.shape == probs.shape:
        return routing_map
    found = f"{routing_map.dtype} {list(routing_map.shape)}" if isinstance(routing_map, Tensor) else type(routing_map).__name__
    raise UnsupportedMegatron(
        f"{ROUTER}.topk_routing_with_score_function gave the selection as {found} beside probabilities {list(probs.shape)}; "
        f"allowed: torch.bool of the probabilities' shape, as in Megatron-Core {SUPPORTED}; without --moe-router-fusion if it "
        "comes from Transformer Engine's kernel"
    )


def _acts(router) -> bool:
    """Whether it has an auxiliary loss for a scope to act on, whatever the coefficient."""
    return not LOSS_METHODS.keys().isdisjoint(refusals.kinds_of(router.routing_type))


def _loss(router) -> RouterLoss | None:
    """The loss that the scope acts on as the configuration has it now, or None if its coefficient is 0.

    Raises:
        ConfigError: the router has two of them.
    """
    coeffs = {kind: router.get_aux_loss_coeff(kind) for kind in (*LOSS_METHODS, *OTHER_LOSSES)}
    found = [kind for kind in LOSS_METHODS if coeffs[kind] > 0]
    refusals.refuse_two_losses(found, "--moe-lbl-scope")
    if not found:
        return None
    alone = not any(coeffs[kind] > 0 for kind in OTHER_LOSSES)
    return RouterLoss(found[0], coeffs[found[0]] / _applications(router), alone)


def _gradient_is_gone(router) -> bool:
    """A new step has begun in a loop without Megatron's DDP: the gradient of the router's last backward was set to None."""
    weight = router.weight
    # Megatron's DDP and FSDP take the gradient away themselves, and say when a step begins.
    has_wrapper = hasattr(weight, "main_grad") or hasattr(weight, "get_main_grad")
    return weight.requires_grad and weight.grad is None and not has_wrapper


def _applications(router) -> int:
    """How often the layer runs per micro-batch: a repeated layer of multi-token prediction adds its loss once per repetition,
    and Megatron gives each an equal share."""
    config = router.config
    is_mtp = getattr(router, "is_mtp_layer", False)  # an attribute since 0.17
    return (is_mtp and getattr(config, "mtp_use_repeated_layer", False) and config.mtp_num_layers) or 1


def _info(router, chosen: str) -> RouterInfo:
    """What the engine needs to know of a router.

    Raises:
        ConfigError: its configuration is one that `chosen` cannot be right with.
    """
    config = router.config
    refusals.refuse_config(config, chosen)
    stage, model = compatibility.process_groups(router)
    num_layers = config.num_layers + (config.mtp_num_layers or 0)
    number = router.layer_number  # None in a layer outside of a model, which Megatron does not log
    if number is not None and getattr(router, "is_mtp_layer", False):
        number += config.num_layers
    applications = _applications(router)

    def log_loss(loss_sum: Tensor, kind: str) -> None:
        share = loss_sum / applications if applications > 1 else loss_sum
        log.log_aux_loss(log.KEYS[kind], share, number, num_layers, model)

    return RouterInfo(
        key=layer_key(router),
        stage=stage,
        model=model,
        stage_name=compatibility.stage_name(stage),
        num_experts=config.num_moe_experts,
        topk=router.topk,
        num_layers=num_layers,
        mtp_layers=config.mtp_num_layers or 0,
        applications=applications,
        per_token=config.calculate_per_token_loss,
        device=router.weight.device,
        backward_scale=compatibility.backward_scale(config),
        acts=_acts(router),
        log=log_loss,
    )
