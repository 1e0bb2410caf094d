"""What the hook tells the engine of a router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.attach import BackwardScale


@dataclass(frozen=True)
class RouterFacts:
    """A router; all of it fixed for the router's life.

    Attributes:
        key: names the layer in a checkpoint: its number in the whole model, "mtp.N" for multi-token prediction.
        loss_type: the load-balancing type that the scope acts on, "aux_loss" or "global_aux_loss".
        only_loss: no other auxiliary loss uses the router's scores.
        coeff: alpha of the load-balancing loss; share of it if the layer is applied several times per micro-batch.
        stage: process group of the pipeline stage (TP x CP x DP).
        model: process group of one data-parallel rank (TP x CP).
        pipeline_stage: index of the stage.
        topk: experts per token.
        recomputed: Megatron runs its forward twice to save activations.
        applications: how often it is applied per micro-batch; more than 1 in a repeated multi-token prediction layer.
        per_token: `--calculate-per-token-loss`.
        backward_scale: see attach.py.
        log: takes the layer's LBL at the step's end (sum over micro-batches, this rank's share).
    """

    key: str
    loss_type: str
    only_loss: bool
    coeff: float
    stage: dist.ProcessGroup
    model: dist.ProcessGroup
    pipeline_stage: int
    topk: int
    recomputed: bool
    applications: int
    per_token: bool
    backward_scale: BackwardScale
    log: Callable[[Tensor], None]
