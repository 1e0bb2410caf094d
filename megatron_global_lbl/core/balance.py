"""The main idea: f is counted over the balance batch, and read in the backward.

The forward of a micro-batch counts which experts its tokens selected and starts summing the counts over the ranks. The
backward asks for f. That late, the balance batch of scope `global` holds every micro-batch whose forward has run: under
pipeline parallelism these are more than the ones before it, which is why f is not read in the forward.

Every valid token selects top-k experts, so the counts hold the number of tokens, too. A replayed CUDA graph runs no Python:
what it counts is added inside of it. One class per scope; shape suffixes: T tokens on this rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_global_lbl.core.awaited import AwaitedBackward
from megatron_global_lbl.core.collective import Reduction, is_capturing
from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.core.loss import score_gradient
from megatron_global_lbl.settings import Scope, Sync


def selections_per_expert(selection: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[E] int32 selections of one forward on this rank.

    Args:
        selection: [T, E] bool, the experts that the router selected for each token.
        padding_mask: [T] bool, True for padding; None when every token is valid.
    """
    if padding_mask is not None:
        selection = selection & ~padding_mask.unsqueeze(1)
    # int32 is enough for one micro-batch (2^31 tokens over all ranks), and is what travels.
    return selection.sum(dim=0, dtype=torch.int32)


def count(layer: Layer, counts_E: Tensor, *, in_scope: bool) -> CountedForward:
    """Count a forward that is running now, and start the reductions that the scope needs.

    Args:
        layer: whose forward it is.
        counts_E: its `selections_per_expert`; summed over ranks in place.
        in_scope: a loss will be attached; otherwise the forward only fills a window.
    """
    layer.captured |= is_capturing(counts_E)
    scope = SCOPES[layer.table.settings.scope]
    scope.add_to_step(layer, counts_E)
    return scope(layer, counts_E, in_scope)


class CountedForward(AwaitedBackward):
    """What one forward of one layer leaves for its backward: nothing of size [T, E].

    Attributes:
        is_fused: counted by the kernels (fused/counted.py), which make the sums below.
        own_counts_E: [E] int32 selections on this rank alone, if something looks on.
        score_sums_E: [E] float32 summed scores on this rank.
    """

    is_fused = False
    own_counts_E: Tensor | None = None
    score_sums_E: Tensor | None = None

    def __init__(self, layer: Layer, counts_E: Tensor, in_scope: bool, copy_E: Tensor | None = None) -> None:
        """
        Args:
            layer: whose forward it is.
            counts_E: int32 selections on this rank.
            in_scope: a loss will be attached.
            copy_E: the same in other memory, if there is one already.
        """
        super().__init__(layer)
        layer.forwards += 1
        settings = layer.table.settings
        self.in_scope = in_scope
        self._blocking = settings.sync is Sync.BLOCKING
        # A layer that is applied several times per micro-batch adds its loss as often.
        self._micro_coeff = settings.micro_coeff / layer.info.applications if in_scope else 0.0
        self._micro: Reduction | None = None
        if self._micro_coeff:
            self._micro = self._start(counts_E.clone() if copy_E is None else copy_E, layer.table.group.model)

    def _start(self, counts_E: Tensor, group: torch.distributed.ProcessGroup) -> Reduction:
        reduction = Reduction(counts_E, group, blocking=self._blocking, whole_graph=self.layer.table.whole_graph)
        if not is_capturing(counts_E):  # a graph waits for its own
            self.layer.under_way.append(reduction)
        return reduction

    @staticmethod
    def add_to_step(layer: Layer, counts_E: Tensor) -> None:
        """What the step's counts of the layer get in the forward."""

    def observe(self, score_sums_E: Tensor) -> None:
        """Take the scores summed over the tokens, for the log."""
        self.layer.score_sums_E += score_sums_E

    def score_gradient(self, *, coeff: float, per_token: bool) -> Tensor:
        """[E] gradient of the loss with respect to the scores of any token on this rank, in units in which the mean over
        data-parallel ranks is the loss' gradient; called in the backward.

        Args:
            coeff: alpha.
            per_token: the schedule divides every gradient by the step's tokens afterwards (`--calculate-per-token-loss`),
                so p must not be divided here.
        """
        gradient_E = self._gradient_of_scope(coeff, per_token)
        if self._micro is not None:
            micro_E = self._micro.wait()
            gradient_E = gradient_E + self._gradient(micro_E, micro_E, self._micro_coeff, 1, per_token)
        return gradient_E

    def _gradient_of_scope(self, coeff: float, per_token: bool) -> Tensor:
        raise NotImplementedError

    def _gradient(self, counts_E: Tensor, own_E: Tensor, coeff: float, ranks: int, per_token: bool) -> Tensor:
        """f from `counts_E`; p a mean over this micro-batch's tokens of one rank: selections `own_E` / (topk * ranks)."""
        if per_token:
            return score_gradient(tokens_per_expert=counts_E, num_tokens=1, coeff=coeff)
        selections = own_E.sum(dtype=torch.float32)
        return score_gradient(tokens_per_expert=counts_E, num_tokens=selections, coeff=coeff * self.layer.table.topk * ranks)


class Dp(CountedForward):
    """f over this micro-batch on all data-parallel ranks."""

    _score_sums_E: Tensor

    def __init__(self, layer: Layer, counts_E: Tensor, in_scope: bool, copy_E: Tensor | None = None) -> None:
        super().__init__(layer, counts_E, in_scope, copy_E)
        self._summed = self._start(counts_E, layer.table.group.counted)

    def observe(self, score_sums_E: Tensor) -> None:
        self._score_sums_E = score_sums_E  # f, which they are multiplied with, is known in the backward

    def _gradient_of_scope(self, coeff: float, per_token: bool) -> Tensor:
        own_E, ranks = self._summed.wait(), self.layer.table.group.size
        gradient_E = self._gradient(own_E, own_E, coeff, ranks, per_token)
        unit_E = self._gradient(own_E, own_E, coeff, ranks, False) if per_token else gradient_E
        self.layer.score_sums_E.addcmul_(unit_E, self._score_sums_E, value=1 / coeff)
        return gradient_E


class Global(CountedForward):
    """f over the step's micro-batches whose forward has run, on all data-parallel ranks."""

    def __init__(self, layer: Layer, counts_E: Tensor, in_scope: bool, copy_E: Tensor | None = None) -> None:
        super().__init__(layer, counts_E, in_scope, copy_E)
        self._summed = self._start(counts_E, layer.table.group.counted)
        layer.uncounted.append(self._summed)
        if is_capturing(counts_E) and not layer.table.whole_graph.is_open:
            layer.counts_of_step()

    @staticmethod
    def add_to_step(layer: Layer, counts_E: Tensor) -> None:
        layer.counts_C[-1:].add_(1)

    def _gradient_of_scope(self, coeff: float, per_token: bool) -> Tensor:
        own_E, layer = self._summed.wait(), self.layer
        return self._gradient(layer.counts_of_step()[:-1], own_E, coeff, layer.table.group.size, per_token)


class Window(CountedForward):
    """f over the last completed steps; summed over ranks once per step, all layers together (window.py)."""

    @staticmethod
    def add_to_step(layer: Layer, counts_E: Tensor) -> None:
        layer.counts_C[-1:].add_(1)
        layer.counts_C[:-1].add_(counts_E)

    def unit_gradient(self, per_token: bool) -> Tensor:
        """[E] for alpha = 1."""
        window = self.layer.table.window
        assert window is not None
        return window.score_gradient(per_token=per_token)[self.layer.row]

    def _gradient_of_scope(self, coeff: float, per_token: bool) -> Tensor:
        return self.unit_gradient(per_token) * coeff


SCOPES = {Scope.DP: Dp, Scope.GLOBAL: Global, Scope.WINDOW: Window}
