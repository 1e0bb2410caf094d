"""Attaches the loss to the router's logits, before the top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_global_lbl.core.balance import CountedForward
    from megatron_global_lbl.core.fused.counted import FusedForward


class LossOnLogits:
    """The loss of one forward: what is counted is known only after the top-k, through which the backward comes first."""

    def __init__(self, score_function: str) -> None:
        self.score_function = score_function
        self.counted: FusedForward | None = None
        self.coeff = 0.0
        self.padding_mask: Tensor | None = None

    def fill(self, counted: CountedForward, coeff: float, padding_mask: Tensor | None) -> None:
        """
        Args:
            counted: what the forward counted, by the kernels.
            coeff: alpha.
            padding_mask: [T] bool, True for padding, or None.
        """
        assert counted.is_fused
        self.counted, self.coeff, self.padding_mask = cast("FusedForward", counted), coeff, padding_mask


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, loss: LossOnLogits):
        ctx.save_for_backward(logits)
        ctx.loss = loss
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, incoming: Tensor):
        from megatron_global_lbl.core.fused import launch

        (logits,), loss = ctx.saved_tensors, ctx.loss
        if loss.counted is None:  # the forward found nothing to attach
            return incoming, None
        info = loss.counted.layer.info
        loss.counted.backward_has_come()
        gradient_E, factor = loss.counted.fused_score_gradient(coeff=loss.coeff, per_token=info.per_token)
        outgoing = launch.add_to_gradient(
            logits,
            loss.padding_mask,
            gradient_E,
            factor,
            info.backward_scale(),
            incoming,
            score_function=loss.score_function,
        )
        return outgoing, None


def attach_to_logits(logits: Tensor, loss: LossOnLogits) -> Tensor:
    """`logits` [T, E] unchanged; their backward adds the gradient of `loss`, which is filled after the top-k."""
    return _Attach.apply(logits, loss)
