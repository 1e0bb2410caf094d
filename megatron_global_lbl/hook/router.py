"""Hooks `TopKRouter`, where Megatron applies its auxiliary losses (0.14 to 0.19).

Why here: the router is the one place that has the selections, the scores and the padding mask of a micro-batch, and every
layout (TP, EP, CP, PP, MTP, recompute) runs through it. Replaced are

    TopKRouter.routing                     decides once what a forward is, lets it collect its parts, attaches the loss
    router.topk_routing_with_score_function  attaches the loss to the logits where kernels compute it (core/fused), and shows
                                           the selection: expert bias, group limits and replay included, token dropping not yet
                                           applied. An overloaded expert whose surplus is dropped must not look balanced, so
                                           demand is counted, as in GShard and Switch
    router.compute_routing_scores_for_aux_loss  saves the selection that only upstream's losses need (scores.py), when
                                           Megatron's own `routing` calls it for them; serves any other caller as it was
    TopKRouter._apply_aux_loss             shows the scores, and leaves its own loss out while ours is on
    TopKRouter._apply_global_aux_loss      the same for upstream's global loss, which is replaced, too (0.15 and later)

Untouched: routing itself, dispatch, z-loss, sequence-level loss, expert bias, logging.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from megatron_global_lbl.core.chunk import Layer
from megatron_global_lbl.core.forward import Forwards, RouterForward
from megatron_global_lbl.core.router import RouterInfo, RouterLoss
from megatron_global_lbl.hook import compatibility, loss_log, refusals, scores
from megatron_global_lbl.hook.models import ROUTER, layer_key, router_class
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.hook.versions import SUPPORTED, UnsupportedMegatron
from megatron_global_lbl.settings import ConfigError, Scope, Settings

LOSS_METHODS = {"aux_loss": "_apply_aux_loss", "global_aux_loss": "_apply_global_aux_loss"}
OTHER_LOSSES = ("seq_aux_loss",)


def install(patches: Patches, of_routers: Forwards) -> Bypasses:
    """Let every `TopKRouter` of this process report. Returns what finds routers that do not."""
    forwards: list[RouterForward] = []
    steps = of_routers.steps
    takeover = loss_log.Takeover(of_routers.settings)
    chosen = refusals.asked_for(of_routers.settings)
    layers = steps.layers
    bypasses = Bypasses(of_routers.settings)
    steps.find = lambda router: _info(router, chosen)

    def wrap_routing(original):
        def routing(self, logits, padding_mask=None, **kwargs):
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            forward = begin(self, logits) if self.training else None
            if forward is None:
                return original(self, logits, **kwargs)
            forwards.append(forward)
            forward.score_function = self.score_function
            try:
                probs, routing_map = original(self, logits, **kwargs)
            finally:
                forwards.pop()
            _refuse_bypass(self, forward)
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            if of_routers.needs_scores_now(forward):
                forward.scores = scores.scores_only(logits.reshape(-1, logits.shape[-1]), self.score_function, mask)
            replays = getattr(self, "router_replay", None) is not None  # since 0.16
            if replays and forward.ours and not self.config.calculate_per_token_loss:
                refusals.refuse_repeated_experts(forward.selection, mask, self.topk, chosen)
            return of_routers.finish(forward, probs=probs, padding_mask=mask), routing_map

        return routing

    def begin(router, logits) -> RouterForward | None:
        bypasses.reported(router)
        layer = layers.get(router)
        if layer is None and not is_seen(router, steps.observer is not None):
            return None
        loss = _loss(router, layer)
        forward = of_routers.begin(router, layer, loss, logits.shape[1] if logits.dim() > 2 else 1)
        if loss is not None and loss.kind == "global_aux_loss" and forward is not None and forward.ours:
            takeover.say(forward.layer.info)
        return forward

    def wrap_topk(original):
        def topk_routing_with_score_function(logits, *args, **kwargs):
            if not forwards:
                return original(logits, *args, **kwargs)
            forward = forwards[-1]
            known = scores.known(forward.score_function, logits.dtype)
            logits = of_routers.before_selection(forward, logits, forward.score_function if known else None)
            probs, routing_map = original(logits, *args, **kwargs)
            forward.selection = _require_map(routing_map, probs)
            return probs, routing_map

        return topk_routing_with_score_function

    def serves_losses_only() -> bool:
        """The caller's caller is Megatron's own `routing`, which uses the result for its losses alone."""
        caller = sys._getframe(2).f_code
        if caller.co_name != "routing" or caller.co_filename != sys.modules[ROUTER].__file__:
            return False
        observing = getattr(sys.modules[ROUTER], "is_observing_tensor", None)  # diagnostics of the router, since 0.20
        return observing is None or not observing("router_diagnostics")

    def wrap_scores(original):
        def compute_routing_scores_for_aux_loss(logits, topk, score_function, fused=False, padding_mask=None, **kwargs):
            forward = forwards[-1] if forwards else None
            if forward is not None and forward.ours and serves_losses_only():
                if forward.attached is not None:
                    return forward.selection, None  # nobody needs the scores: the loss is on the logits
                if forward.loss.alone:
                    own = scores.scores_only(logits, score_function, padding_mask)
                    if own is not None:
                        return forward.selection, own
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            routing_map, of_losses = original(logits, topk, score_function, fused=fused, **kwargs)
            if forward is not None and forward.loss is None:  # of another loss, or of diagnostics
                forward.scores = of_losses
            return routing_map, of_losses

        return compute_routing_scores_for_aux_loss

    def wrap_loss(kind):
        def make(original):
            def apply_loss(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs):
                if forwards and forwards[-1].loss is not None and forwards[-1].loss.kind == kind:
                    forwards[-1].scores = scores_for_aux_loss
                    if forwards[-1].ours:
                        forwards[-1].left_out = True
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
    bypasses.ours = _methods("forward", "routing")
    return bypasses


def _methods(*names: str) -> dict[str, Any]:
    return {name: inspect.getattr_static(router_class(), name) for name in names}


class Bypasses:
    """Forwards of routers that do not run Megatron's `TopKRouter.routing`: of a subclass, or with a method of the instance.

    Only routers that could do so carry a forward hook.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.ours: dict[str, Any] = {}
        self._calls: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # since the last step's end
        self._reported: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hooks: list[Any] = []

    def watch(self, router: nn.Module) -> None:
        """Count the forwards of this router that do not report, if it can have any."""
        if router in self._calls or _has_only(router, self.ours):
            return
        self._calls[router] = 0
        self._hooks.append(router.register_forward_hook(self._count))

    def _count(self, router: nn.Module, inputs: Any, output: Any) -> None:
        if router in self._reported:
            self._reported.discard(router)
        elif router.training and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in _as_tuple(output)):
            self._calls[router] += 1

    def reported(self, router: nn.Module) -> None:
        if self._calls and router in self._calls:
            self._reported.add(router)

    def refuse(self, routers: list[nn.Module] | None, lost: list[str]) -> None:
        """At a step's end of these routers (None: of all); `lost` are symbols that were replaced after `register`.

        Raises:
            ConfigError: routers with a loss for the scope, or that are recorded, were trained without reporting.
        """
        silent = []
        for router in list(self._calls) if routers is None else routers:
            if self._calls.get(router) and (self._settings.observes or _loss(router, None)):
                silent.append(router)
            if router in self._calls:
                self._calls[router] = 0
        if silent:
            refusals.refuse_replaced_symbols(lost)
            acts = self._settings.scope is not Scope.MICRO
            keys = ", ".join(layer_key(router) for router in silent)
            raise ConfigError(
                f"{refusals.asked_for(self._settings)} did not {'act on' if acts else 'record'} MoE layer(s) {keys}: "
                f"{_where(silent[0], 'routing', 'forward')} does not call Megatron's TopKRouter.routing"
                f"{', so these layers train their own loss' if acts else ''}. Let it call super(), or remove the "
                "--moe-lbl flags"
            )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _has_only(router: nn.Module, methods: dict[str, Any]) -> bool:
    return all(inspect.getattr_static(router, name) is method for name, method in methods.items())


def _as_tuple(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)


def _where(router: nn.Module, *names: str) -> str:
    """The class, file and line of the first of these methods that is not Megatron's."""
    for name in names:
        method = inspect.getattr_static(router, name)
        code = getattr(inspect.unwrap(method, stop=lambda f: _file(f) != __file__), "__code__", None)
        if code is None or code.co_filename != sys.modules[ROUTER].__file__:
            place = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
            return f"{type(router).__name__}.{name}{place}"
    return f"{type(router).__module__}.{type(router).__name__}"


def _file(function: Any) -> str | None:
    """Where its code is; `functools.wraps` does not change it."""
    return getattr(getattr(function, "__code__", None), "co_filename", None)


def _refuse_bypass(router, forward: RouterForward) -> None:
    """
    Raises:
        ConfigError: the router's routing did not use Megatron's selection or losses, which the plugin replaces.
    """
    key = forward.layer.info.key
    if forward.selection is None:
        raise ConfigError(
            f"the selection of MoE layer {key} is unknown: {_where(router, 'routing', 'forward')} does not select through "
            f"{ROUTER}.topk_routing_with_score_function. Let it call that function by this name, or remove the --moe-lbl flags"
        )
    if forward.ours and forward.loss is not None and not forward.left_out and torch.is_grad_enabled():
        method = LOSS_METHODS[forward.loss.kind]
        raise ConfigError(
            f"the loss of MoE layer {key} was not replaced: {_where(router, method, 'routing')} does not call Megatron's "
            f"TopKRouter.{method}. Let it call super().{method}, or remove --moe-lbl-scope"
        )


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


def has_loss(router) -> bool:
    """Whether it has an auxiliary loss for a scope to act on, whatever the coefficient."""
    kinds = router.routing_type  # a single one is a string
    return kinds in LOSS_METHODS if isinstance(kinds, str) else not LOSS_METHODS.keys().isdisjoint(kinds)


def _balancing(router) -> tuple[str, ...]:
    kinds = tuple(kind for kind in refusals.kinds_of(router.routing_type) if kind != "none")
    return (*kinds, "expert_bias") if getattr(router, "enable_expert_bias", False) else kinds


def _bias(of_router: weakref.ref) -> Tensor | None:
    router = of_router()
    bias = getattr(router, "expert_bias", None)
    return getattr(router, "qb_beta", None) if bias is None else bias  # of quantile balancing, since 0.19


def is_seen(router, observed: bool) -> bool:
    """Whether its forwards are counted."""
    return has_loss(router) or (observed and router.routing_type not in refusals.UNSEEN)


def _loss(router, layer: Layer | None) -> RouterLoss | None:
    """The loss that the scope acts on as the configuration has it now, or None if its coefficient is 0.

    Args:
        router: whose loss.
        layer: its layer, if there is one: keeps the answer as long as the coefficients stay.

    Raises:
        ConfigError: the router has two of them.
    """
    coeff_of = router.get_aux_loss_coeff
    numbers = (coeff_of("aux_loss"), coeff_of("global_aux_loss"), coeff_of("seq_aux_loss"))
    if layer is not None and layer.coeffs == numbers:
        return layer.loss
    coeffs = dict(zip((*LOSS_METHODS, *OTHER_LOSSES), numbers))
    found = [kind for kind in LOSS_METHODS if coeffs[kind] > 0]
    refusals.refuse_two_losses(found, "--moe-lbl-scope")
    loss = None
    if found:
        own_method = not _has_only(router, _methods(LOSS_METHODS[found[0]]))  # of a subclass, which may read the scores
        alone = not own_method and not any(coeffs[kind] > 0 for kind in OTHER_LOSSES)
        loss = RouterLoss(found[0], coeffs[found[0]] / _applications(router), alone)
    if layer is not None:
        layer.coeffs, layer.loss = numbers, loss
    return loss


def gradients_are_gone(routers) -> bool:
    """A new step has begun in a loop without Megatron's DDP: the gradients of the last backward were set to None."""
    weights = [router.weight for router in routers if router.weight.requires_grad]
    # Megatron's DDP and FSDP take the gradient away themselves, and say when a step begins.
    return bool(weights) and not any(
        hasattr(weight, "main_grad") or weight.grad is not None or hasattr(weight, "get_main_grad") for weight in weights
    )


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
        loss_log.log_aux_loss(loss_log.KEYS[kind], share, number, num_layers, model)

    return RouterInfo(
        key=layer_key(router),
        number=-1 if number is None else number - 1,
        stage=stage,
        model=model,
        num_experts=config.num_moe_experts,
        topk=router.topk,
        combined=bool(getattr(config, "overlap_moe_expert_parallel_comm", False)),  # since 0.15
        applications=applications,
        per_token=config.calculate_per_token_loss,
        device=router.weight.device,
        backward_scale=compatibility.backward_scale(config),
        has_loss=has_loss(router),
        balancing=_balancing(router),
        expert_parallel=config.expert_model_parallel_size,
        bias=functools.partial(_bias, weakref.ref(router)),
        log=log_loss,
    )
