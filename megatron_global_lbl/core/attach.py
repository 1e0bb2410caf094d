"""Attaches the loss without a loss tensor: an identity whose backward adds the gradient, as Megatron's own auxiliary losses.

It lies on the router's output, from whose scores the loss comes (`attach_loss`); or, where kernels compute it from the logits,
on these, before the top-k (`attach_to_logits`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_global_lbl.core.forward import CountedForward


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs: Tensor, scores: Tensor, counted: CountedForward, coeff: float):
        ctx.counted, ctx.coeff, ctx.scores_shape, ctx.scores_dtype = counted, coeff, scores.shape, scores.dtype
        return probs

    @staticmethod
    def backward(ctx, grad_probs: Tensor):
        gradient_E, factor = ctx.counted.gradient(ctx.coeff)
        if factor != 1.0:
            gradient_E = gradient_E * factor
        ctx.counted.is_done()
        return grad_probs, gradient_E.to(ctx.scores_dtype).expand(ctx.scores_shape), None, None


def attach_loss(*, probs: Tensor, scores: Tensor, counted: CountedForward, coeff: float) -> Tensor:
    """`probs` unchanged; their backward adds the loss' gradient to `scores`.

    Args:
        probs: [T, E] output of the router, through which the backward comes.
        scores: [T, E] router scores for the auxiliary loss; rows of padding must be zero in value and gradient.
        counted: what these tokens counted.
        coeff: alpha.
    """
    return _AttachLoss.apply(probs, scores, counted, coeff)


class LossOnLogits:
    """The loss of one forward, attached before the top-k; what it counted is known only after.

    Attributes:
        counted: None if the forward found nothing to attach.
        coeff: alpha.
        padding_mask: [T] bool, True for padding, or None.
    """

    __slots__ = ("coeff", "counted", "padding_mask", "score_function")

    def __init__(self, score_function: str) -> None:
        self.score_function = score_function
        self.counted: CountedForward | None = None
        self.coeff = 0.0
        self.padding_mask: Tensor | None = None


class _AttachToLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, loss: LossOnLogits):
        ctx.save_for_backward(logits)
        ctx.loss = loss
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, incoming: Tensor):
        from megatron_global_lbl.core.fused.forward import add_to_gradient  # here: it needs Triton

        (logits,), loss = ctx.saved_tensors, ctx.loss
        if loss.counted is None:
            return incoming, None
        gradient_E, factor = loss.counted.gradient(loss.coeff)
        loss.counted.is_done()
        outgoing = add_to_gradient(logits, loss.padding_mask, gradient_E, factor, incoming, score_function=loss.score_function)
        return outgoing, None


def attach_to_logits(logits: Tensor, loss: LossOnLogits) -> Tensor:
    """`logits` [T, E] unchanged; their backward adds the gradient of `loss`, which is filled after the top-k."""
    return _AttachToLogits.apply(logits, loss)
