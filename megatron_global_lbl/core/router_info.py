"""What the hook tells the engine of a router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BackwardScale = Callable[[], "Tensor | float"]
"""What every gradient of an auxiliary loss is multiplied with, asked for in the backward."""


class RouterLoss(NamedTuple):
    """The loss that the scope acts on, as a router has it in one forward: training may change coefficients.

    Attributes:
        kind: Megatron's type, "aux_loss" or "global_aux_loss".
        coeff: alpha, > 0; share of it if the layer is applied several times per micro-batch.
        alone: no other auxiliary loss uses the router's scores.
    """

    kind: str
    coeff: float
    alone: bool


@dataclass(frozen=True)
class RouterInfo:
    """A router; all of it fixed for the router's life.

    Attributes:
        key: names the layer within its model: its number in the whole model, from 0, "mtp.N" for multi-token prediction.
        stage: process group of the pipeline stage (TP x CP x DP).
        model: process group of one data-parallel rank (TP x CP).
        stage_name: names the pipeline stage in files, "pp0" for example.
        num_experts: E.
        topk: experts per token.
        num_layers: of the whole model, multi-token prediction included.
        mtp_layers: of multi-token prediction.
        applications: how often it is applied per micro-batch; more than 1 in a repeated multi-token prediction layer.
        per_token: `--calculate-per-token-loss`.
        device: of its tensors.
        backward_scale: see `BackwardScale`.
        acts: whether it has an auxiliary loss for the scope to act on, whatever its coefficient.
        log: takes the layer's LBL at the step's end (sum over micro-batches, this rank's share) and the loss' kind.
    """

    key: str
    stage: dist.ProcessGroup
    model: dist.ProcessGroup
    stage_name: str
    num_experts: int
    topk: int
    num_layers: int
    mtp_layers: int
    applications: int
    per_token: bool
    device: torch.device
    backward_scale: BackwardScale
    acts: bool
    log: Callable[[Tensor, str], None]

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks of the stage."""
        return self.stage.size() // self.model.size()

    @property
    def leads_stage(self) -> bool:
        """Whether this rank is the stage's first: what is said or written once per stage is by it."""
        return dist.get_rank() == min(dist.get_process_group_ranks(self.stage))
