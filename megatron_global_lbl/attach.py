"""Attaches the loss to the router's output, as Megatron attaches its own auxiliary losses: without a loss tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_global_lbl.balance import MicroBatch

BackwardScale = Callable[[], "Tensor | float"]
"""What every gradient of an auxiliary loss is multiplied with, asked for in the backward."""


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs: Tensor, scores: Tensor, micro_batch: MicroBatch, scale: BackwardScale, per_token: bool):
        ctx.micro_batch, ctx.scale, ctx.per_token = micro_batch, scale, per_token
        ctx.scores_shape, ctx.scores_dtype = scores.shape, scores.dtype
        micro_batch.observe(scores.detach().sum(dim=0))
        return probs

    @staticmethod
    def backward(ctx, grad_probs: Tensor):
        gradient_E = ctx.micro_batch.score_gradient(per_token=ctx.per_token) * ctx.scale()
        return grad_probs, gradient_E.to(ctx.scores_dtype).expand(ctx.scores_shape), None, None, None


def attach_loss(
    *, probs: Tensor, scores: Tensor, micro_batch: MicroBatch, backward_scale: BackwardScale, per_token: bool
) -> Tensor:
    """`probs` unchanged; its backward adds the loss' gradient to `scores`.

    Args:
        probs: [T, E] output of the router, through which the backward comes.
        scores: [T, E] router scores for the auxiliary loss; rows of padding must be zero in value and gradient.
        micro_batch: what `LayerBalance.count` gave for these tokens.
        backward_scale: see `BackwardScale`.
        per_token: see `MicroBatch.score_gradient`.

    Returns:
        [T, E], the values of `probs`.
    """
    return _AttachLoss.apply(probs, scores, micro_batch, backward_scale, per_token)
