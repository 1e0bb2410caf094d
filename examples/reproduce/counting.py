"""Balance losses that are no scope of the plugin, for the experiments only: what f counts over is the only difference.

They stand in for Megatron's `_apply_aux_loss` (with `--moe-lbl-scope micro`, which leaves it alone), are built from the
plugin's pure function `load_balancing_loss`, and attached with Megatron's `MoEAuxLossAutoScaler`. One data-parallel rank.

    sequences:N    N consecutive sequences of the micro-batch: what `dp` computes over N ranks of one sequence each
    shuffled:N     as many random tokens of the micro-batch as N sequences have, wherever they come from: every token is in one
                   such group, f and p are over it (the paper's table 2)
    delayed:D:W    all of the step's tokens in p, in f those of the W steps that ended D steps ago; D = 0 is the step itself,
                   D = 1 is the plugin's `window`. Before there are any, f is uniform

Shape suffixes: T tokens, E experts, G tokens of a group.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from megatron_global_lbl import load_balancing_loss

HELP = "sequences:N, shuffled:N or delayed:D:W (counting.py)"


class Counting:
    """One of these losses, for all layers of a model."""

    def __init__(self, kind: str) -> None:
        """
        Raises:
            SystemExit: an unknown kind.
        """
        name, *numbers = kind.split(":")
        if {"sequences": 1, "shuffled": 1, "delayed": 2}.get(name) != len(numbers) or not all(map(str.isdigit, numbers)):
            raise SystemExit(f"--reproduce-count {kind}: unknown; allowed: {HELP}")
        self._name, self._numbers = name, [int(number) for number in numbers]
        self._generator = torch.Generator().manual_seed(1234)
        self._past: dict[int, deque[Tensor]] = {}

    def loss(self, layer: int, scores_TE: Tensor, map_TE: Tensor, coeff: float, sequence_length: int) -> Tensor:
        """The loss of a micro-batch whose tokens lie as in Megatron's layers: the first of all sequences, the second, ..."""
        if self._name == "delayed":
            return self._delayed(layer, scores_TE, map_TE, coeff)
        group = self._numbers[0] * sequence_length
        if self._name == "shuffled":
            order_T = torch.randperm(len(scores_TE), generator=self._generator).to(scores_TE.device)
        else:  # all tokens of the first sequence, of the second, ...
            order_T = torch.arange(len(scores_TE), device=scores_TE.device).view(sequence_length, -1).t().reshape(-1)
        losses = [
            load_balancing_loss(scores=scores_TE[of_G], tokens_per_expert=map_TE[of_G].sum(0), coeff=coeff)
            for of_G in order_T.split(group)
        ]
        return torch.stack(losses).mean()

    def _delayed(self, layer: int, scores_TE: Tensor, map_TE: Tensor, coeff: float) -> Tensor:
        delay, steps = self._numbers
        counts = self._past.setdefault(layer, deque(maxlen=delay + steps))
        counts.append(map_TE.sum(0))
        due = list(counts)[max(0, len(counts) - delay - steps) : len(counts) - delay]
        if not due:
            return scores_TE.sum() * 0
        return load_balancing_loss(scores=scores_TE, tokens_per_expert=torch.stack(due).sum(0), coeff=coeff)


def install(kind: str) -> None:
    """Let every router have this loss instead of Megatron's.

    Raises:
        SystemExit: an unknown kind.
    """
    counting = Counting(kind)
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args

    def apply_aux_loss(
        self: Any, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        coeff = self.get_aux_loss_coeff("aux_loss")
        if coeff == 0:
            return probs
        loss = counting.loss(self.layer_number, scores_for_aux_loss, routing_map, coeff, get_args().seq_length)
        return MoEAuxLossAutoScaler.apply(probs, loss)

    TopKRouter._apply_aux_loss = apply_aux_loss
