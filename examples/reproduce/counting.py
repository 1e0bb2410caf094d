"""Balancing that the plugin does not have, for the experiments only: what a method counts over is the only difference.

Each kind replaces a function of Megatron; the plugin's scope is `micro`, which changes nothing. One data-parallel rank, one
micro-batch in a step. A group is N sequences; what a method takes from each group is averaged over the step's groups.

In place of `aux_loss`, built from the plugin's `load_balancing_loss`:

    sequences:N    a loss per group: what `dp` computes over N ranks of one sequence each
    shuffled:N     the same, but a group is as many random tokens as N sequences have (the paper's table 2)
    delayed:D:W    all of the step's tokens in p, in f those of the W steps that ended D steps ago; D = 0 is the step itself.
                   Before there are any, f is uniform. delayed:D:W:S uses the step itself for the first S steps
    hinge:C        the loss over the step, and C times a hinge for experts below 0.064 of an even share (arXiv 2509.19349)

In place of what Megatron counts for its other methods:

    bias:N         --moe-router-enable-expert-bias: the sign of each group's excess moves the bias
    quantile:N     quantile balancing: the quantiles of each group

Shape suffixes: T tokens, E experts, G tokens of a group, K selected experts.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_global_lbl import load_balancing_loss

HELP = "sequences:N, shuffled:N, delayed:D:W, delayed:D:W:S, hinge:C, bias:N or quantile:N (counting.py)"
NUMBERS = {"sequences": (1,), "shuffled": (1,), "delayed": (2, 3), "hinge": (1,), "bias": (1,), "quantile": (1,)}
STARVED = 0.064  # of an even share: the threshold of arXiv 2509.19349


def parse(kind: str) -> tuple[str, list[float]]:
    """Name and numbers of a kind.

    Raises:
        SystemExit: an unknown kind.
    """
    name, *words = kind.split(":")
    plain = all(word.replace(".", "", 1 if name == "hinge" else 0).isdigit() for word in words)
    if len(words) not in NUMBERS.get(name, ()) or not plain:
        raise SystemExit(f"--reproduce-count {kind}: unknown; allowed: {HELP}")
    return name, [float(word) if name == "hinge" else int(word) for word in words]


def groups(tokens: int, sequences: int, sequence_length: int) -> tuple[Tensor, ...]:
    """Indices [G] of each group, of tokens that lie as in Megatron's layers: the first of all sequences, the second, ..."""
    order_T = torch.arange(tokens).view(sequence_length, -1).t().reshape(-1)
    return order_T.split(sequences * sequence_length)


class Counting:
    """One of the losses, for all layers of a model."""

    def __init__(self, kind: str) -> None:
        self._name, self._numbers = parse(kind)
        self._generator = torch.Generator().manual_seed(1234)
        self._past: dict[int, deque[Tensor]] = {}
        self._steps: dict[int, int] = {}

    def loss(self, layer: int, scores_TE: Tensor, map_TE: Tensor, coeff: float, sequence_length: int) -> Tensor:
        """The loss of a micro-batch, which is the step."""
        if self._name == "delayed":
            return self._delayed(layer, scores_TE, map_TE, coeff)
        if self._name == "hinge":
            return load_balancing_loss(scores=scores_TE, tokens_per_expert=map_TE.sum(0), coeff=coeff) + coeff * self._numbers[
                0
            ] * hinge(scores_TE, map_TE)
        sequences = int(self._numbers[0])
        if self._name == "shuffled":
            parts = torch.randperm(len(scores_TE), generator=self._generator).split(sequences * sequence_length)
        else:
            parts = groups(len(scores_TE), sequences, sequence_length)
        losses = [
            load_balancing_loss(scores=scores_TE[of_G], tokens_per_expert=map_TE[of_G].sum(0), coeff=coeff) for of_G in parts
        ]
        return torch.stack(losses).mean()

    def _delayed(self, layer: int, scores_TE: Tensor, map_TE: Tensor, coeff: float) -> Tensor:
        delay, steps, *own = map(int, self._numbers)
        counts = self._past.setdefault(layer, deque(maxlen=delay + steps))
        counts.append(map_TE.sum(0))
        self._steps[layer] = self._steps.get(layer, 0) + 1
        due = list(counts)[max(0, len(counts) - delay - steps) : len(counts) - delay]
        if own and self._steps[layer] <= own[0]:
            due = [counts[-1]]
        if not due:
            return scores_TE.sum() * 0
        return load_balancing_loss(scores=scores_TE, tokens_per_expert=torch.stack(due).sum(0), coeff=coeff)


def hinge(scores_TE: Tensor, map_TE: Tensor) -> Tensor:
    """s * sum_i max(0, 0.064 / E - f_i), with s = 1.5 - H(p) / log E; f_i is passed the gradient of p_i (straight through)."""
    f_E = map_TE.sum(0) / map_TE.sum()
    p_E = scores_TE.mean(0)
    even = 1 / len(p_E)
    entropy = torch.special.entr(p_E.detach()).sum() / math.log(len(p_E))
    return (1.5 - entropy) * torch.relu(STARVED * even - (f_E + p_E - p_E.detach())).sum()


def excess(map_TE: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """Mean over groups of the sign of each expert's load above the group's mean."""
    signs = [torch.sign(load_E - load_E.mean()) for of_G in parts for load_E in [map_TE[of_G].sum(0).float()]]
    return torch.stack(signs).mean(0)


def quantiles(update: Callable[..., Any], parts: tuple[Tensor, ...], scores_TE: Tensor, topk: int, beta_E: Tensor) -> Any:
    """Megatron's `qb_dual_update`: selected experts [T, K] of all tokens, and the mean over groups of their quantiles."""
    selected_TK, _ = update(scores_TE, topk, beta_E, update_beta=False)
    return selected_TK, torch.stack([update(scores_TE[of_G], topk, beta_E)[1] for of_G in parts]).mean(0)


def install(kind: str) -> None:
    """Let every router balance in this way.

    Raises:
        SystemExit: an unknown kind.
    """
    name, numbers = parse(kind)
    from megatron.core.transformer.moe import router
    from megatron.training import get_args

    def parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
        return groups(len(tensor), int(numbers[0]), get_args().seq_length)

    if name == "bias":

        @torch.no_grad()
        def apply_expert_bias(self: Any, routing_map: Tensor, *_: Any, **__: Any) -> None:
            if self.enable_expert_bias and self.training:
                self.local_tokens_per_expert += excess(routing_map, parts_of(routing_map))

        router.TopKRouter._apply_expert_bias = apply_expert_bias
        finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]  # the package's name is the function's
        finalize.get_updated_expert_bias = lambda excess, bias, rate, **_: bias - rate * excess  # type: ignore[attr-defined]
    elif name == "quantile":
        update = router.qb_dual_update

        def qb_dual_update(scores: Tensor, k: int, beta: Tensor, update_beta: bool = True) -> Any:
            return quantiles(update, parts_of(scores), scores, k, beta) if update_beta else update(scores, k, beta, update_beta)

        router.qb_dual_update = qb_dual_update
    else:
        counting = Counting(kind)
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        def apply_aux_loss(
            self: Any, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, *_: Any, **__: Any
        ) -> Tensor:
            coeff = self.get_aux_loss_coeff("aux_loss")
            if coeff == 0:
                return probs
            loss = counting.loss(self.layer_number, scores_for_aux_loss, routing_map, coeff, get_args().seq_length)
            return MoEAuxLossAutoScaler.apply(probs, loss)

        router.TopKRouter._apply_aux_loss = apply_aux_loss
