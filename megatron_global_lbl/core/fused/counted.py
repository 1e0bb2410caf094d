"""What a forward that the kernels counted leaves for its backward; one class per scope, as in balance.py."""

from __future__ import annotations

from torch import Tensor

from megatron_global_lbl.core.balance import CountedForward, Dp, Global, Window
from megatron_global_lbl.core.collective import is_capturing
from megatron_global_lbl.core.fused import launch
from megatron_global_lbl.core.layers import Layer
from megatron_global_lbl.settings import Scope


def count(
    layer: Layer,
    logits: Tensor,
    selection: Tensor,
    padding_mask: Tensor | None,
    *,
    score_function: str,
    log: bool,
    keep: bool,
) -> FusedForward:
    """Count a forward in scope that is running now, and start the reductions that the scope needs.

    Args:
        layer: whose forward it is.
        logits: [T, E] of the router.
        selection: [T, E] bool, the experts that the router selected for each token.
        padding_mask: [T] bool, True for padding; None when every token is valid.
        score_function: Megatron's name of it.
        log: its backward will come: in scope `window` the scores may be summed into the step's at once.
        keep: something looks on, and wants this rank's counts and summed scores by themselves.
    """
    settings = layer.table.settings
    log_now = log and settings.scope is Scope.WINDOW and not keep
    counts, sums_E = launch.count(
        logits.detach().contiguous(),
        selection,
        padding_mask,
        score_function=score_function,
        copies=1 + bool(settings.micro_coeff) + keep,
        ticket=layer.ticket,
        step_C=layer.counts_C,
        scope=settings.scope,
        add_sums_to=layer.score_sums_E if log_now else None,
    )
    layer.captured |= is_capturing(counts)
    return FUSED_SCOPES[settings.scope](layer, counts, sums_E, logged=log_now, keep=keep)


class FusedForward(CountedForward):
    """A counted forward whose scores are summed, too."""

    is_fused = True
    score_sums_E: Tensor

    def __init__(self, layer: Layer, counts: Tensor, score_sums_E: Tensor, *, logged: bool, keep: bool) -> None:
        """
        Args:
            layer: whose forward it is.
            counts: [1 to 3, E] int32, the same; with a micro-batch LBL the second is summed over ranks of its own in place, and
                the last is left alone if it is to be kept.
            score_sums_E: [E] float32 of this rank's valid tokens.
            logged: they have been added to the step's.
            keep: see `count`.
        """
        super().__init__(layer, counts[0], True, copy_E=counts[1] if len(counts) > 1 else None)
        self.score_sums_E, self._logged = score_sums_E, logged
        self.own_counts_E = counts[-1] if keep else None

    def observe(self, score_sums_E: Tensor) -> None:
        """`dp` and `global` add them to the log in the backward."""

    def fused_score_gradient(self, *, coeff: float, per_token: bool) -> tuple[Tensor, float]:
        """`score_gradient` by a kernel, and what it is still to be multiplied with; adds the summed scores for the log."""
        return self._launch(coeff, per_token), 1.0

    def _launch(self, coeff: float, per_token: bool, window_E: Tensor | None = None) -> Tensor:
        table = self.layer.table
        micro_E = None if self._micro is None else self._micro.wait()
        own_E, pending_E = self._counts(micro_E)
        return launch.score_gradient(
            scope=table.settings.scope,
            own_E=own_E,
            step_C=self.layer.counts_C,
            pending_E=pending_E,
            micro_E=micro_E,
            window_E=window_E,
            sums_E=self.score_sums_E,
            step_sums_E=self.layer.score_sums_E,
            coeff=coeff,
            micro_coeff=self._micro_coeff,
            topk=table.topk,
            ranks=table.group.size,
            per_token=per_token,
        )

    def _counts(self, micro_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of this micro-batch over the ranks, and what the step has not got yet."""
        raise NotImplementedError


class _FusedDp(FusedForward, Dp):
    def _counts(self, micro_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._summed.wait(), None


class _FusedGlobal(FusedForward, Global):
    def _counts(self, micro_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._summed.wait(), self.layer.take_pending()


class _FusedWindow(FusedForward, Window):
    def observe(self, score_sums_E: Tensor) -> None:
        if not self._logged:  # counted by the first forward of a recomputed layer
            self.layer.score_sums_E += score_sums_E

    def fused_score_gradient(self, *, coeff: float, per_token: bool) -> tuple[Tensor, float]:
        gradient_E = self.unit_gradient(per_token)
        if self._micro is None:
            return gradient_E, coeff
        return self._launch(coeff, per_token, gradient_E), 1.0

    def _counts(self, micro_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert micro_E is not None
        return micro_E, None


FUSED_SCOPES = {Scope.DP: _FusedDp, Scope.GLOBAL: _FusedGlobal, Scope.WINDOW: _FusedWindow}
