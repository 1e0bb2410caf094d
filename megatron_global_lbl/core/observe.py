"""What is told of a router forward to whatever looks on: sums, from tensors that are there for the loss.

Shape suffixes: T tokens on this rank, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_global_lbl.core.balance import CountedForward
from megatron_global_lbl.core.router_forward import Observed, RouterForward


def observed(
    forward: RouterForward,
    counted: CountedForward | None,
    counts_E: Tensor | None,
    score_sums_E: Tensor | None,
    with_entropy: bool,
) -> Observed:
    """The sums of one forward, to which the entropy of its scores is added if it is asked for: three passes over [T, E].

    Args:
        forward: with its scores, if it has some; rows of padding are zero.
        counted: what it, or the first forward of a recomputed layer, counted. The kernels made the sums already.
        counts_E: [E] selections; None if the kernels counted.
        score_sums_E: [E] summed scores.
        with_entropy: whether.
    """
    if counts_E is None:
        assert counted is not None
        counts_E, score_sums_E = counted.own_counts_E, counted.score_sums_E
    assert counts_E is not None
    entropy_sum = None
    if with_entropy and forward.scores is not None:
        with torch.no_grad():  # x log x is 0 at 0: padding adds nothing
            scores = forward.scores.detach().float()
            entropy_sum = torch.special.entr(scores).sum() / math.log(max(scores.shape[1], 2))
    alpha = 0.0 if forward.loss is None else forward.loss.coeff * forward.layer.info.applications
    return Observed(counts_E, score_sums_E, entropy_sum, forward.sequences, alpha)
