"""The main idea: f is counted over the balance batch, and read in the backward.

The forward of a micro-batch counts which experts its tokens selected and starts summing the counts over the ranks. The
backward asks for f. That late, the balance batch of scope `global` holds every micro-batch whose forward has run: under
pipeline parallelism these are more than the ones before it, which is why f is not read in the forward.

Counts are plain int64 tensors outside of any module: no cast of the model to bf16 reaches them, no checkpoint of the model
holds them. They are added to in `LayerBalance.count` and reset in `LayerBalance.reset`, nowhere else.

Recompute: Megatron applies auxiliary losses only where autograd records, so of the two forwards of a recomputed layer just
the second one is counted.

Layout of a count vector: [E selections per expert | valid tokens | micro-batches], so one sum carries all three.
Shape suffixes: T tokens on this rank, E experts, C = E + 2 counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_global_lbl.collective import BalanceGroup, Reduction
from megatron_global_lbl.loss import score_gradient
from megatron_global_lbl.settings import Scope, Settings
from megatron_global_lbl.window import LayerWindow


def count_selections(selection: Tensor, padding_mask: Tensor | None) -> Tensor:
    """This rank's count vector of one micro-batch.

    Args:
        selection: [T, E] bool, the experts that the router selected for each token.
        padding_mask: [T] bool, True for padding; None when every token is valid.

    Returns:
        [C] int64, nothing synchronised with the host.
    """
    num_tokens, num_experts = selection.shape
    counts_C = torch.empty(num_experts + 2, dtype=torch.int64, device=selection.device)
    if padding_mask is None:
        counts_C[-2].fill_(num_tokens)
    else:
        selection = selection & ~padding_mask.unsqueeze(1)
        torch.sum(~padding_mask, dim=0, out=counts_C[-2])
    torch.sum(selection, dim=0, out=counts_C[:-2])
    counts_C[-1].fill_(1)
    return counts_C


@dataclass
class LayerBalance:
    """One MoE layer's counts on this rank, and what they are summed over."""

    key: str
    num_experts: int
    device: torch.device
    group: BalanceGroup
    settings: Settings
    window: LayerWindow | None = None
    step_counts: Tensor = field(init=False)
    started: list[Reduction] = field(default_factory=list)
    loss_sum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.step_counts = torch.zeros(self.num_experts + 2, dtype=torch.int64, device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)

    def count(self, selection: Tensor, padding_mask: Tensor | None, coeff: float) -> MicroBatch:
        """Count a micro-batch whose forward is running now, and start the reductions that its scope needs."""
        counts_C = count_selections(selection, padding_mask)
        blocking = self.settings.sync is not None and self.settings.sync.value == "blocking"
        micro = None
        if self.settings.micro_coeff:
            micro = Reduction(counts_C.clone(), self.group.model, blocking=blocking)
        if self.settings.scope is Scope.WINDOW:
            # Summed over ranks once per step, all layers together (see window.py).
            self.step_counts += counts_C
            return MicroBatch(self, None, micro, coeff)
        summed = Reduction(counts_C, self.group.counted, blocking=blocking)
        self.started.append(summed)
        return MicroBatch(self, summed, micro, coeff)

    def counts_of_step(self) -> Tensor:
        """[C] sums over the step's micro-batches whose forward has run; waits for what is still under way."""
        for reduction in self.started:
            self.step_counts += reduction.wait()
        self.started.clear()
        return self.step_counts

    def reset(self) -> None:
        """Forget the step: nothing stays under way and nothing stays counted."""
        self.counts_of_step().zero_()
        self.loss_sum.zero_()


@dataclass
class MicroBatch:
    """What one forward of one MoE layer leaves for its backward."""

    layer: LayerBalance
    summed: Reduction | None
    micro: Reduction | None
    coeff: float

    def score_gradient(self, *, per_token: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradients of the loss with respect to the scores of any token on this rank; called in the backward.

        Args:
            per_token: the schedule divides every gradient by the step's tokens afterwards (`--calculate-per-token-loss`),
                so p must not be divided here.
            dtype: of the result.

        Returns:
            [E] the gradient, in units in which the mean over data-parallel ranks is the loss' gradient, and
            [E] the same for alpha = 1 and p a mean over tokens, for the log: its dot product with the summed scores is
            this rank's share of the LBL.
        """
        layer = self.layer
        if layer.settings.scope is Scope.WINDOW:
            assert layer.window is not None
            counts_C, tokens = layer.window.counts, layer.window.tokens_per_rank
        else:
            assert self.summed is not None
            own_C = self.summed.wait()
            counts_C = layer.counts_of_step() if layer.settings.scope is Scope.GLOBAL else own_C
            tokens = own_C[-2].clamp(min=1) / layer.group.size
        unit_E = score_gradient(tokens_per_expert=counts_C[:-2], num_tokens=tokens, dtype=dtype)
        gradient_E = unit_E * (self.coeff * tokens if per_token else self.coeff)
        if self.micro is not None:
            micro_C = self.micro.wait()
            micro_tokens = 1 if per_token else micro_C[-2].clamp(min=1)
            micro_E = score_gradient(tokens_per_expert=micro_C[:-2], num_tokens=micro_tokens, dtype=dtype)
            gradient_E = gradient_E + layer.settings.micro_coeff * micro_E
        return gradient_E.to(dtype), unit_E
