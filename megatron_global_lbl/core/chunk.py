"""The main idea: what a micro-batch counts in its forward, summed over ranks once, and read in its backward.

    the forward of a model chunk begins   a `MicroBatch` opens: a table with a row per MoE layer, in the model's order
      a router's forward                  writes its counts and summed scores into its row
    the forward ends                      the table closes, and one asynchronous all-reduce of it starts on every rank of the
                                          pipeline stage, also on a rank that ran no router: rows of what did not run are zero
    the first router's backward           waits, adds the counts to the step's, and computes the gradient rows of all layers
      a router's backward                 takes its row

f is read in the backward: that late, the balance batch of scope `global` holds every micro-batch of the step whose forward has
run. Under pipeline parallelism these are more than the ones before it.

Counts are integer tensors outside of any module, so no cast of the model to bf16 reaches them. They stay where they are as long
as the chunk: a replayed CUDA graph adds to them. Every valid token selects top-k experts, so counts also give the number of
tokens. Shape suffixes: R rows (a layer has one per application), L layers, E experts, X extras (observer.py),
G groups of ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_global_lbl.core.collective import Reduction, WholeGraph, is_capturing, sync_group
from megatron_global_lbl.core.loss import score_gradient
from megatron_global_lbl.core.observer import EXTRAS
from megatron_global_lbl.core.router import RouterInfo, RouterLoss
from megatron_global_lbl.settings import ConfigError, Scope, Settings


class ChunkReport(NamedTuple):
    """What a chunk did in a step, as this rank saw it.

    Attributes:
        with_loss: layers that have a loss for the scope; `acted`: those of them whose loss was replaced.
        paths: how those computed it.
        ranks, micro_batches: of the step.
        sequences: of a micro-batch on this rank, mean; `balance_sequences`: of the balance batch, mean over the micro-batches.
        balance_selections: the same in selections, [R] on the device; 0 for a layer that did not run.
        selections_per_token: [R].
        leads_stage: this rank is the first of the pipeline stage.
        biased: an expert bias balances a layer that acted, too.
    """

    with_loss: list[str]
    acted: list[str]
    paths: list[str]
    ranks: int
    micro_batches: int
    sequences: float
    balance_sequences: float
    balance_selections: Tensor | None
    selections_per_token: list[int]
    leads_stage: bool
    biased: bool


class Layer:
    """A MoE layer of a chunk.

    Attributes:
        index: in the chunk; `first_row`: of its rows.
        forwards: counted in Python since the last step's end; `captured_forwards`: by one capture of a CUDA graph, whose
            replays run no Python; 0 if there is none.
        awaited: forwards whose backward has not come.
        kind: of the loss that was replaced in this step; None if none was.
        path: how the last forward in scope computed the loss, "fused: ..." or "plain: why".
        coeffs, loss: of the router's last forward (hook/router.py keeps them).
        ticket: scratch of the kernels, which leave a zero behind.
        is_wide: no layer of the chunk has more experts.
    """

    is_wide: bool

    def __init__(self, router: nn.Module, info: RouterInfo, chunk: Chunk, index: int, first_row: int) -> None:
        self._router = weakref.ref(router)
        self.info, self.chunk, self.index, self.first_row = info, chunk, index, first_row
        self.captured_forwards = 0
        self.path = ""
        self.coeffs: tuple[float, ...] | None = None
        self.loss: RouterLoss | None = None
        self.ticket = torch.zeros((), dtype=torch.int32, device=info.device)
        self.begin_step()

    @property
    def router(self) -> nn.Module | None:
        """None when the model is gone."""
        return self._router()

    def begin_step(self) -> None:
        self.forwards = self.awaited = 0
        if not self.captured_forwards:  # otherwise what the capture found holds for the replays
            self.kind: str | None = None


class Chunk:
    """The MoE layers of one model chunk on this rank, and the micro-batches of their step.

    Attributes:
        layers: in the model's order.
        ranks: data-parallel ranks over which f is counted.
        counts_LE: [L, E] int64 of the step, over `ranks`; those of `pending` micro-batches are not in it yet.
        score_sums_LE: [L, E] float32 of the step, this rank's, for the log.
        current: the open micro-batch.
        in_forward: the wrapper's forward is running.
        ran, trained: a forward, a backward has run in Python since the last step's end.
        ended_at: iteration of the step that ended last.
        steps: that have ended; `unfinished`: steps in a row that began and did not end.
        dropped: how often the counts of an unfinished step were dropped.
        removed: the registration is gone.
        micro_batches, sequences: closed since the last step's end, and their sequences on this rank.
        balance_sequences: sequences over which f was counted, summed over `balanced` micro-batches; `balance_selections_R`: [R]
            int64, the same in selections.
    """

    def __init__(
        self,
        routers: Sequence[nn.Module],
        find: Callable[[nn.Module], RouterInfo],
        settings: Settings,
        whole_graph: WholeGraph,
        *,
        extras: bool,
        in_scope: Callable[[Chunk], bool],
    ) -> None:
        """
        Args:
            routers: at least one, in an order that is the same on all ranks of the stage.
            find: gives what is known about a router.
            settings: the registration's.
            whole_graph: may hold a step.
            extras: the observer wants `EXTRAS`.
            in_scope: asked when a micro-batch opens: False before `start_iter`.

        Raises:
            ConfigError: a CUDA graph is being captured, or `--moe-lbl-group-size` does not fit.
        """
        self.settings, self.whole_graph, self.in_scope = settings, whole_graph, in_scope
        infos = [find(router) for router in routers]
        first = infos[0]
        self.stage, self.model, self.per_token, self.device = first.stage, first.model, first.per_token, first.device
        self.groups, self.group, self.ranks = sync_group(self.stage, self.model, settings.group_size)
        self.layers: list[Layer] = []
        of_rows: list[int] = []
        for index, (router, info) in enumerate(zip(routers, infos)):
            self.layers.append(Layer(router, info, self, index, len(of_rows)))
            of_rows += [index] * info.applications
        if is_capturing(self.layers[0].ticket):  # each replay would begin with zeros that are made here
            raise ConfigError(
                f"MoE layer {first.key} runs for the first time while a CUDA graph is captured: run a training step, or the "
                "warm-up of the graphs, before it (--cuda-graph-warmup-steps 1 or more)"
            )
        self.rows, self.experts = len(of_rows), max(info.num_experts for info in infos)
        for layer in self.layers:
            layer.is_wide = layer.info.num_experts == self.experts
        self.extras = len(EXTRAS) if extras else 0
        self.has_loss = any(info.has_loss for info in infos)
        self.repeated = torch.tensor(of_rows, device=self.device) if self.rows > len(infos) else None
        self.counts_LE = torch.zeros(len(infos), self.experts, dtype=torch.int64, device=self.device)
        self.score_sums_LE = torch.zeros(len(infos), self.experts, device=self.device)
        # Constants of the rows: numbers, or [R, 1] tensors where layers differ.
        self._topk_L = [info.topk for info in infos]
        repeated = settings.scope is Scope.GLOBAL  # the step's counts hold all applications of a layer
        self.selections_per_token = [infos[i].topk * (infos[i].applications if repeated else 1) for i in of_rows]
        self.topk = self._constant([float(infos[index].topk) for index in of_rows])
        self.share = self._constant([infos[index].num_experts / self.experts for index in of_rows])
        self.micro_coeff = self._constant([settings.micro_coeff / infos[index].applications for index in of_rows])
        # CUDA graphs of layers: their replays add to the table, and read the gradients.
        self.replayed = Table(self)
        self.gradient_RE = torch.zeros(self.rows, self.experts, device=self.device)
        self.micro_gradient_RE = torch.zeros_like(self.gradient_RE) if settings.micro_coeff else None
        self.replays, self.replayed_sequences = False, 0
        self.current: MicroBatch | None = None
        self.closed: MicroBatch | None = None
        self.pending: list[MicroBatch] = []
        self.unlogged: list[MicroBatch] = []
        self.in_forward = self.removed = False
        self.steps = self.unfinished = self.dropped = 0
        self.ended_at = -1
        self._captured_balance = (0, 0)
        self.balance_selections_R = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        self._captured_report: ChunkReport | None = None
        self._last_log: list[tuple[Layer, Tensor, str]] = []
        self.on_close: Callable[[MicroBatch], None] | None = None
        self._begin_step()

    def _constant(self, of_rows: list[float]) -> Tensor | float:
        if len(set(of_rows)) == 1:
            return of_rows[0]
        return torch.tensor(of_rows, device=self.device).unsqueeze(1)

    def _begin_step(self) -> None:
        self.ran = self.trained = False
        self.micro_batches = self.sequences = self.balance_sequences = self.balanced = self._counted_sequences = 0
        for layer in self.layers:
            layer.begin_step()

    @property
    def captured(self) -> bool:
        """True if a CUDA graph holds one of its forwards."""
        return any(layer.captured_forwards for layer in self.layers)

    @property
    def may_have_counted(self) -> bool:
        """Since the last step's end, in Python or in a replay."""
        return self.ran or self.captured

    # Micro-batches.

    def begin_forward(self, sequences: int | None) -> None:
        """Open a micro-batch of this many sequences (None: as the routers see it)."""
        self.close()
        self.current = MicroBatch(self)
        self.current.sequences = sequences or 0
        self.in_forward = self.ran = True

    def end_forward(self) -> None:
        self.in_forward = False
        self.close()

    def abort_forward(self) -> None:
        """The forward has raised."""
        self.in_forward, self.current = False, None

    def row(self, layer: Layer) -> tuple[MicroBatch, int]:
        """Reserve the row of a forward that is starting now.

        Raises:
            ConfigError: the layer has no row left in the micro-batch of this forward.
        """
        batch, applications = self.current, layer.info.applications
        if batch is not None and batch.runs[layer.index] == applications:
            if self.in_forward:
                raise ConfigError(
                    f"MoE layer {layer.info.key} ran {applications + 1} times in one forward of its model chunk, and has "
                    f"{applications} row(s) there: ranks could run it unequally often. Call the model once per micro-batch"
                )
            self.close()
            batch = None
        if batch is None:
            batch = self.current = MicroBatch(self)
            self.ran = True
        run = batch.runs[layer.index]
        batch.runs[layer.index] += 1
        batch.written += 1
        return batch, layer.first_row + run

    def has_written(self) -> None:
        """A row has been written. Outside of the wrapper's forward (combined 1F1B) the last one closes the micro-batch."""
        if not self.in_forward and self.current is not None and self.current.written == self.rows:
            self.close()

    def close(self) -> None:
        """Close the open micro-batch, if there is one, and start its all-reduce."""
        batch, self.current = self.current, None
        if batch is None:
            return
        if self.replays:
            batch.take_replayed()
        self.micro_batches += 1
        self.sequences += batch.sequences
        self.closed = batch
        if batch.in_scope:
            self.pending.append(batch)
            self.unlogged.append(batch)
            batch.start()
        if self.on_close is not None:
            self.on_close(batch)

    def take_in(self) -> None:
        """Add the closed micro-batches to the step's counts; waits for their all-reduces."""
        for batch in self.pending:
            summed_RE = batch.wait()
            self._counted_sequences += batch.sequences
            if self.repeated is None:
                self.counts_LE.add_(summed_RE)
            else:
                self.counts_LE.index_add_(0, self.repeated, summed_RE.to(torch.int64))
        self.pending.clear()

    @property
    def balance(self) -> tuple[int, int]:
        """(`balance_sequences`, `balanced`) of the step; replays of a whole step run no Python, and do what was captured."""
        return (self.balance_sequences, self.balanced) if self.micro_batches else self._captured_balance

    def note_balance_batch(self, batch: MicroBatch, counts_RE: Tensor) -> None:
        """f of a micro-batch is known: it is counted from `counts_RE`."""
        counted = self._counted_sequences if self.settings.scope is Scope.GLOBAL else batch.sequences
        self.balance_sequences += counted * self.ranks
        self.balanced += 1
        self.balance_selections_R.add_(counts_RE.sum(dim=1))

    def report(self) -> ChunkReport:
        """Of the step that ends now."""
        if self.micro_batches == 0 and self._captured_report is not None:  # replays of a whole step run no Python
            return self._captured_report
        batches, balanced = max(self.micro_batches, 1), max(self.balanced, 1)
        with_loss = [layer for layer in self.layers if layer.info.has_loss]
        acted = [layer for layer in with_loss if layer.kind]
        sequences = self.sequences / batches
        report = ChunkReport(
            [layer.info.key for layer in with_loss],
            [layer.info.key for layer in acted],
            [layer.path for layer in acted],
            self.ranks,
            self.micro_batches,
            sequences,
            self.balance_sequences / balanced if self.balanced else sequences,
            self.balance_selections_R / balanced if self.balanced else None,
            self.selections_per_token,
            self.layers[0].info.leads_stage,
            any("expert_bias" in layer.info.balancing for layer in acted),
        )
        if self.captured:
            self._captured_report, self._captured_balance = report, self.balance
        return report

    # Steps.

    def end_step(self) -> None:
        """Log the step, and forget what was counted."""
        self.log_rest()
        self._last_log.clear()
        if any(layer.kind for layer in self.layers):
            self._log()
        self._forget()
        self.steps += 1
        self.unfinished = 0

    def take_back_step(self) -> None:
        """The step that ended last is run again."""
        for layer, loss, kind in self._last_log:
            layer.info.log(-loss, kind)
        self._last_log.clear()
        self.steps -= 1

    def drop_step(self) -> None:
        """Forget what was counted. A backward that still comes raises."""
        self.dropped += 1
        self._forget()

    def _forget(self) -> None:
        self.settle()
        for tensor in (self.counts_LE, self.score_sums_LE, self.balance_selections_R):
            tensor.zero_()
        self._begin_step()

    def settle(self) -> None:
        """Leave nothing under way."""
        self.current = self.closed = None
        if self.replays:
            self.replayed.zero()
        for batch in self.pending:
            batch.settle()
        self.pending.clear()
        self.unlogged.clear()

    def log_rest(self) -> None:
        """Add the score sums of micro-batches that await no backward (of frozen routers) to those of the step."""
        for batch in list(self.unlogged):
            batch.add_to_log()

    def _log(self) -> None:
        """Log each layer's loss: alpha = 1, times the micro-batches; a sum over TP x CP, a mean over dp ranks."""
        self.take_in()
        sums_LE = self.score_sums_LE
        if self.settings.scope is Scope.GLOBAL:  # with f of the whole step, not a mean over its beginnings
            topk: Tensor | int = self._topk_L[0]
            if len(set(self._topk_L)) > 1:
                topk = torch.tensor(self._topk_L, device=self.device).unsqueeze(1)
            tokens_L1 = self.counts_LE.sum(dim=1, keepdim=True) / (topk * self.ranks)
            share = self.share if self.repeated is None or isinstance(self.share, float) else self.share[self._first_rows()]
            sums_LE = score_gradient(tokens_per_expert=self.counts_LE, num_tokens=tokens_L1, coeff=share) * sums_LE
        sums_L = sums_LE.sum(dim=1)
        for layer in self.layers:
            if layer.kind:
                times = (layer.forwards or layer.captured_forwards) if self.settings.scope is Scope.GLOBAL else 1
                loss = sums_L[layer.index] * times
                self._last_log.append((layer, loss, layer.kind))
                layer.info.log(loss, layer.kind)

    def _first_rows(self) -> Tensor:
        return torch.tensor([layer.first_row for layer in self.layers], device=self.device)


class Table:
    """Counts and score sums of a micro-batch on this rank, in one zeroed allocation.

    Attributes:
        counts_RE: [R, E] int32 selections.
        sums_RE: [R, E] float32 scores.
        extras_RX: [R, X] float32; X is 0 without detailed metrics.
        by_row: [E] counts and [E] score sums of each row.
    """

    def __init__(self, chunk: Chunk) -> None:
        width = chunk.experts + chunk.extras
        self._both = torch.zeros(2, chunk.rows, width, dtype=torch.int32, device=chunk.device)
        counts, sums = self._both.unbind()
        sums = sums.view(torch.float32)
        self.counts_RE, self.sums_RE, self.extras_RX = counts, sums, sums[:, :0]
        if chunk.extras:
            self.counts_RE = counts[:, : chunk.experts]
            self.sums_RE, self.extras_RX = sums.split([chunk.experts, chunk.extras], dim=1)
        self.by_row = list(zip(self.counts_RE.unbind(), self.sums_RE.unbind()))  # cheaper than one by one

    def zero(self) -> None:
        self._both.zero_()


class MicroBatch(Table):
    """What the forwards of one micro-batch leave for their backwards.

    Attributes:
        in_scope: the plugin's loss acts: the scope is not `micro`, and `start_iter` has come.
        sequences: on this rank.
        runs: by layer, how many of its rows are taken; `written`: rows in all.
        awaited: backwards that are still to come.
        fused: a forward was counted by the kernels.
    """

    def __init__(self, chunk: Chunk) -> None:
        super().__init__(chunk)
        self.chunk = chunk
        self.in_scope = chunk.has_loss and chunk.in_scope(chunk)
        self.runs = [0] * len(chunk.layers)
        self.sequences = self.written = self.awaited = 0
        self.fused = False
        self._summed: Reduction | None = None
        self._micro: Reduction | None = None
        self._unit_RE: Tensor | None = None  # gradient rows for alpha = 1
        self._mean_RE: Tensor | None = None  # the same if p is a mean over this micro-batch's tokens
        self._micro_RE: Tensor | None = None
        self._scale: object = None
        self._rows: tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None] | None = None

    def take_replayed(self) -> None:
        """Add what replays of CUDA graphs have counted."""
        replayed = self.chunk.replayed
        self._both[0] += replayed._both[0]
        self._both[1].view(torch.float32).add_(replayed._both[1].view(torch.float32))
        replayed.zero()
        self.sequences = self.sequences or self.chunk.replayed_sequences
        for layer in self.chunk.layers:
            if layer.captured_forwards and not self.runs[layer.index]:
                layer.forwards += layer.info.applications

    def start(self) -> None:
        """Start summing the counts over ranks."""
        chunk, counts_RE = self.chunk, self.counts_RE
        if chunk.settings.micro_coeff:
            own_RE = counts_RE.clone() if chunk.model.size() > 1 else counts_RE
            self._micro = Reduction(own_RE, chunk.model, whole_graph=chunk.whole_graph)
        if chunk.groups > 1:
            counts_GRE = counts_RE.new_zeros(chunk.groups, *counts_RE.shape)
            counts_GRE[chunk.group] = counts_RE
        else:
            own_is_read = chunk.on_close is not None or self._micro is not None
            counts_GRE = (counts_RE.clone() if own_is_read and chunk.stage.size() > 1 else counts_RE).unsqueeze(0)
        self._summed = Reduction(counts_GRE, chunk.stage, whole_graph=chunk.whole_graph)

    def wait(self) -> Tensor:
        """[R, E] counts over the ranks of the sync group."""
        assert self._summed is not None
        return self._summed.wait()[self.chunk.group]

    def settle(self) -> None:
        for reduction in (self._summed, self._micro):
            if reduction is not None:
                reduction.settle()

    def gradient(self, row: int, coeff: float, scale: Tensor | float) -> tuple[Tensor, float]:
        """([E], factor) of a row: their product is the gradient of the loss with respect to the scores of any token on this
        rank, scaled so that DDP's mean over ranks gives that of the whole loss, times `scale`."""
        if self._unit_RE is None:
            self._work_out()
        if self._rows is None or self._scale is not scale:
            assert self._unit_RE is not None
            unit_RE, micro_RE = self._unit_RE, self._micro_RE
            if isinstance(scale, Tensor) or micro_RE is not None:
                scale_here = scale.to(unit_RE.device) if isinstance(scale, Tensor) else scale
                unit_RE, micro_RE = unit_RE * scale_here, None if micro_RE is None else micro_RE * scale_here
            self._scale, self._rows = scale, (unit_RE.unbind(), None if micro_RE is None else micro_RE.unbind())
        unit, micro = self._rows
        if micro is not None:
            return torch.add(micro[row], unit[row], alpha=coeff), 1.0
        return unit[row], coeff if isinstance(scale, Tensor) else coeff * scale

    def prepare_replays(self, scale: Tensor | float) -> None:
        """Write the gradient rows to where replayed backwards read them; called when the chunk's backward begins."""
        if self._unit_RE is None:
            self._work_out()
        chunk = self.chunk
        assert self._unit_RE is not None
        torch.mul(self._unit_RE, scale, out=chunk.gradient_RE)
        if chunk.micro_gradient_RE is not None:
            assert self._micro_RE is not None
            torch.mul(self._micro_RE, scale, out=chunk.micro_gradient_RE)
        if not self.awaited:
            self.add_to_log()

    def _work_out(self) -> None:
        """Compute the gradient rows of all layers: the micro-batch's first backward."""
        chunk = self.chunk
        if chunk.current is self:
            chunk.close()
        of_step = chunk.settings.scope is Scope.GLOBAL
        if of_step:
            chunk.take_in()
        elif self in chunk.pending:
            chunk.pending.remove(self)
        own_RE = self.wait()
        counts_RE = own_RE
        if of_step:
            counts_RE = chunk.counts_LE if chunk.repeated is None else chunk.counts_LE[chunk.repeated]
        chunk.note_balance_batch(self, counts_RE)
        if not (chunk.per_token and of_step):
            mean_RE = self._gradient_rows(counts_RE, own_RE, chunk.topk * chunk.ranks)
            self._mean_RE = None if of_step else mean_RE
        self._unit_RE = self._gradient_rows(counts_RE, None, 1.0) if chunk.per_token else mean_RE
        if self._micro is not None:
            micro_RE = self._micro.wait()
            if chunk.per_token:
                self._micro_RE = self._gradient_rows(micro_RE, None, chunk.micro_coeff)
            else:
                self._micro_RE = self._gradient_rows(micro_RE, micro_RE, chunk.micro_coeff * chunk.topk)

    def _gradient_rows(self, counts_RE: Tensor, own_RE: Tensor | None, factor: Tensor | float) -> Tensor:
        """factor * E * f [/ selections in own_RE], with f from counts_RE."""
        factor = factor * self.chunk.share
        if self.fused:
            from megatron_global_lbl.core.fused.forward import gradient_rows  # here: it needs Triton

            return gradient_rows(counts_RE, own_RE, factor)
        tokens = 1.0 if own_RE is None else own_RE.sum(dim=1, keepdim=True, dtype=torch.float32)
        return score_gradient(tokens_per_expert=counts_RE, num_tokens=tokens, coeff=factor)

    def backward_has_come(self) -> None:
        """One of those that were awaited. The last one completes the score sums."""
        self.awaited -= 1
        if not self.awaited:
            self.add_to_log()

    def add_to_log(self) -> None:
        """Add the score sums to those of the step."""
        chunk, sums_RE = self.chunk, self.sums_RE
        if self not in chunk.unlogged:
            return
        chunk.unlogged.remove(self)
        if self._unit_RE is None:
            self._work_out()
        if chunk.settings.scope is not Scope.GLOBAL:
            assert self._mean_RE is not None
            sums_RE = sums_RE * self._mean_RE
        if chunk.repeated is None:
            chunk.score_sums_LE.add_(sums_RE)
        else:
            chunk.score_sums_LE.index_add_(0, chunk.repeated, sums_RE)
