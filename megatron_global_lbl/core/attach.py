"""Attaches the loss to the router's output, as Megatron attaches its own auxiliary losses: without a loss tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_global_lbl.core.balance import CountedForward


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs: Tensor, scores: Tensor, counted: CountedForward, coeff: float):
        ctx.counted, ctx.coeff, ctx.scores_shape, ctx.scores_dtype = counted, coeff, scores.shape, scores.dtype
        return probs

    @staticmethod
    def backward(ctx, grad_probs: Tensor):
        counted, info = ctx.counted, ctx.counted.layer.info
        counted.backward_has_come()
        gradient_E = counted.score_gradient(coeff=ctx.coeff, per_token=info.per_token) * info.backward_scale()
        return grad_probs, gradient_E.to(ctx.scores_dtype).expand(ctx.scores_shape), None, None


def attach_loss(*, probs: Tensor, scores: Tensor, counted: CountedForward, coeff: float) -> Tensor:
    """`probs` unchanged; its backward adds the loss' gradient to `scores`.

    Args:
        probs: [T, E] output of the router, through which the backward comes.
        scores: [T, E] router scores for the auxiliary loss; rows of padding must be zero in value and gradient.
        counted: what `balance.count` gave for these tokens.
        coeff: alpha.

    Returns:
        [T, E], the values of `probs`.
    """
    return _AttachLoss.apply(probs, scores, counted, coeff)
