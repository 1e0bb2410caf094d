"""What the hook tells about a router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BackwardScale = Callable[[], "Tensor | float"]
"""Reads the factor of every auxiliary loss' gradient; called in the backward."""


class RouterLoss(NamedTuple):
    """The loss that the scope acts on, as a router has it in one forward: training may change coefficients.

    Attributes:
        kind: Megatron's type, "aux_loss" or "global_aux_loss".
        coeff: alpha, > 0; divided by the layer's applications per micro-batch.
        alone: nothing else uses the router's scores: another auxiliary loss, or a subclass' own method.
    """

    kind: str
    coeff: float
    alone: bool


@dataclass(frozen=True, eq=False)
class RouterInfo:
    """A router; all of it is fixed for the router's life.

    Attributes:
        key: the layer within its model: its number in the whole model, from 0, or "mtp.N" for multi-token prediction.
        number: its row in Megatron's log, in which multi-token prediction comes last; -1 for a layer outside of a model.
        stage: process group of the pipeline stage (TP x CP x DP).
        model: process group of one data-parallel rank (TP x CP).
        num_experts: E.
        topk: experts per token.
        combined: combined 1F1B (`--overlap-moe-expert-parallel-comm`), which runs layers outside of the chunk's forward.
        applications: runs per micro-batch; more than 1 in a repeated multi-token prediction layer.
        per_token: `--calculate-per-token-loss`.
        device: of its tensors.
        backward_scale: see `BackwardScale`.
        has_loss: it has an auxiliary loss for the scope to act on, whatever its coefficient.
        balancing: names of everything that balances its experts: types of losses, "expert_bias", "quantile_balancing".
        expert_parallel: ranks over which the experts are divided.
        bias: gives the [E] bias of its experts as it is now; None without one.
        log: takes the layer's LBL at the step's end (sum over micro-batches, this rank's share) and the loss' kind.
    """

    key: str
    number: int
    stage: dist.ProcessGroup
    model: dist.ProcessGroup
    num_experts: int
    topk: int
    combined: bool
    applications: int
    per_token: bool
    device: torch.device
    backward_scale: BackwardScale
    has_loss: bool
    balancing: tuple[str, ...]
    expert_parallel: int
    bias: Callable[[], Tensor | None]
    log: Callable[[Tensor, str], None]

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks of the stage."""
        return self.stage.size() // self.model.size()

    @property
    def leads_stage(self) -> bool:
        """True on the stage's first rank, which prints for all of them."""
        return dist.get_rank() == min(dist.get_process_group_ranks(self.stage))
