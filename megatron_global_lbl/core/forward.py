"""One router forward, from its beginning to the loss that is attached to it. Knows no symbol of Megatron.

The hook calls `begin`, `before_selection` and `finish`, and fills in what it sees in between.
Shape suffixes: T tokens on this rank, E experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_global_lbl.core.attach import LossOnLogits, attach_loss, attach_to_logits
from megatron_global_lbl.core.chunk import Layer, MicroBatch
from megatron_global_lbl.core.collective import is_capturing
from megatron_global_lbl.core.fused.choice import FUSED, Choice, why_not
from megatron_global_lbl.core.recompute import Pass, Recompute, refuse_unknown_recompute
from megatron_global_lbl.core.router import RouterLoss
from megatron_global_lbl.core.step import Steps
from megatron_global_lbl.settings import ConfigError


def selections_per_expert(selection: Tensor, padding_mask: Tensor | None, out: Tensor | None = None) -> Tensor:
    """[E] int32 selections of one forward on this rank.

    Args:
        selection: [T, E] bool, the experts that the router selected for each token.
        padding_mask: [T] bool, True for padding; None when every token is valid.
        out: where to write them.
    """
    if padding_mask is not None:
        selection = selection & ~padding_mask.unsqueeze(1)
    # int32 is enough for one micro-batch (2^31 tokens over all ranks), and is what travels.
    return torch.sum(selection, dim=0, dtype=torch.int32, out=out)


class CountedForward:
    """A row of a micro-batch: what one forward of one layer leaves for its backward.

    Attributes:
        batch: None for a replayed CUDA graph of layers, whose micro-batch is not known when it is captured.
    """

    __slots__ = ("_awaited", "_dropped", "batch", "fused", "layer", "row")

    def __init__(self, layer: Layer, capturing: bool) -> None:
        chunk = layer.chunk
        self.layer = layer
        self.batch: MicroBatch | None = None
        if capturing and not chunk.whole_graph.is_open:
            self.row = layer.first_row
            chunk.replays = True
        else:
            self.batch, self.row = chunk.row(layer)
        self.fused = self._awaited = False
        self._dropped = chunk.dropped
        layer.forwards += 1
        if capturing:
            layer.captured_forwards = layer.forwards

    @property
    def in_scope(self) -> bool:
        """The plugin's loss replaces Megatron's."""
        layer = self.layer
        return layer.info.has_loss and (layer.chunk.in_scope(layer.chunk) if self.batch is None else self.batch.in_scope)

    def tables(self) -> tuple[Tensor, Tensor]:
        """([E] int32 selections, [E] float32 summed scores) on this rank, to be written."""
        layer = self.layer
        table = layer.chunk.replayed if self.batch is None else self.batch
        counts_E, sums_E = table.by_row[self.row]
        return (counts_E, sums_E) if layer.is_wide else (counts_E[: layer.info.num_experts], sums_E[: layer.info.num_experts])

    def add_extras(self, values_X: Tensor) -> None:
        """Add [X] sums for detailed metrics."""
        table = self.layer.chunk.replayed if self.batch is None else self.batch
        table.extras_RX[self.row].add_(values_X)

    def gradient(self, coeff: float) -> tuple[Tensor, float]:
        """See `MicroBatch.gradient`; called in the backward.

        Raises:
            ConfigError: as `require_counts`.
        """
        self.require_counts()
        layer = self.layer
        chunk, experts = layer.chunk, layer.info.num_experts
        chunk.trained = True
        if self.batch is not None:
            gradient_E, factor = self.batch.gradient(self.row, coeff, layer.info.backward_scale())
            return (gradient_E if layer.is_wide else gradient_E[:experts]), factor
        gradient_E = chunk.gradient_RE[self.row, :experts]
        if chunk.micro_gradient_RE is None:
            return gradient_E, coeff
        return torch.add(chunk.micro_gradient_RE[self.row, :experts], gradient_E, alpha=coeff), 1.0

    def await_backward(self) -> None:
        """Expect a backward; ending the step before it is an error."""
        if self.batch is not None:
            self._awaited = True
            self.layer.awaited += 1
            self.batch.awaited += 1

    def is_done(self) -> None:
        """The backward has taken the gradient."""
        if self._awaited and self.batch is not None:
            self._awaited = False
            self.layer.awaited -= 1
            self.batch.backward_has_come()

    def require_counts(self) -> None:
        """
        Raises:
            ConfigError: what this forward counted is gone.
        """
        chunk = self.layer.chunk
        if chunk.removed:
            raise ConfigError(
                f"the registration was removed before a backward of MoE layer {self.layer.info.key}: "
                "keep it until the step's end"
            )
        if chunk.dropped != self._dropped:
            raise ConfigError(
                f"the gradient buffer was zeroed between a forward of MoE layer {self.layer.info.key} and its backward, which "
                "dropped what it counted: call zero_grad_buffer before a step's first forward"
            )


@dataclass(slots=True)
class RouterForward:
    """One router forward; the hook fills in what it sees on the way.

    Attributes:
        layer: whose forward it is.
        which: ONLY, or one of the two forwards of a recomputed layer.
        loss: the router's own auxiliary loss; None if it has none in this forward.
        counted: its row; of a second forward, what the first one counted (None: nothing).
        trained: a backward can come.
        ours: Megatron's own loss is left out.
        selection: [T, E] bool, the experts that were selected.
        scores: [T, E] scores of the auxiliary losses; None in the first of two forwards, without such a loss, and where the
            kernels do without.
        logits: [T, E] of the router if the kernels take this forward (fused/choice.py); otherwise None.
        score_function: Megatron's name of it.
        attached: the loss on the logits; None in the first of two forwards.
        left_out: Megatron's own loss was left out.
    """

    layer: Layer
    which: Pass
    loss: RouterLoss | None
    counted: CountedForward | None
    ours: bool
    selection: Tensor | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None
    score_function: str = ""
    attached: LossOnLogits | None = None
    left_out: bool = False


@functools.cache
def _count_fused() -> Callable[..., None]:
    from megatron_global_lbl.core.fused.forward import count  # here: it needs Triton

    return count


class Forwards:
    """The router forwards of one registration."""

    def __init__(self, steps: Steps) -> None:
        """
        Raises:
            ConfigError: the environment variable of fused/choice.py has a value that is not allowed.
        """
        self.steps, self.settings = steps, steps.settings
        self.recompute = Recompute()
        self._wants_extras = steps.observer is not None and steps.observer.wants_extras
        self._choice = Choice.read()

    def begin(self, router: nn.Module, layer: Layer | None, loss: RouterLoss | None, sequences: int) -> RouterForward | None:
        """Begin a training forward. Returns None if the forward is ignored.

        Args:
            router: whose forward it is.
            layer: of the router, if it is known.
            loss: its auxiliary loss in this forward; None if the coefficient is 0.
            sequences: of the micro-batch, as the router sees it.

        Raises:
            ConfigError: the router belongs to no chunk, or is recomputed in an unknown way.
        """
        which = self.recompute.current_pass()
        if which is Pass.NONE:
            return None
        if layer is None:
            layer = self.steps.layer_of(router)
        if which is Pass.UNKNOWN:
            refuse_unknown_recompute(layer.info.key)
        if which is Pass.HANDED_DOWN:
            self.recompute.hand_down(layer)
            return None
        if which is Pass.SECOND:
            counted = self.recompute.call.take_up(layer)
            return RouterForward(layer, which, loss, counted, counted is not None and counted.in_scope and loss is not None)
        capturing = is_capturing(layer.ticket)
        if capturing:
            self._refuse_capture(layer)
        counted = CountedForward(layer, capturing)
        if counted.batch is None:
            layer.chunk.replayed_sequences = sequences
        elif not counted.batch.sequences:
            counted.batch.sequences = sequences
        self.steps.has_run(layer.chunk)
        return RouterForward(layer, which, loss, counted, counted.in_scope and loss is not None)

    def before_selection(self, forward: RouterForward, logits: Tensor, score_function: str | None) -> Tensor:
        """The router selects next; decides whether the kernels take this forward.

        Args:
            forward: what `begin` gave.
            logits: [T, E] from which it selects.
            score_function: that of the auxiliary loss, or None if its scores for these logits are not those of the kernels.

        Returns:
            logits, with the loss attached if it is one of the kernels' to attach.
        """
        if not forward.ours:
            return logits
        reason = self._why_not_fused(forward, logits, score_function)
        forward.layer.path = self.steps.loss_paths[forward.layer.info.key] = FUSED if reason is None else f"plain: {reason}"
        if reason is not None or score_function is None:
            return logits
        forward.logits = logits
        if forward.which is Pass.FIRST or not logits.requires_grad:
            return logits
        forward.attached = LossOnLogits(score_function)
        return attach_to_logits(logits, forward.attached)

    def needs_scores_now(self, forward: RouterForward) -> bool:
        """True in the first forward of a recomputed call that trains nothing, whose second never comes."""
        return forward.which is Pass.FIRST and forward.logits is None and not self.recompute.call.trained

    def finish(self, forward: RouterForward, *, probs: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The forward is over.

        Args:
            forward: what `begin` gave.
            probs: [T, E] the router's output.
            padding_mask: [T] bool, True for padding, or None.

        Returns:
            probs, with the loss attached if it is this plugin's to attach.
        """
        layer, counted, which, scores = forward.layer, forward.counted, forward.which, forward.scores
        if counted is None:
            if which is Pass.FIRST:
                self.recompute.call.keep(layer, None)
            return probs
        if which is not Pass.SECOND:
            self._count(forward, counted, padding_mask)
        if scores is not None and forward.logits is None:
            self._sum_scores(forward, counted, scores, padding_mask)
        if forward.ours:
            assert forward.loss is not None
            layer.kind = forward.loss.kind
        if which is Pass.FIRST:
            call = self.recompute.call
            call.keep(layer, counted)
            if call.trained and counted.in_scope:
                counted.await_backward()
            return probs
        trained = forward.attached is not None or probs.requires_grad or (scores is not None and scores.requires_grad)
        if not (trained and forward.ours):
            if counted.in_scope:
                counted.require_counts()
                layer.chunk.trained = True
                counted.is_done()  # the coefficient is 0, or all that leads here is frozen
            return probs
        assert forward.loss is not None
        if which is Pass.ONLY:
            counted.await_backward()
        if forward.attached is not None:
            forward.attached.counted, forward.attached.coeff = counted, forward.loss.coeff
            forward.attached.padding_mask = padding_mask
            return probs
        assert scores is not None
        return attach_loss(probs=probs, scores=scores, counted=counted, coeff=forward.loss.coeff)

    def _count(self, forward: RouterForward, counted: CountedForward, padding_mask: Tensor | None) -> None:
        """Write the row."""
        assert forward.selection is not None
        layer = forward.layer
        if forward.logits is not None:
            counted.fused = True
            _count_fused()(counted, forward.logits, forward.selection, padding_mask, score_function=forward.score_function)
        elif counted.batch is None:  # a replay; several may come in a row
            counted.tables()[0].add_(selections_per_expert(forward.selection, padding_mask))
        else:
            selections_per_expert(forward.selection, padding_mask, out=counted.tables()[0])
        layer.chunk.has_written()

    def _sum_scores(self, forward: RouterForward, counted: CountedForward, scores: Tensor, padding_mask: Tensor | None) -> None:
        """Write the summed scores, and what detailed metrics ask for. Rows of padding are zero."""
        with torch.no_grad():
            scores = scores.detach()
            sums_E = counted.tables()[1]
            if counted.batch is None:
                sums_E.add_(scores.sum(dim=0, dtype=torch.float32))
            else:
                torch.sum(scores, dim=0, dtype=torch.float32, out=sums_E)
            if self._wants_extras:
                counted.add_extras(_extras(scores.float(), forward.selection, padding_mask, forward.layer.info.topk))

    def _why_not_fused(self, forward: RouterForward, logits: Tensor, score_function: str | None) -> str | None:
        if self._wants_extras:
            return "--moe-lbl-metrics detailed needs the scores"
        if forward.loss is not None and not forward.loss.alone:
            return "another auxiliary loss or a subclass of the router needs the scores"
        if forward.which is Pass.SECOND and forward.counted is not None and not forward.counted.fused:
            return "the first forward of a recomputed layer was counted without the kernels"
        return why_not(self._choice, logits, score_function)

    def _refuse_capture(self, layer: Layer) -> None:
        info = layer.info
        if not layer.chunk.whole_graph.is_open and (info.combined or info.applications > 1):
            what = "--overlap-moe-expert-parallel-comm" if info.combined else "a repeated multi-token prediction layer"
            raise ConfigError(
                f"MoE layer {info.key} is captured in a CUDA graph of its layer with {what}, where its replays cannot be told "
                "apart by micro-batch: capture modules without the router"
            )
        if self.settings.start_iter:
            raise ConfigError(
                f"--moe-lbl-start-iter {self.settings.start_iter} does not work with CUDA graphs of the router, whose replays "
                "cannot change the loss: remove it, or capture other modules"
            )


def _extras(scores: Tensor, selection: Tensor | None, padding_mask: Tensor | None, topk: int) -> Tensor:
    """[X] sums of `EXTRAS` over the valid tokens.

    Args:
        scores: [T, E] float32, rows of padding zero.
        selection: [T, E] bool.
        padding_mask: [T] bool, True for padding, or None.
        topk: experts per token.
    """
    experts = scores.shape[1]
    entropy = torch.special.entr(scores).sum() / math.log(max(experts, 2))  # x log x is 0 at 0: padding adds nothing
    values, experts_TK = scores.topk(min(topk + 1, experts), dim=1)
    margin = (values[:, topk - 1] - values[:, topk]).sum() if experts > topk else values.new_zeros(())
    assert selection is not None
    kept_TK = selection.gather(1, experts_TK[:, :topk])
    if padding_mask is not None:
        kept_TK = kept_TK | padding_mask.unsqueeze(1)
    return torch.stack([entropy, margin, (~kept_TK).sum().float()])
