"""The toy model as Megatron's combined 1F1B sees a GPT model: Megatron's schedule plan and callables of a layer, with a layer
whose attention is the toy's matrix and whose residual is the toy's tanh."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class _Layer(TransformerLayer):
    """A block of the toy under the names that Megatron's callables of a layer use."""

    def __init__(self, config, block) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(config=config, block=block, mlp=block.moe, hidden_dropout=0.0)
        self.offload_mlp_norm = self.recompute_pre_mlp_layernorm = False
        self.pre_mlp_layernorm = torch.nn.Identity()
        self.backward_dw_wrapper: Any = None
        self.bias_dropout_add_exec_handler = contextlib.nullcontext

    def _forward_attention(self, hidden_states: Tensor, **_: Any):
        return hidden_states @ self.block.below.t(), None

    def mlp_bda(self, training: bool, fused: bool):
        # As in `Block.compute`: the loss' backward comes through the carrier.
        return lambda output_and_bias, a, dropout: torch.tanh(a) + output_and_bias[0].sum().to(a.dtype) * 0

    def init_backward_dw_wrapper(self) -> None:
        """For weight gradients that are computed later."""


class _Model:
    """A chunk of the toy under the names that Megatron's schedule plan uses."""

    def __init__(self, chunk) -> None:
        self.config, self.vp_stage = chunk.config, chunk.vp_stage
        self.pre_process, self.post_process = chunk.pre_process, chunk.post_process
        layers = [_Layer(chunk.config, block) for block in chunk.blocks]
        self.decoder = SimpleNamespace(layers=layers, final_layernorm=None, input_tensor=chunk.input_tensor)

    def _preprocess(self, decoder_input: Tensor, **_: Any):
        if self.pre_process:  # as an embedding's output
            decoder_input = decoder_input.to(self.config.params_dtype).detach().requires_grad_()
        return decoder_input, None, None, None, None, None

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def schedule_plan(chunk, x: Tensor, padding: Tensor | None) -> TransformerModelChunkSchedulePlan:
    """The plan of one forward of `chunk`. Megatron's combined 1F1B hands no padding to routers."""
    assert padding is None
    return TransformerModelChunkSchedulePlan(_Model(chunk), None, None, None, decoder_input=x)
