"""The load-balancing loss for Megatron's log, worked out for all layers at once at the end of a step.

Shape suffixes: L layers, E experts, C = E + 1 counts (see balance.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_global_lbl.balance import LayerBalance
from megatron_global_lbl.loss import score_gradient
from megatron_global_lbl.settings import Scope


def step_losses(layers: list[LayerBalance]) -> list[Tensor]:
    """For the log, of each layer: alpha = 1, times the micro-batches; sum over TP x CP and mean over dp ranks give its LBL.

    Args:
        layers: of one number of experts, top-k and group. They are worked out together: a few small launches for all.
    """
    first = layers[0]
    score_sums_LE = torch.stack([layer.score_sums for layer in layers])
    if first.settings.scope is Scope.DP:
        return list(score_sums_LE.sum(dim=1))  # multiplied by f already, which differs over micro-batches
    if first.settings.scope is Scope.WINDOW:
        windows = [layer.window for layer in layers if layer.window is not None]
        gradients_LE = torch.stack([window.score_gradient(per_token=False) for window in windows])
        return list((gradients_LE * score_sums_LE).sum(dim=1))
    # With the f of the whole step: not a mean over the beginnings of the global batch.
    counts_LC = torch.stack([layer.counts_of_step() for layer in layers])
    counts_LE, micro_batches_L1 = counts_LC.split([first.num_experts, 1], dim=1)
    ranks = first.topk * first.group.size
    gradients_LE = score_gradient(tokens_per_expert=counts_LE, num_tokens=counts_LE.sum(dim=1, keepdim=True) / ranks)
    return list((gradients_LE * score_sums_LE * micro_batches_L1).sum(dim=1))
