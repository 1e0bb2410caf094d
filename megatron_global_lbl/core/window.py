"""Scope `window`: f from the last W completed optimizer steps, one reduction per step for all layers.

The sums are exact: the last steps' integer counts are kept, W of them and one more, so that the newest can be taken back when
Megatron runs an iteration again. Before the first step has completed f is uniform, whose gradient is zero.

With `--moe-lbl-group-size` every rank keeps the counts of all groups of its stage (G rows): the one reduction over the stage
fills them without a process group of its own, and a checkpoint written by any rank is complete.

f does not change within a step, so the gradients are worked out once per step, into tensors that stay where they are: a
replayed CUDA graph reads them there.

Shape suffixes: W steps, G groups of data-parallel ranks (1 unless `--moe-lbl-group-size`), L layers, E experts, C = E + 1
counts: selections per expert, and micro-batches of data-parallel ranks, whatever TP x CP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_global_lbl.core.collective import BalanceGroup, Reduction
from megatron_global_lbl.core.loss import score_gradient


class Window:
    """The last W steps' counts of the layers of one table."""

    def __init__(self, steps: int, group: BalanceGroup, counts_LC: Tensor, topk: int) -> None:
        layers, counts = counts_LC.shape
        self._group, self._topk = group, topk
        self._completed = 0
        # Step s lies at s % (W + 1); the slot that the next one will take is the one that has left the window.
        self._ring_WGLC = counts_LC.new_zeros(steps + 1, group.parts, layers, counts)
        self._gradient_LE = torch.zeros(layers, counts - 1, device=counts_LC.device)
        self._per_token_gradient_LE = torch.zeros_like(self._gradient_LE)
        self._under_way: Reduction | None = None

    def with_rows(self, rows: Sequence[int]) -> Window:
        """A window of its own for some of the layers."""
        self.settle()
        window = Window(len(self._ring_WGLC) - 1, self._group, self._ring_WGLC[0, 0, rows], self._topk)
        window._completed = self._completed
        window._ring_WGLC.copy_(self._ring_WGLC[:, :, rows])
        window._work_out()
        return window

    def step_completed(self, counts_LC: Tensor, *, blocking: bool) -> None:
        """Start summing a step's counts on this rank over the ranks of the stage.

        Args:
            counts_LC: selections per expert, and forwards, of the layers that the table holds by now.
            blocking: wait for the sums on the spot.
        """
        self.settle()
        layers, counts = counts_LC.shape
        packed_GLC = counts_LC.new_zeros(self._group.parts, layers, counts)
        # Every rank of TP x CP has counted the forwards of its data-parallel rank: one of them brings them.
        brings = counts if self._group.leads else counts - 1
        packed_GLC[self._group.index, :, :brings] = counts_LC[:, :brings]
        self._under_way = Reduction(packed_GLC, self._group.stage, blocking=blocking)

    def settle(self) -> None:
        """Wait for the step under way, if any: from now on it is in the window."""
        if self._under_way is not None:
            counts_GLC = self._under_way.wait()
            self._ring_WGLC[self._slot(), :, : counts_GLC.shape[1]] = counts_GLC
            self._under_way = None
            self._completed += 1
            self._work_out()

    def take_back(self) -> None:
        """Take the newest step out again: only once until the next has completed."""
        self.settle()
        self._completed -= 1
        self._work_out()

    def counts(self) -> Tensor:
        """[L, C] sums over the completed steps of this rank's group; zeros before the first."""
        self.settle()
        return self._ring_WGLC[:, self._group.index].sum(dim=0) - self._ring_WGLC[self._slot(), self._group.index]

    def score_gradient(self, *, per_token: bool) -> Tensor:
        """[L, E] gradients with respect to a token's scores for alpha = 1; zeros (f is uniform) before the first step.

        Args:
            per_token: p not divided; otherwise by the mean number of valid tokens per data-parallel rank and micro-batch.
        """
        self.settle()
        return self._per_token_gradient_LE if per_token else self._gradient_LE

    def _slot(self) -> int:
        return self._completed % len(self._ring_WGLC)

    def _work_out(self) -> None:
        counts_LE, micro_batches_L1 = self.counts().split([self._gradient_LE.shape[1], 1], dim=1)
        tokens_L1 = counts_LE.sum(dim=1, keepdim=True) / self._topk / micro_batches_L1.clamp(min=1)
        self._per_token_gradient_LE.copy_(score_gradient(tokens_per_expert=counts_LE, num_tokens=1))
        self._gradient_LE.copy_(score_gradient(tokens_per_expert=counts_LE, num_tokens=tokens_L1))

    def state(self, row: int) -> Tensor:
        """[steps, G, C] int64 on the CPU of one layer, oldest first."""
        self.settle()
        size = len(self._ring_WGLC)
        steps = range(max(0, self._completed - size + 1), self._completed)
        return self._ring_WGLC[[step % size for step in steps], :, row].cpu()

    def load(self, row: int, state: Tensor) -> None:
        """Continue one layer from its `state()`; more steps than W: the newest W. The shape was checked."""
        size = len(self._ring_WGLC)
        state = state[1 - size :]
        self.settle()
        missing = max(0, len(state) - self._completed)
        self._ring_WGLC.copy_(self._ring_WGLC.roll(missing, dims=0))  # empty steps before those of the other layers
        self._completed += missing
        self._ring_WGLC[:, :, row] = 0
        slots = [step % size for step in range(self._completed - len(state), self._completed)]
        self._ring_WGLC[slots, :, row] = state.to(self._ring_WGLC.device)
        self._work_out()
