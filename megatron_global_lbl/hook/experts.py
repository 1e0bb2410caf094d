"""The experts of a MoE layer from outside: all of them on some tokens, and their weights (0.14 to 0.19).

An expert lies whole, or in parts (expert tensor parallelism), on one rank of the expert-parallel group. What is said of a
rank's experts here is about that rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.hook.models import layer_key


class MoeLayer:
    """Megatron's `MoELayer`, as far as a comparison of its experts needs it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._experts = layer.experts
        dispatcher = layer.token_dispatcher
        self.router = layer.router
        self.key: str = layer_key(layer.router)
        self.expert_parallel: dist.ProcessGroup = dispatcher.ep_group
        self.expert_tensor: dist.ProcessGroup = dispatcher.tp_group

    @property
    def no_outputs(self) -> str | None:
        """Why `outputs` cannot be asked for, or None."""
        config = self._layer.config
        if getattr(config, "moe_latent_size", None):
            return "the experts work in a latent space (--moe-latent-size)"
        if config.add_bias_linear and self.expert_tensor.size() > 1:
            return "experts with biases are divided over ranks (--expert-tensor-parallel-size)"
        return None

    def outputs(self, hidden_TH: Tensor) -> Tensor:
        """[local experts, T, H] what each of this rank's experts makes of every token, the gate left out: this rank's part,
        which is summed over `expert_tensor`.
        """
        local, tokens = self._layer.num_local_experts, hidden_TH.shape[0]
        rows = hidden_TH.repeat(local, 1)
        # On the CPU, where Megatron's dispatchers have it, too: the experts make a list of it.
        tokens_per_expert = torch.full((local,), tokens, dtype=torch.int64, device="cpu")
        gates = torch.ones(len(rows), dtype=torch.float32, device=rows.device)
        output, _ = self._experts(rows, tokens_per_expert, gates)
        return output.view(local, tokens, -1)

    def weights(self) -> list[list[Tensor]] | None:
        """This rank's part of every weight matrix, flat: for each matrix a list over the local experts. None for a kind of
        experts that is not known here.
        """
        if type(self._experts).__name__ == "SequentialMLP":
            experts = self._experts.local_experts
            matrices = [[getattr(expert, name).weight for expert in experts] for name in ("linear_fc1", "linear_fc2")]
        elif hasattr(getattr(self._experts, "linear_fc1", None), "weight0"):  # Transformer Engine's grouped linear layers
            linears = (self._experts.linear_fc1, self._experts.linear_fc2)
            matrices = [[getattr(linear, f"weight{i}") for i in range(self._layer.num_local_experts)] for linear in linears]
        else:
            return None
        return [[weight.detach().reshape(-1) for weight in matrix] for matrix in matrices]

    @property
    def kind(self) -> str:
        """The class of the experts."""
        return type(self._experts).__name__
