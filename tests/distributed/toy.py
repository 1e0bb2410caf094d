"""The toy model of truth.py in Megatron's terms: one pipeline stage's chunk, with real routers or real MoE layers.

Imported in workers only: it imports Megatron.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from layout import Layout
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from truth import Problem, expert_bias


class Block(torch.nn.Module):
    """a = h W^T, the MoE part on a, h = tanh(a)."""

    def __init__(self, config, problem: Problem, layout: Layout, number: int, groups: Any = None) -> None:
        super().__init__()
        self.layout = layout
        self.number = number
        self.below = torch.nn.Parameter(torch.empty(problem.hidden, problem.hidden, dtype=config.params_dtype))
        self.below.sequence_parallel = config.sequence_parallel
        self.moe: Any = None
        if number not in problem.dense:
            is_mtp = number > problem.layers
            if layout.moe == "layer":
                self.moe = _moe_layer(config, number, is_mtp)
            else:
                self.moe = _router(config, number, is_mtp, groups)
            if problem.bias:
                self.router.expert_bias.copy_(expert_bias(problem))
            if layout.frozen is not None:
                (self.router.weight if layout.frozen == "router" else self.below).requires_grad_(False)

    @property
    def router(self):
        return self.moe.router if self.layout.moe == "layer" else self.moe

    def forward(self, h: Tensor, padding: Tensor | None) -> Tensor:
        if self.layout.recompute in ("full", "nested") and self.training:
            return tensor_parallel.checkpoint(partial(self.compute, padding=padding), False, h)
        return self.compute(h, padding)

    def compute(self, h: Tensor, padding: Tensor | None) -> Tensor:
        a = h @ self.below.t()
        if self.moe is None:
            return torch.tanh(a)
        if self.layout.moe == "layer":  # Megatron's MoE layer takes the mask as [batch, sequence]
            masks = {} if padding is None else {"padding_mask": padding.t()}
            carrier, _ = self.moe(a, **masks)
        else:
            masks = {} if padding is None else {"padding_mask": padding}
            route = partial(self.moe, **masks)
            if self.layout.recompute in ("selective", "nested"):
                carrier, _ = tensor_parallel.checkpoint(route, False, a)
            else:
                carrier, _ = route(a)
        # The loss' backward comes through `carrier`; times zero it adds nothing to the value.
        return torch.tanh(a) + carrier.sum().to(a.dtype) * 0


class Chunk(MegatronModule):
    """The blocks of one model chunk of one pipeline stage."""

    def __init__(self, config, problem: Problem, layout: Layout, stage: int, chunk: int, groups: Any = None) -> None:
        super().__init__(config)
        stages, chunks = problem.pipeline
        self.problem = problem
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process = (stage, chunk) == (0, 0)
        self.post_process = (stage, chunk) == (stages - 1, chunks - 1)
        self.vp_stage = chunk if chunks > 1 else None
        self.input_tensor: Tensor | None = None
        numbers = [n for n in range(1, problem.blocks + 1) if problem.stage_and_chunk(n) == (stage, chunk)]
        self.blocks = torch.nn.ModuleList([Block(config, problem, layout, n, groups) for n in numbers])

    def set_input_tensor(self, input_tensor) -> None:
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> None:
        """Asked for with multi-token prediction; the toy has no embedding."""

    def load(self, weights: list[tuple[Tensor, Tensor]]) -> None:
        for block in self.blocks:
            block.below.data.copy_(weights[block.number - 1][0])
            if block.moe is not None:
                block.router.weight.data.copy_(weights[block.number - 1][1])

    def build_schedule_plan(self, x: Tensor, padding: Tensor | None):
        """What combined 1F1B runs instead of `forward`."""
        from schedule_plan import schedule_plan

        return schedule_plan(self, x, padding)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        h = x if self.input_tensor is None else self.input_tensor
        h = h.to(self.config.params_dtype)
        if self.pre_process and self.training:  # as an embedding's output: a checkpointed layer needs it
            h = h.detach().requires_grad_()
        for block in self.blocks:
            for _ in range(self.problem.mtp_applications if block.number > self.problem.layers else 1):
                h = block(h, padding)
        return h


def _router(config, number: int, is_mtp: bool, groups: Any):
    arguments = _process_groups(TopKRouter) if groups is None else {"pg_collection": groups}
    router = TopKRouter(config=config, **arguments, **({"is_mtp_layer": True} if is_mtp else {}))
    # Megatron numbers the layers of multi-token prediction from 1 again.
    router.set_layer_number(number - config.num_layers if is_mtp else number)
    return router


def _moe_layer(config, number: int, is_mtp: bool):
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    build = partial(build_module, spec) if isinstance(spec, ModuleSpec) else spec
    arguments: dict[str, Any] = {"is_mtp_layer": True} if is_mtp else {}
    own_number = number - config.num_layers if is_mtp else number
    layer = build(config=config, layer_number=own_number, **arguments)
    layer.set_layer_number(own_number)  # the router, too
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return layer


def _process_groups(router_class) -> dict[str, Any]:
    """The router's process-group argument: `pg_collection`, before 0.15 `model_comm_pgs`."""
    from megatron.core.transformer.moe import moe_utils

    if "pg_collection" in inspect.signature(router_class.__init__).parameters:
        return {"pg_collection": moe_utils.get_default_pg_collection()}
    return {"model_comm_pgs": moe_utils.get_default_model_comm_pgs()}
