"""The sums of one model chunk over a log interval, on the device: a few launches per step for all layers together.

Tables of micro-batches are kept until the step's end and added up there. What TP x CP ranks must sum for them has the time of a
step to arrive. Shape suffixes: M micro-batches, R rows, L layers, E experts, X extras; S = 2 E + X + 2 (selections, summed
scores, extras, LBL of micro-batches, their number).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_global_lbl.core.chunk import Chunk
from megatron_global_lbl.core.collective import Reduction


class Recorded(NamedTuple):
    """What is kept of a micro-batch until its step ends; see `core.chunk.Table`."""

    counts_RE: Tensor
    sums_RE: Tensor
    extras_RX: Tensor
    sequences: int


@dataclass
class Sums:
    """What one chunk did in some steps.

    Attributes:
        steps, micro_batches, sequences: on this rank; once an interval is closed, sequences are a mean over ranks.
        balance_sequences: sequences over which f was counted, summed over `balanced` micro-batches; likewise. `balance_R`: [R]
            the same in selections.
        sums_LS: [L, S] float64, over the stage's data-parallel ranks once an interval is closed. Of the last two columns, the
            LBL of micro-batches and their number, each TP x CP rank brings its group's: only their ratio has a meaning.
    """

    steps: int
    micro_batches: int
    sequences: float
    balance_sequences: float
    balanced: int
    balance_R: Tensor
    sums_LS: Tensor

    def add(self, other: Sums, sign: int = 1) -> None:
        self.steps += sign * other.steps
        self.micro_batches += sign * other.micro_batches
        self.sequences += sign * other.sequences
        self.balance_sequences += sign * other.balance_sequences
        self.balanced += sign * other.balanced
        self.balance_R.add_(other.balance_R, alpha=sign)
        self.sums_LS.add_(other.sums_LS, alpha=sign)


class Interval:
    """What one chunk did since the interval began."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk_layers, self._chunk_rows, self._device = len(chunk.layers), chunk.rows, chunk.device
        self._experts, self._extras, self._repeated = chunk.experts, chunk.extras, chunk.repeated
        self._stage, self._model = chunk.stage, chunk.model
        self._topk_experts = chunk.topk * chunk.share * chunk.experts
        self._begin()

    def _begin(self) -> None:
        self._sums = self._no_sums()
        self._last: Sums | None = None  # of the step that ended last; its `sums_LS` are still to be computed
        self._own_MRS: Tensor | None = None

    def _no_sums(self) -> Sums:
        sums_LS = torch.zeros(
            self._chunk_layers, 2 * self._experts + self._extras + 2, dtype=torch.float64, device=self._device
        )
        return Sums(0, 0, 0, 0, 0, torch.zeros(self._chunk_rows, dtype=torch.int64, device=self._device), sums_LS)

    @property
    def steps(self) -> int:
        return self._sums.steps + (self._last is not None)

    def add_step(self, chunk: Chunk, batches: list[Recorded]) -> None:
        """A step has ended, with these micro-batches."""
        self._fold()
        sequences = sum(batch.sequences for batch in batches)
        balance_R = chunk.balance_selections_R.clone()
        self._last = Sums(1, len(batches), sequences, *chunk.balance, balance_R, torch.zeros((), device=self._device))
        if not batches:
            return
        with torch.no_grad():
            parts = [torch.stack([batch.counts_RE for batch in batches]).float()]  # exact below 2^24 per micro-batch
            parts.append(torch.stack([batch.sums_RE for batch in batches]))
            both_MRE = torch.cat(parts, dim=2)
            self._of_micro_batches = Reduction(both_MRE.clone() if self._model.size() > 1 else both_MRE, self._model)
            self._own_MRS = both_MRE
            if self._extras:
                self._own_MRS = torch.cat([both_MRE, torch.stack([batch.extras_RX for batch in batches])], dim=2)

    def take_back(self) -> None:
        """Forget the step that ended last."""
        self.settle()
        self._own_MRS = self._last = None

    def settle(self) -> None:
        """Leave no reduction under way."""
        if self._own_MRS is not None:
            self._of_micro_batches.settle()

    def close(self) -> Sums:
        """On the host; the next interval begins. Waits for the device."""
        self._fold()
        sums = self._sums
        last_row = sums.sums_LS.new_zeros(1, sums.sums_LS.shape[1])
        last_row[0, :2] = torch.tensor([sums.sequences, sums.balance_sequences])  # of ranks that may have unlike numbers
        summed_LS = Reduction(torch.cat([sums.sums_LS, last_row]), self._stage).wait().cpu()
        sequences, balance_sequences = (summed_LS[-1, :2] / self._stage.size()).tolist()
        self._begin()
        return replace(
            sums,
            sequences=sequences,
            balance_sequences=balance_sequences,
            balance_R=sums.balance_R.cpu(),
            sums_LS=summed_LS[:-1],
        )

    def _fold(self) -> None:
        """Add the step that ended last."""
        last, own_MRS = self._last, self._own_MRS
        self._last = self._own_MRS = None
        if last is None:
            return
        if own_MRS is not None:
            with torch.no_grad():
                step_RS = self._of_step(own_MRS)
                if self._repeated is None:
                    last.sums_LS = step_RS
                else:
                    last.sums_LS = torch.zeros_like(self._sums.sums_LS).index_add_(0, self._repeated, step_RS)
        self._sums.add(last)

    def _of_step(self, own_MRS: Tensor) -> Tensor:
        """[R, S] float64."""
        counts_MRE, scores_MRE = self._of_micro_batches.wait().split(self._experts, dim=2)
        selections_MR1 = counts_MRE.sum(dim=2, keepdim=True)
        there_MR1 = selections_MR1 > 0
        lbl_MR1 = (counts_MRE / selections_MR1 * scores_MRE).sum(dim=2, keepdim=True) / selections_MR1 * self._topk_experts
        return torch.cat([own_MRS, torch.where(there_MR1, lbl_MR1, 0.0), there_MR1.float()], dim=2).double().sum(dim=0)
