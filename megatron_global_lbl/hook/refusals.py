"""What cannot be right: before training with Megatron's arguments, and at the first forward with the
configuration, which name these things alike. Every message names what was found and what is allowed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_global_lbl.hook import compatibility
from megatron_global_lbl.hook.arguments import data_parallel_size
from megatron_global_lbl.hook.loss_log import KEYS
from megatron_global_lbl.settings import ConfigError, Scope, Settings, flag

UNSEEN = ("sinkhorn",)
"""Types of load balancing that do not select through `topk_routing_with_score_function`."""

PROVEN_WRAPPERS = "Megatron's DDP, or --use-megatron-fsdp on Megatron-Core 0.19 or 0.20 (no other was proven right)"


def asked_for(settings: Settings) -> str:
    """The flag that needs MoE layers: the scope, or in scope `micro` the metrics."""
    if settings.scope is Scope.MICRO and settings.metrics_dir is not None:
        return f"{flag('metrics_dir')} {settings.metrics_dir}"
    if settings.scope is Scope.MICRO and settings.metrics is not None:
        return f"{flag('metrics')} {settings.metrics.value}"
    return f"{flag('scope')} {settings.scope.value}"


def kinds_of(load_balancing_type: str | list[str]) -> list[str]:
    """Types of load balancing, of which Megatron keeps a single one as a string."""
    return [load_balancing_type] if isinstance(load_balancing_type, str) else list(load_balancing_type)


def losses(args: Any) -> dict[str, float]:
    """Coefficient by type of auxiliary loss, from Megatron's two ways of writing them."""
    coeffs = args.moe_aux_loss_coeff
    coeffs = list(coeffs) if isinstance(coeffs, (list, tuple)) else [coeffs]
    return dict(zip(kinds_of(args.moe_router_load_balancing_type), coeffs))


def refuse_fsdp(args: Any, chosen: str) -> None:
    """
    Raises:
        ConfigError: the gradients of this sharding are untested.
    """
    if getattr(args, "use_torch_fsdp2", False):
        raise ConfigError(f"{chosen} is not supported with --use-torch-fsdp2; allowed: {PROVEN_WRAPPERS}")
    if not getattr(args, "use_megatron_fsdp", False):
        return
    if not compatibility.proven_fsdp():
        raise ConfigError(f"{chosen} is not supported with --use-megatron-fsdp; allowed: {PROVEN_WRAPPERS}")
    version = getattr(args, "megatron_fsdp_version", 1)  # an argument since 0.20
    if version != 1:
        raise ConfigError(f"{chosen} is not supported with --megatron-fsdp-version {version} (untested); allowed: 1")
    if compatibility.cuda_graphs(args) != "none":
        raise ConfigError(f"{chosen} with --use-megatron-fsdp is not supported with CUDA graphs (untested): remove one of them")


def refuse_config(config: Any, chosen: str) -> None:
    """
    Args:
        config: a TransformerConfig, or Megatron's arguments, which name these fields alike.
        chosen: `asked_for`.

    Raises:
        ConfigError: routers do not run once per micro-batch, alike on all ranks.
    """
    if getattr(config, "hybrid_context_parallel", False):
        raise ConfigError(
            f"{chosen} is not supported with --hybrid-context-parallel, under which ranks run their routers unequally often; "
            "remove one of them"
        )
    chunks = getattr(config, "mlp_chunks_for_training", 1)  # since 0.18
    if chunks > 1:
        raise ConfigError(
            f"{chosen} is not supported with --mlp-chunks-for-training {chunks}, which runs each router {chunks} times per "
            "micro-batch; allowed: 1"
        )


def refuse_repeated_experts(selection: Tensor, padding_mask: Tensor | None, topk: int, chosen: str) -> None:
    """For routing replay, whose indices come from elsewhere: the number of tokens is that of the selections over top-k.

    Args:
        selection: [T, E] bool.
        padding_mask: [T] bool, True for padding, or None.
        topk: experts per token.
        chosen: `asked_for`.

    Raises:
        ConfigError: a valid token selects fewer than top-k experts. On a GPU the assertion ends the process, without a host
            synchronisation.
    """
    whole_T = selection.sum(dim=1) == topk
    if padding_mask is not None:
        whole_T = whole_T | padding_mask
    message = (
        f"{chosen}: the replayed routing gives a token fewer than --moe-router-topk {topk} experts (repeated indices, padding "
        "for example); allowed: a padding mask for such tokens, or --calculate-per-token-loss"
    )
    if selection.is_cuda:
        torch._assert_async(whole_T.all(), message)
    elif not whole_T.all():
        raise ConfigError(message)


def refuse_arguments(args: Any, settings: Settings) -> None:
    """All that can be told from Megatron's validated arguments.

    Raises:
        ConfigError: the settings cannot work with them.
    """
    chosen = asked_for(settings)
    if settings.scope is Scope.MICRO:
        refuse_nothing_to_see(args, chosen)
    else:
        refuse_nothing_to_act_on(args, chosen)
    settings.require_group_size_fits(data_parallel_size(args))
    refuse_config(args, chosen)
    refuse_fsdp(args, chosen)
    refuse_no_warm_up(args, chosen)
    if settings.start_iter and compatibility.cuda_graphs(args) != "none":
        raise ConfigError(
            f"{flag('start_iter')} {settings.start_iter} does not work with CUDA graphs, whose replays cannot change the loss: "
            "remove it, or the graphs"
        )


def refuse_nothing_to_see(args: Any, chosen: str) -> None:
    """
    Raises:
        ConfigError: no MoE, or one whose selection is not seen.
    """
    if not args.num_experts:
        raise ConfigError(f"{chosen} needs a mixture of experts: --num-experts is not set")
    unseen = [kind for kind in losses(args) if kind in UNSEEN]
    if unseen:
        raise ConfigError(
            f"{chosen} is not supported with --moe-router-load-balancing-type {unseen[0]}, whose selection is not seen; "
            "allowed: aux_loss, seq_aux_loss, global_aux_loss, none"
        )
    refuse_two_losses([kind for kind in losses(args) if kind in KEYS], chosen)


def refuse_nothing_to_act_on(args: Any, chosen: str) -> None:
    """
    Raises:
        ConfigError: no MoE, no load-balancing loss, two of them, or one with coefficient 0.
    """
    if not args.num_experts:
        raise ConfigError(f"{chosen} needs a mixture of experts: --num-experts is not set")
    found = {kind: coeff for kind, coeff in losses(args).items() if kind in KEYS}
    if not found:
        kinds = " ".join(losses(args))
        hint = "aux_loss, alone or in a list (or global_aux_loss, which is replaced)"
        if getattr(args, "moe_router_enable_expert_bias", False):
            hint += (
                ". The expert bias asks for an even load over the global batch already: a global loss beside it changes little"
            )
        raise ConfigError(f"{chosen} has nothing to act on: --moe-router-load-balancing-type is {kinds}; allowed: {hint}")
    refuse_two_losses(list(found), chosen)
    for kind, coeff in found.items():
        if not coeff > 0:
            raise ConfigError(
                f"{chosen} has nothing to act on: --moe-aux-loss-coeff is {coeff:g} for {kind}; allowed: a number > 0"
            )


def refuse_two_losses(kinds: list[str], chosen: str) -> None:
    """
    Raises:
        ConfigError: both losses that a scope could act on are there: which one should become global is not to be guessed.
    """
    if len(kinds) > 1:
        raise ConfigError(
            f"{chosen} with --moe-router-load-balancing-type {' '.join(kinds)}: which of them it should act on is ambiguous; "
            f"allowed: one of them, and {flag('micro_coeff')} for a micro-batch loss beside it"
        )


def refuse_no_warm_up(args: Any, chosen: str) -> None:
    """
    Raises:
        ConfigError: what lives as long as the model would be made within a CUDA graph.
    """
    steps = getattr(args, "cuda_graph_warmup_steps", 1)
    if compatibility.cuda_graphs(args) == "iteration" and steps < 1:
        raise ConfigError(
            f"{chosen} is not supported with full_iteration CUDA graphs and --cuda-graph-warmup-steps {steps}; allowed: 1 or "
            "more"
        )


def refuse_model(model: list, chosen: str) -> None:
    """
    Args:
        model: the wrapped model chunks that `finalize_model_grads` was given.
        chosen: `asked_for`.

    Raises:
        ConfigError: they are wrapped in something whose gradient reduction is untested.
    """
    for chunk in model:
        name = type(chunk).__name__
        if "FullyShardedDataParallel" in name and name != compatibility.proven_fsdp():
            raise ConfigError(f"{chosen} is not supported with {name}; allowed: {PROVEN_WRAPPERS}")


def refuse_replaced_symbols(lost: list[str]) -> None:
    """
    Args:
        lost: dotted paths of symbols that somebody else replaced, in a step whose routers did not report.

    Raises:
        ConfigError: there are some.
    """
    if lost:
        raise ConfigError(
            f"no router of this step reported to --moe-lbl-scope: {', '.join(lost)} was replaced after "
            "`register`; allowed: register after whatever replaces it"
        )


def refuse_two_values(result: Any, config: Any, chosen: str) -> None:
    """
    Args:
        result: what the training's loss function gave.
        config: the model's TransformerConfig.
        chosen: `asked_for`.

    Raises:
        ConfigError: no number of tokens, by which `finalize_model_grads` divides the auxiliary losses with per-token loss.
    """
    if len(result) == 2 and any(losses(config).get(kind, 0) > 0 for kind in KEYS):
        raise ConfigError(
            f"{chosen} with --calculate-per-token-loss: the loss function returned 2 values, so no gradient is divided by the "
            "number of tokens, and auxiliary losses are that much too strong. Let it return 3 values (loss, number of tokens, "
            "what to log), or remove --calculate-per-token-loss"
        )
