"""One router forward as the hook and the engine see it, and what may look on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
        scores: [T, E] the scores of the auxiliary losses; None in the first of two forwards, without such a loss, and where the
            kernels do without.
        logits: [T, E] of the router if the kernels take this forward (fused/choice.py); otherwise None.
        score_function: Megatron's name of it.
        attached: the loss on the logits; None in the first of two forwards.
        sequences: of the micro-batch (its second dimension).
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
    sequences: int = 0

    @property
    def replaces(self) -> bool:
        """Whether Megatron's own loss is left out."""
        return self.in_scope and self.loss is not None


class Observed(NamedTuple):
    """Sums over the valid tokens of one router forward on this rank; on the device, and nothing changes them any more.

    Every valid token selects top-k experts, so the counts hold the number of tokens, too.

    Attributes:
        counts_E: [E] integers, selections per expert.
        score_sums_E: [E] float, the scores of the auxiliary loss summed; None if there are none.
        entropy_sum: scalar float, the entropy of the scores over experts in units of log E, summed; None if it is not known.
        sequences: of the micro-batch.
        coeff: alpha of the loss that the scope acts on; 0 without one.
    """

    counts_E: Tensor
    score_sums_E: Tensor | None
    entropy_sum: Tensor | None
    sequences: int
    coeff: float


class Record(Protocol):
    """Something that looks on."""

    wants_entropy: bool

    def observe(self, layer: Layer, observed: Observed) -> None:
        """A forward of a layer that is trained on; of a recomputed one the second."""

    def refuse_capture(self) -> None:
        """A CUDA graph holds a forward, whose replays would not be seen."""

    def drop(self, layers: list[Layer]) -> None:
        """Forget these layers' forwards since their last step's end."""

    def end_step(self, layers: list[Layer], iteration: int) -> None:
        """The step of these layers is over; `iteration` is 0-based."""

    def repeat_step(self, layers: list[Layer]) -> None:
        """The step of these layers that ended last is run again."""

    def forget(self, layers: list[Layer]) -> None:
        """These layers are gone, and what is not told of them yet is the last. Ranks say it at different times."""

    def settle(self) -> None:
        """Leave no reduction under way."""
