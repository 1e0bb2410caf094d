"""One real `TopKRouter` outside of a model: what its load-balancing loss does to its scores.

Given f the loss is linear in the scores, so its gradient is the same for every token: E numbers, from which the f that was
really used, and the strength, can be read back. The scripts of this folder run it in their workers.
Shape suffixes: T tokens on this rank, E experts.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron_log import forget_logged_losses
from torch import Tensor

from megatron_global_lbl import registry

COEFF = 0.02


@dataclass
class Reading:
    """One micro-batch on this rank.

    Attributes:
        gradient: [E] float64, d loss / d score of any token, for alpha = 1 and a schedule that scales by 1.
        selections: [E] int64, the routing map that the router returned, summed over valid tokens.
        tokens: valid tokens.
        loss_arguments: what Megatron handed to `switch_load_balancing_loss_func`, if it called it.
        attach_arguments: what Megatron handed to `attach_and_log_load_balancing_loss`, if it called it.
    """

    gradient: Tensor
    selections: Tensor
    tokens: int
    loss_arguments: dict[str, Any] = field(default_factory=dict)
    attach_arguments: dict[str, Any] = field(default_factory=dict)

    def frequencies(self, tokens_per_rank: float | None = None) -> Tensor:
        """[E] the f of the gradient, if p is a mean over `tokens_per_rank` (default: this rank's valid tokens)."""
        tokens = self.tokens if tokens_per_rank is None else tokens_per_rank
        return self.gradient * tokens / self.gradient.numel()


def read(
    loss_type: str,
    micro_batches: Sequence[tuple[Tensor, Tensor | None]],
    *,
    num_experts: int = 8,
    topk: int = 2,
    bf16: bool = False,
    expert_bias: Tensor | None = None,
    **options: Any,
) -> list[Reading]:
    """Forward and backward of each micro-batch, as one optimizer step. `parallel_state` must be initialised.

    Args:
        loss_type: `--moe-router-load-balancing-type`.
        micro_batches: (logits [T, E] that the router shall have, padding [T] bool or None) per micro-batch.
        num_experts: E.
        topk: experts per token.
        bf16: wrap the router in Megatron's `Float16Module`, as a model in bf16 is.
        expert_bias: [E] added to the scores for the selection only.
        options: more fields of `TransformerConfig`.
    """
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    router_module = importlib.import_module("megatron.core.transformer.moe.router")
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": num_experts,
            "num_attention_heads": 1,
            "num_moe_experts": num_experts,
            "moe_router_topk": topk,
            "moe_router_load_balancing_type": loss_type,
            "moe_aux_loss_coeff": COEFF,
            "moe_router_enable_expert_bias": expert_bias is not None,
            "use_cpu_initialization": True,
            "add_bias_linear": False,
            "bf16": bf16,
            "params_dtype": torch.bfloat16 if bf16 else torch.float32,
            **options,
        }
    )
    router = router_module.TopKRouter(config=config, **_process_groups(router_module.TopKRouter, moe_utils))
    router.set_layer_number(1)
    # The logits are the input: the scores of a test are then chosen freely.
    router.weight.data.copy_(torch.eye(num_experts))
    if expert_bias is not None:
        router.expert_bias.copy_(expert_bias)
    model = Float16Module(config, router) if bf16 else router
    model.train()
    if registry.active() is not None:
        registry.chunk(model)
    scaler = moe_utils.MoEAuxLossAutoScaler
    set_by_schedule, scaler.main_loss_backward_scale = scaler.main_loss_backward_scale, torch.ones(1)
    try:
        return [_one_micro_batch(model, router_module, *micro_batch) for micro_batch in micro_batches]
    finally:
        scaler.main_loss_backward_scale = set_by_schedule
        forget_logged_losses()


def _one_micro_batch(model, router_module, logits_TE: Tensor, padding_T: Tensor | None) -> Reading:
    seen: dict[str, Any] = {}

    def reveal_scores(original):
        def compute_routing_scores_for_aux_loss(*args, **kwargs):
            routing_map, seen["scores"] = original(*args, **kwargs)
            seen["scores"].retain_grad()
            return routing_map, seen["scores"]

        return compute_routing_scores_for_aux_loss

    def reveal_arguments(name: str):
        def make(original):
            signature = inspect.signature(original)

            def call(*args, **kwargs):
                seen[name] = signature.bind(*args, **kwargs).arguments
                return original(*args, **kwargs)

            return call

        return make

    router_class = router_module.TopKRouter
    replaced = [
        (router_module, "compute_routing_scores_for_aux_loss", reveal_scores),
        (router_module, "switch_load_balancing_loss_func", reveal_arguments("loss")),
        (router_class, "attach_and_log_load_balancing_loss", reveal_arguments("attach")),
    ]
    mask = {} if padding_T is None else {"padding_mask": padding_T.unsqueeze(1)}
    inputs = logits_TE.unsqueeze(1).requires_grad_()
    with _Replaced(replaced):
        probs, routing_map = model(inputs, **mask)
        (probs.sum() * 0).backward()
    selected = routing_map if padding_T is None else routing_map & ~padding_T.unsqueeze(1)
    return Reading(
        gradient=seen["scores"].grad[0].double() / COEFF,
        selections=selected.sum(dim=0),
        tokens=logits_TE.shape[0] if padding_T is None else int((~padding_T).sum()),
        loss_arguments=seen.get("loss", {}),
        attach_arguments={k: v for k, v in seen.get("attach", {}).items() if k != "self"},
    )


class _Replaced:
    """Symbols replaced for the time of a `with` block."""

    def __init__(self, symbols: list[tuple[Any, str, Callable]]) -> None:
        self._symbols = [(owner, name, vars(owner)[name], make) for owner, name, make in symbols]

    def __enter__(self) -> None:
        for owner, name, original, make in self._symbols:
            setattr(owner, name, make(original))

    def __exit__(self, *exc_info: object) -> None:
        for owner, name, original, _ in self._symbols:
            setattr(owner, name, original)


def _process_groups(router_class, moe_utils) -> dict[str, Any]:
    """The router's process-group argument: `pg_collection`, before 0.15 `model_comm_pgs`."""
    if "pg_collection" in inspect.signature(router_class.__init__).parameters:
        return {"pg_collection": moe_utils.get_default_pg_collection()}
    return {"model_comm_pgs": moe_utils.get_default_model_comm_pgs()}
