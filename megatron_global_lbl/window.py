"""Scope `window`: f from the last W completed optimizer steps, one packed reduction per step for all layers.

The sums are exact: each step's integer counts are kept, and the oldest are subtracted when they leave the window. One more
step is kept, so that the newest can be taken back when Megatron runs an iteration again. Before the first step has completed
f is uniform, whose gradient is zero.

With `--moe-lbl-group-size` every rank keeps the counts of all groups of its stage (G rows): the one packed reduction over
the stage fills them without a process group of its own, and a checkpoint written by any rank is complete.

f does not change within a step, so a layer's gradient is worked out once per step, into a tensor that stays where it is: a
replayed CUDA graph reads it there.

Shape suffixes: G groups of data-parallel ranks (1 unless `--moe-lbl-group-size`), E experts, C = E + 1 counts (see balance.py).
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from megatron_global_lbl.collective import BalanceGroup, Reduction
from megatron_global_lbl.loss import score_gradient


class LayerWindow:
    """The last W steps' counts of one layer."""

    def __init__(
        self, steps: int, group: BalanceGroup, num_experts: int, topk: int, device: torch.device, owner: Window
    ) -> None:
        self.group = group
        self.num_counts = num_experts + 1
        self._topk = topk
        self._owner = owner
        self._max_steps = steps
        self._steps: deque[Tensor] = deque(maxlen=steps + 1)
        self._sum_GC = torch.zeros(group.parts, self.num_counts, dtype=torch.int64, device=device)
        self._gradient_E = torch.zeros(num_experts, device=device)
        self._per_token_gradient_E = torch.zeros(num_experts, device=device)

    def push(self, counts_GC: Tensor) -> None:
        """Add a completed step; the oldest one leaves when the window is full."""
        self._sum_GC += counts_GC
        if len(self._steps) >= self._max_steps:
            self._sum_GC -= self._steps[-self._max_steps]
        self._steps.append(counts_GC)
        self._work_out()

    def pop(self) -> None:
        """Take the newest step back: the window is what it was before, but it cannot be done twice in a row."""
        self._sum_GC -= self._steps.pop()
        if len(self._steps) >= self._max_steps:
            self._sum_GC += self._steps[-self._max_steps]
        self._work_out()

    def _work_out(self) -> None:
        counts_E, forwards = self._sum_GC[self.group.index].split([self.num_counts - 1, 1])
        # Every rank of TP x CP counted the micro-batches of its data-parallel rank.
        micro_batches = forwards[0].clamp(min=1) / self.group.model.size()
        tokens = counts_E.sum(dtype=torch.float32) / self._topk / micro_batches
        self._per_token_gradient_E.copy_(score_gradient(tokens_per_expert=counts_E, num_tokens=1))
        self._gradient_E.copy_(score_gradient(tokens_per_expert=counts_E, num_tokens=tokens))

    @property
    def counts(self) -> Tensor:
        """[C] sums over the completed steps of this rank's group; zeros before the first."""
        self._owner.settle()
        return self._sum_GC[self.group.index]

    def score_gradient(self, *, per_token: bool) -> Tensor:
        """[E] gradient with respect to a token's scores for alpha = 1; zeros (f is uniform) before the first step.

        Args:
            per_token: p not divided; otherwise by the mean number of valid tokens per data-parallel rank and micro-batch.
        """
        self._owner.settle()
        return self._per_token_gradient_E if per_token else self._gradient_E

    def state(self) -> Tensor:
        """[steps, G, C] int64 on the CPU, oldest first."""
        if not self._steps:
            return torch.zeros(0, *self._sum_GC.shape, dtype=torch.int64)
        return torch.stack(list(self._steps)[-self._max_steps :]).cpu()

    def load(self, state: Tensor) -> None:
        """Continue from `state()` of a run with the same experts and groups; more steps than W: the newest W.

        Raises:
            ValueError: the shape does not fit this run.
        """
        if tuple(state.shape[1:]) != tuple(self._sum_GC.shape):
            raise ValueError(
                f"window has shape {tuple(state.shape[1:])} [groups, experts + 1], this run {tuple(self._sum_GC.shape)}"
            )
        self._steps.clear()
        self._sum_GC.zero_()
        for counts_GC in state[-self._max_steps :]:
            self.push(counts_GC.to(self._sum_GC.device))


class Window:
    """The windows of this rank's layers, and the one reduction per step that feeds them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._under_way: tuple[Reduction, list[LayerWindow]] | None = None
        self._newest: list[LayerWindow] = []
        self._loaded: dict[str, Tensor] = {}
        self._layers: dict[str, LayerWindow] = {}

    def add_layer(self, key: str, group: BalanceGroup, num_experts: int, topk: int, device: torch.device) -> LayerWindow:
        """The window of a layer that is met for the first time; takes up what a checkpoint brought for it."""
        layer = self._layers[key] = LayerWindow(self.steps, group, num_experts, topk, device, self)
        if key in self._loaded:
            layer.load(self._loaded.pop(key))
        return layer

    def step_completed(self, counts: list[tuple[LayerWindow, Tensor]], *, blocking: bool) -> None:
        """Start summing the completed step over the ranks of the stage.

        Args:
            counts: each layer's window, and its [C] counts of the step on this rank.
            blocking: wait for the sums on the spot.
        """
        self.settle()
        group = counts[0][0].group
        local = torch.cat([counts_C for _, counts_C in counts])
        packed = torch.zeros(group.parts, local.numel(), dtype=torch.int64, device=local.device)
        packed[group.index] = local
        self._under_way = (Reduction(packed, group.stage, blocking=blocking), [layer for layer, _ in counts])

    def settle(self) -> None:
        """Wait for the step under way, if any, and push its counts into the layers' windows."""
        if self._under_way is None:
            return
        reduction, layers = self._under_way
        self._under_way = None
        for layer, counts_GC in zip(layers, reduction.wait().split([layer.num_counts for layer in layers], dim=1)):
            layer.push(counts_GC)
        self._newest = layers

    def forget_newest(self) -> None:
        """Take the step that was completed last back: it is run again."""
        self.settle()
        for layer in self._newest:
            layer.pop()
        self._newest = []

    def state(self) -> dict[str, Tensor]:
        """What the window remembers, by layer key; includes what was loaded for layers not met yet."""
        self.settle()
        return {**self._loaded, **{key: layer.state() for key, layer in self._layers.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`; layers that do not exist yet take theirs up when they are met."""
        self.settle()
        self._loaded = dict(state)
        for key in [key for key in self._layers if key in self._loaded]:
            self._layers[key].load(self._loaded.pop(key))
