"""One router forward as the hook and the engine see it, and what may look on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_global_lbl.core.balance import CountedForward
from megatron_global_lbl.core.fused.attach import LossOnLogits
from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.core.recompute import Pass
from megatron_global_lbl.core.router_info import RouterLoss


@dataclass
class RouterForward:
    """One router forward; the hook fills in what it sees on the way.

    Attributes:
        layer: whose forward it is.
        which: ONLY, or one of the two forwards of a recomputed layer.
        loss: what the router's own auxiliary loss is; None if it has none in this forward.
        in_scope: the loss is the plugin's, not Megatron's: the scope is not `micro`, and its start has come.
        counted: what the first of two forwards counted.
        selection: [T, E] bool, the experts that were selected.
        scores: [T, E] the scores of the auxiliary loss; None in the first of two forwards, and where the kernels do without.
        logits: [T, E] of the router if the kernels take this forward (fused/choice.py); otherwise None.
        score_function: Megatron's name of it.
        attached: the loss on the logits; None in the first of two forwards.
    """

    layer: Layer
    which: Pass
    loss: RouterLoss | None
    in_scope: bool
    counted: CountedForward | None = None
    selection: Tensor | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None
    score_function: str = ""
    attached: LossOnLogits | None = None

    @property
    def replaces(self) -> bool:
        """Whether Megatron's own loss is left out."""
        return self.in_scope and self.loss is not None


class Record(Protocol):
    """Something that looks on."""

    def observe(self, layer: Layer, *, scores: Tensor, selection: Tensor, padding_mask: Tensor | None) -> None:
        """A forward of a layer, shapes as in `RouterForward`."""

    def drop(self, layers: list[Layer]) -> None:
        """Forget these layers' forwards since their last step's end."""

    def end_step(self, layers: list[Layer], iteration: int) -> None:
        """The step of these layers is over; `iteration` is 0-based."""
