"""The scores of the auxiliary loss without the selection that Megatron makes from them.

`compute_routing_scores_for_aux_loss` also picks the top-k of its scores, for upstream's losses: five passes over [tokens,
experts]. This plugin counts what the router selected and needs the scores only. They are computed here where every supported
release agrees on them bit by bit; otherwise (fused kernels, other score functions) Megatron's function is called.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores_only(logits: Tensor, score_function: str, fused: bool, padding_mask: Tensor | None) -> Tensor | None:
    """[T, E] scores with rows of padding zero, or None if Megatron has to compute them.

    Args:
        logits: [T, E] of the router.
        score_function: Megatron's `--moe-router-score-function`.
        fused: `--moe-router-fusion`.
        padding_mask: [T] bool, True for padding, or None.
    """
    if fused:
        return None
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    elif score_function == "sigmoid" and logits.dtype is torch.float32:  # other dtypes differ before and after 0.17
        scores = torch.sigmoid(logits)
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    else:
        return None
    return scores if padding_mask is None else scores * (~padding_mask).unsqueeze(-1)
