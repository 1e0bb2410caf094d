"""The main idea: f is counted over the balance batch, and read in the backward.

The forward of a micro-batch counts which experts its tokens selected and starts summing the counts over the ranks. The
backward asks for f. That late, the balance batch of scope `global` holds every micro-batch whose forward has run: under
pipeline parallelism these are more than the ones before it, which is why f is not read in the forward.

Counts are integer tensors outside of any module, which no cast of the model to bf16 reaches. Every valid token selects top-k
experts, so the counts hold the number of tokens, too. Of the two forwards of a recomputed layer the first one is counted, the
second one takes that up (passes.py). A replayed CUDA graph runs no Python: what it counts is added inside of it.
Shape suffixes: T tokens on this rank, E experts, C = E + 1 counts (selections per expert, and micro-batches).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_global_lbl.collective import BalanceGroup, Reduction, is_capturing
from megatron_global_lbl.loss import score_gradient
from megatron_global_lbl.passes import CountedAhead
from megatron_global_lbl.settings import Scope, Settings, Sync
from megatron_global_lbl.window import LayerWindow


@dataclass
class LayerBalance:
    """One MoE layer's counts on this rank, and what they are summed over."""

    key: str
    num_experts: int
    topk: int
    coeff: float
    micro_coeff: float
    device: torch.device
    group: BalanceGroup
    settings: Settings
    window: LayerWindow | None = None
    captured: bool = False
    step_counts: Tensor = field(init=False)
    score_sums: Tensor = field(init=False)
    started: list[Reduction] = field(default_factory=list)
    ahead: CountedAhead[MicroBatch] = field(init=False)

    def __post_init__(self) -> None:
        self.step_counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.device)
        self.score_sums = torch.zeros(self.num_experts, device=self.device)
        self.ahead = CountedAhead(self.key)

    def count(self, selection: Tensor, padding_mask: Tensor | None) -> MicroBatch:
        """Count a micro-batch whose forward is running now, and start the reductions that its scope needs.

        Args:
            selection: [T, E] bool, the experts that the router selected for each token.
            padding_mask: [T] bool, True for padding; None when every token is valid.
        """
        if padding_mask is not None:
            selection = selection & ~padding_mask.unsqueeze(1)
        # int32 is enough for one micro-batch (2^31 tokens over all ranks), and is what travels.
        counts_E = selection.sum(dim=0, dtype=torch.int32)
        if self.settings.scope is not Scope.DP:
            self.step_counts[-1:].add_(1)
        blocking = self.settings.sync is Sync.BLOCKING
        micro = Reduction(counts_E.clone(), self.group.model, blocking=blocking) if self.micro_coeff else None
        self.captured |= is_capturing(counts_E)
        if self.settings.scope is Scope.WINDOW:
            # Summed over ranks once per step, all layers together (see window.py).
            self.step_counts[:-1].add_(counts_E)
            return MicroBatch(self, None, micro)
        summed = Reduction(counts_E, self.group.counted, blocking=blocking)
        self.started.append(summed)
        if is_capturing(counts_E):
            self.counts_of_step()
        return MicroBatch(self, summed, micro)

    def counts_of_step(self) -> Tensor:
        """[C] sums over the step's micro-batches whose forward has run; waits for what is still under way."""
        for reduction in self.started:
            counts_E = reduction.wait()
            if self.settings.scope is Scope.GLOBAL:
                self.step_counts[:-1].add_(counts_E)
        self.started.clear()
        return self.step_counts

    def forget(self) -> tuple[Tensor, Tensor]:
        """Leave nothing under way; gives the two tensors to be zeroed, which the engine does for all layers at once."""
        self.counts_of_step()
        self.ahead.clear()
        return self.step_counts, self.score_sums


@dataclass
class MicroBatch:
    """What one forward of one MoE layer leaves for its backward: nothing of size [T, E]."""

    layer: LayerBalance
    summed: Reduction | None
    micro: Reduction | None
    summed_scores: Tensor | None = None

    def observe(self, summed_scores: Tensor) -> None:
        """Take the scores summed over the tokens, [E], for the log."""
        if self.layer.settings.scope is Scope.DP:
            self.summed_scores = summed_scores
        else:
            self.layer.score_sums += summed_scores

    def score_gradient(self, *, per_token: bool) -> Tensor:
        """[E] gradient of the loss with respect to the scores of any token on this rank, in units in which the mean over
        data-parallel ranks is the loss' gradient; called in the backward.

        Args:
            per_token: the schedule divides every gradient by the step's tokens afterwards (`--calculate-per-token-loss`),
                so p must not be divided here.
        """
        layer = self.layer
        if layer.window is not None:
            gradient_E = layer.window.score_gradient(per_token=per_token) * layer.coeff
        else:
            assert self.summed is not None
            own_E = self.summed.wait()
            counts_E = layer.counts_of_step()[:-1] if layer.settings.scope is Scope.GLOBAL else own_E
            gradient_E = self._gradient(counts_E, own_E, layer.coeff, layer.group.size, per_token)
            if self.summed_scores is not None:
                unit_E = self._gradient(own_E, own_E, layer.coeff, layer.group.size, False) if per_token else gradient_E
                layer.score_sums.addcmul_(unit_E, self.summed_scores, value=1 / layer.coeff)
        if self.micro is not None:
            micro_E = self.micro.wait()
            gradient_E = gradient_E + self._gradient(micro_E, micro_E, layer.micro_coeff, 1, per_token)
        return gradient_E

    def _gradient(self, counts_E: Tensor, own_E: Tensor, coeff: float, ranks: int, per_token: bool) -> Tensor:
        """f from `counts_E`; p a mean over this micro-batch's tokens of one rank: selections `own_E` / (topk * ranks)."""
        if per_token:
            return score_gradient(tokens_per_expert=counts_E, num_tokens=1, coeff=coeff)
        selections = own_E.sum(dtype=torch.float32)
        return score_gradient(tokens_per_expert=counts_E, num_tokens=selections, coeff=coeff * self.layer.topk * ranks)
