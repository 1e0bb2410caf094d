"""The counts of one step: a row per MoE layer, so that a few small launches end it for all layers together.

A table holds layers whose steps end together: those of one model on this rank. Which these are shows at a step's end; layers
that then part (another model's, or one that did not run) get a table of their own.

Counts are integer tensors outside of any module, which no cast of the model to bf16 reaches, and lie where they are as long as
the table: a replayed CUDA graph adds to them there.
Shape suffixes: L layers, E experts, C = E + 1 counts (selections per expert, and forwards).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_global_lbl.core.collective import BalanceGroup, Reduction, is_capturing
from megatron_global_lbl.core.loss import score_gradient
from megatron_global_lbl.core.router_info import RouterInfo
from megatron_global_lbl.core.whole_graph import WholeGraph
from megatron_global_lbl.core.window import Window
from megatron_global_lbl.settings import ConfigError, Scope, Settings, Sync


class Layer:
    """One MoE layer of one model, and where its step is.

    Attributes:
        ran: a forward has run since the last step's end.
        awaited: forwards that were counted and whose backward has not run.
        trained: a backward has run since the last step's end.
        forwards: that were counted in Python since the last step's end.
        kind: of the loss that was replaced in this step; None if none was.
        path: how the last forward's loss was computed: "fused: ..." or "plain: why"; empty if it had none of ours.
        captured: a CUDA graph holds a forward, whose replays run no Python.
        may_have_counted: something may have been counted since the last step's end, in Python or in a replay.
        dropped: how often the counts of an unfinished step were dropped.
        steps: completed optimizer steps.
        unfinished: steps in a row that were begun and not ended.
    """

    counts_C: Tensor
    score_sums_E: Tensor
    ticket: Tensor

    def __init__(self, info: RouterInfo, table: LayerTable) -> None:
        self.info, self.captured, self.steps, self.dropped, self.unfinished = info, False, 0, 0, 0
        self.kind: str | None = None
        self.path = ""
        self.under_way: list[Reduction] = []  # that this step has started
        self.uncounted: list[Reduction] = []  # of these what the step's counts do not hold yet
        self._new_step()
        table.add(self)

    def place(self, table: LayerTable, row: int) -> None:
        """Count in this row from now on."""
        self.table, self.row = table, row
        self.counts_C, self.score_sums_E = table.counts_LC[row], table.score_sums_LE[row]
        self.ticket = table.tickets_L[row]

    @property
    def may_have_counted(self) -> bool:
        return self.ran or self.captured

    def counts_of_step(self) -> Tensor:
        """[C] over the step's micro-batches whose forward has run; waits for what is still under way."""
        for reduction in self.uncounted:
            self.counts_C[:-1].add_(reduction.wait())
        self.uncounted.clear()
        return self.counts_C

    def take_pending(self) -> Tensor | None:
        """[E] int32 that the caller adds to the step's counts on the device, after which these hold every forward that has run;
        None if they do already. Adds the rest if there is more, as in the first backward of a pipeline stage."""
        if not self.uncounted:
            return None
        last = self.uncounted.pop()
        self.counts_of_step()
        return last.wait()

    def settle(self) -> None:
        """Leave no reduction under way."""
        for reduction in self.under_way:
            reduction.settle()
        self.under_way.clear()
        self.uncounted.clear()

    def end_step(self) -> None:
        """The step's counts have been used; the table zeroes them."""
        self.steps += 1
        self.unfinished = 0
        self._new_step()

    def drop_step(self) -> None:
        """The step's counts count for nothing; the table zeroes them. A backward that still comes is told so."""
        self.dropped += 1
        self._new_step()

    def _new_step(self) -> None:
        self.ran = self.trained = False
        self.awaited = self.forwards = 0
        if not self.captured:  # a replay tells nothing, so what the capture told holds
            self.kind = None


class LayerTable:
    """The MoE layers of one model on this rank that are alike: same experts, top-k and ranks."""

    def __init__(self, rows: int, info: RouterInfo, group: BalanceGroup, settings: Settings, whole_graph: WholeGraph) -> None:
        """
        Raises:
            ConfigError: a CUDA graph is being captured: each replay would begin with the zeros of this table.
        """
        self.num_experts, self.topk, self.group, self.settings = info.num_experts, info.topk, group, settings
        self.whole_graph = whole_graph
        self.acts = info.acts
        self.counts_LC = torch.zeros(rows, info.num_experts + 1, dtype=torch.int64, device=info.device)
        if is_capturing(self.counts_LC):
            raise ConfigError(
                f"MoE layer {info.key} runs for the first time while a CUDA graph is captured; allowed: a training step, or "
                "the warm-up of the graphs, before it (--cuda-graph-warmup-steps 1 or more)"
            )
        self.score_sums_LE = torch.zeros(rows, info.num_experts, device=info.device)
        # Of the kernels (fused/count_kernel.py), which leave a zero behind.
        self.tickets_L = torch.zeros(rows, dtype=torch.int32, device=info.device)
        self.layers: list[Layer] = []
        self.takes_more = True
        self.removed = False
        self.can_repeat = False
        self._logged: list[tuple[Layer, Tensor, str]] = []
        steps = settings.window_steps if info.acts else None
        self.window = None if steps is None else Window(steps, group, self.counts_LC, info.topk)

    def takes(self, info: RouterInfo, group: BalanceGroup) -> bool:
        """Whether a layer that is met for the first time belongs here."""
        alike = (self.num_experts, self.topk, self.acts) == (info.num_experts, info.topk, info.acts) and self.group is group
        return alike and self.takes_more and len(self.layers) < len(self.counts_LC)

    def add(self, layer: Layer) -> None:
        """The next row for this layer."""
        layer.place(self, len(self.layers))
        self.layers.append(layer)

    def parted(self, ended: Iterable[Layer]) -> list[LayerTable]:
        """Two tables instead of this one: the layers whose step ends now, and the others.

        Raises:
            ConfigError: a CUDA graph counts in this table, so nothing can be moved.
        """
        if any(layer.captured for layer in self.layers):
            raise ConfigError(
                "steps of MoE layers that were counted together end apart, and a CUDA graph holds one of them; allowed: a "
                "first step of each model before the graphs are captured"
            )
        ended = set(ended)
        sides = [layer for layer in self.layers if layer in ended], [layer for layer in self.layers if layer not in ended]
        return [self._with_rows(side) for side in sides]

    def _with_rows(self, layers: list[Layer]) -> LayerTable:
        rows = [layer.row for layer in layers]
        table = LayerTable(len(rows), layers[0].info, self.group, self.settings, self.whole_graph)
        table.takes_more, table.can_repeat = False, self.can_repeat
        table.counts_LC.copy_(self.counts_LC[rows])
        table.score_sums_LE.copy_(self.score_sums_LE[rows])
        if self.window is not None:
            table.window = self.window.with_rows(rows)
        for layer in layers:
            table.add(layer)
        return table

    def end_step(self) -> None:
        """The step of all these layers is over: log it, feed the window, forget the counts."""
        self.takes_more = False
        self._logged = self._losses() if any(layer.kind for layer in self.layers) else []
        for layer, loss, kind in self._logged:
            layer.info.log(loss, kind)
        if self.window is not None:
            self.window.step_completed(self.counts_LC[: len(self.layers)], blocking=self.settings.sync is Sync.BLOCKING)
            if any(layer.captured for layer in self.layers):  # nobody asks for f in the next step: the graph reads it there
                self.window.settle()
        self._zero(self.layers)
        for layer in self.layers:
            layer.end_step()
        self.can_repeat = True

    def repeat_step(self) -> None:
        """The step that ended last is run again: only once until the next has ended."""
        if not self.can_repeat:
            return
        self.can_repeat = False
        if self.window is not None:
            self.window.take_back()
        for layer, loss, kind in self._logged:
            layer.info.log(-loss, kind)
        for layer in self.layers:
            layer.steps -= 1

    def drop_step(self, layers: list[Layer]) -> None:
        """Forget what these layers counted since their last step's end."""
        self._zero(layers)
        for layer in layers:
            layer.drop_step()

    def settle(self) -> None:
        """Leave no reduction under way."""
        for layer in self.layers:
            layer.settle()
        if self.window is not None:
            self.window.settle()

    def _zero(self, layers: list[Layer]) -> None:
        for layer in layers:
            layer.settle()
        if len(layers) == len(self.layers):
            self.counts_LC.zero_()
            self.score_sums_LE.zero_()
            return
        for layer in layers:
            layer.counts_C.zero_()
            layer.score_sums_E.zero_()

    def _losses(self) -> list[tuple[Layer, Tensor, str]]:
        """Each layer's loss and its kind for Megatron's log: alpha = 1, times the micro-batches; sum over TP x CP, mean over dp
        ranks."""
        losses = zip(self.layers, self._step_losses_LE().sum(dim=1))
        return [(layer, loss, layer.kind) for layer, loss in losses if layer.kind]

    def _step_losses_LE(self) -> Tensor:
        if self.settings.scope is Scope.DP:
            return self.score_sums_LE  # multiplied by f already, which differs over micro-batches
        if self.window is not None:
            return self.window.score_gradient(per_token=False) * self.score_sums_LE
        # With the f of the whole step: not a mean over the beginnings of the global batch.
        for layer in self.layers:
            layer.counts_of_step()
        counts_LE, micro_batches_L1 = self.counts_LC.split([self.num_experts, 1], dim=1)
        tokens_L1 = counts_LE.sum(dim=1, keepdim=True) / (self.topk * self.group.size)
        return score_gradient(tokens_per_expert=counts_LE, num_tokens=tokens_L1) * self.score_sums_LE * micro_batches_L1
