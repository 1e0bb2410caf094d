"""The sums of one model's layers over a log interval, on the device: a few launches per step for all layers together.

What a step's forwards left is kept as it is (E numbers per layer and micro-batch) and added up at the step's end. The step that
ended last waits apart, so that it can be taken back when Megatron runs it again, and so that what its micro-batches need summed
over TP x CP has the time of a step to arrive.
Shape suffixes: L layers, F forwards of all layers, E experts; S = 2 E + 3 (selections, summed scores, summed entropy, LBL of
micro-batches, their number).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_global_lbl.core.collective import Reduction
from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.core.router_forward import Observed

NAN = float("nan")


class _Step(NamedTuple):
    """What a step left: its forwards' own sums, the same over TP x CP, forwards by layer, and sequences of the first layer."""

    own_FS: Tensor
    of_micro_batches: Reduction
    lengths: tuple[int, ...]
    sequences: int


class Interval:
    """What one model did since the interval began.

    Attributes:
        layers: its MoE layers on this rank.
        number: of the model, from 1, in the order in which the models' steps ended first.
        steps: how many have ended.
        forwards: of the first layer, on this rank.
        sequences: of those forwards.
        coeff: alpha, as it was last.
    """

    def __init__(self, layers: Sequence[Layer], number: int) -> None:
        self.layers, self.number = list(layers), number
        info = self.layers[0].info
        self._experts, self._stage, self._model, self._device = info.num_experts, info.stage, info.model, info.device
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self._sums_LS = torch.zeros(len(self.layers), 2 * self._experts + 3, dtype=torch.float64, device=self._device)
        self._begin()

    def _begin(self) -> None:
        self._sums_LS.zero_()
        self.steps = self.forwards = self.sequences = 0
        self._step: _Step | None = None

    def add_step(self, by_layer: list[list[Observed]]) -> None:
        """A step has ended; what its forwards left, per layer."""
        self._fold()
        forwards = [observed for of_layer in by_layer for observed in of_layer]
        self.coeff = by_layer[0][0].coeff
        unknown_E = torch.full((self._experts,), NAN, device=self._device)
        with torch.no_grad():
            counts_FE = torch.stack([forward.counts_E for forward in forwards]).float()  # exact below 2^24 per micro-batch
            scores_FE = torch.stack([unknown_E if x.score_sums_E is None else x.score_sums_E for x in forwards]).float()
            entropies_F = torch.stack([unknown_E[0] if x.entropy_sum is None else x.entropy_sum for x in forwards]).float()
            sums_FS = torch.cat([counts_FE, scores_FE], dim=1)
            alone = self._model.size() == 1
            of_micro_batches = Reduction(sums_FS if alone else sums_FS.clone(), self._model, blocking=False)
        lengths = tuple(len(of_layer) for of_layer in by_layer)
        sequences = sum(observed.sequences for observed in by_layer[0])
        self._step = _Step(torch.cat([sums_FS, entropies_F.unsqueeze(1)], dim=1), of_micro_batches, lengths, sequences)
        self.steps += 1
        self.forwards += lengths[0]
        self.sequences += sequences

    def take_back(self) -> None:
        """The step that ended last is run again: once until the next has ended."""
        if self._step is not None:
            self._step.of_micro_batches.wait()
            self.steps -= 1
            self.forwards -= self._step.lengths[0]
            self.sequences -= self._step.sequences
            self._step = None

    def settle(self) -> None:
        """Leave no reduction under way."""
        if self._step is not None:
            self._step.of_micro_batches.settle()

    def close(self) -> np.ndarray:
        """[L, S] float64 sums over the stage's data-parallel ranks; the next interval begins. Waits for the device.

        Of the last two columns, the LBL of micro-batches and their number, each TP x CP rank brings its group's: only their
        ratio has a meaning.
        """
        self._fold()
        Reduction(self._sums_LS, self._stage, blocking=True).wait()
        sums_LS = self._sums_LS.cpu().numpy().copy()
        self._begin()
        return sums_LS

    def _fold(self) -> None:
        """Add the step that ended last."""
        if self._step is None:
            return
        own_FS, of_micro_batches, lengths, _ = self._step
        self._step = None
        with torch.no_grad():
            counts_FE, scores_FE = of_micro_batches.wait().split(self._experts, dim=1)
            selections_F1 = counts_FE.sum(dim=1, keepdim=True)
            there_F1 = selections_F1 > 0
            topk = self.layers[0].info.topk
            lbl_F1 = (counts_FE / selections_F1 * scores_FE).sum(dim=1, keepdim=True) / selections_F1 * (topk * self._experts)
            lbl_F1 = torch.where(there_F1, lbl_F1, 0.0)
            step_FS = torch.cat([own_FS, lbl_F1, there_F1.float()], dim=1).double()
            if len(set(lengths)) == 1:
                self._sums_LS += step_FS.view(len(lengths), lengths[0], -1).sum(dim=1)
            else:
                self._sums_LS.index_add_(0, self._row_of_forwards(lengths), step_FS)

    def _row_of_forwards(self, lengths: tuple[int, ...]) -> Tensor:
        if lengths not in self._rows:
            rows = [row for row, length in enumerate(lengths) for _ in range(length)]
            self._rows[lengths] = torch.tensor(rows, device=self._device)
        return self._rows[lengths]
