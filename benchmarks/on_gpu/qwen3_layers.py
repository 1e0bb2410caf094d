"""Layers of Qwen3-30B-A3B's shape around Megatron's own MoELayer, without Transformer Engine.

From its config.json: hidden 2048, 32 heads of 128 with 4 key-value heads, 128 experts of 768, top-8. Megatron's router,
dispatcher and MoELayer are the real ones. Attention is PyTorch's (flash) and the experts are two grouped matrix products:
Megatron's local ones (all scores in memory, one expert after the other) would make a step several times longer, in which an
overhead would not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from routers import COEFF
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int = 8
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_size: int = 128
    experts: int = 128
    topk: int = 8
    ffn: int = 768
    tokens: int = 8192  # 16384 took 0.59 s per step of two on an H200: one round of stage_steps.py in its time


class GroupedExperts(nn.Module):
    """All experts of a layer in two grouped matrix products (`torch.nn.functional.grouped_mm`)."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        size = {"dtype": config.params_dtype, "device": device()}
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        self.up_and_gate = nn.Parameter(torch.randn(num_local_experts, hidden, 2 * ffn, **size) * 0.02)
        self.down = nn.Parameter(torch.randn(num_local_experts, ffn, hidden, **size) * 0.02)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        ends = tokens_per_expert.cumsum(0).to(tokens.device, torch.int32)
        up, gate = F.grouped_mm(tokens, self.up_and_gate, offs=ends).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * probs.unsqueeze(-1)).to(tokens.dtype)
        return F.grouped_mm(inner, self.down, offs=ends), None


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)); x is [S, 1, H]."""

    def __init__(self, config: TransformerConfig, shape: Shape, number: int) -> None:
        super().__init__()
        self.shape = shape
        place = {"dtype": config.params_dtype, "device": device()}
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_size
        self.norm, self.moe_norm = (nn.RMSNorm(shape.hidden, eps=1e-6, **place) for _ in range(2))
        self.qkv = nn.Linear(shape.hidden, width, bias=False, **place)
        self.out = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False, **place)
        self.moe = MoELayer(config, MoESubmodules(experts=GroupedExperts), layer_number=number)
        self.moe.set_layer_number(number)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        heads = self.qkv(self.norm(x)).view(x.shape[0], x.shape[1], -1, shape.head_size).permute(1, 2, 0, 3)
        query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.permute(2, 0, 1, 3).flatten(2))
        return x + self.moe(self.moe_norm(x))[0]


class Model(MegatronModule):
    """The layers, as Megatron's schedule wants a model."""

    def __init__(self, config: TransformerConfig, shape: Shape) -> None:
        super().__init__(config)
        self.model_type, self.share_embeddings_and_output_weights = ModelType.encoder_or_decoder, False
        self.pre_process = self.post_process = True
        self.layers = nn.ModuleList([Layer(config, shape, number) for number in range(1, shape.layers + 1)])

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is no other pipeline stage."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def device() -> torch.device:
    return torch.empty(0, device="cuda").device


def build(shape: Shape) -> tuple[TransformerConfig, DistributedDataParallel]:
    """(config, the model in Megatron's DDP with fp32 gradients), with routers for either of Megatron's losses."""
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_load_balancing_type=["aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[COEFF, COEFF],
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
    )
    config.finalize_model_grads_func = finalize_model_grads
    # What Float16Module does: the router's weight and buffers are bf16.
    module = Model(config, shape).bfloat16().to(device())
    model = DistributedDataParallel(
        config=config, ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), module=module
    )
    return config, model.train()


def run_step(model: DistributedDataParallel, shape: Shape, batches: list[Tensor]) -> None:
    """Forwards, backwards and the step's end in Megatron's schedule; no optimizer."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def loss(output: Tensor) -> tuple[Tensor, dict]:
        return output.float().square().mean(), {}

    def forward(iterator: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Any]:
        return model(next(iterator)), loss

    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=shape.tokens,
        micro_batch_size=1,
        forward_only=False,
    )


@contextmanager
def loss_of(variant: Any, model: DistributedDataParallel) -> Iterator[None]:
    """The model with this loss while inside."""
    variant.choose([model])
    with variant.active():
        yield
