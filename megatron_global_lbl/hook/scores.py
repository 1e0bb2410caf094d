"""The scores of the auxiliary loss without the selection that Megatron makes from them.

`compute_routing_scores_for_aux_loss` also picks the top-k of its scores, for upstream's losses: five passes over [tokens,
experts]. This plugin counts what the router selected and needs the scores only. They are computed here wherever it is known
what they are: in float32, with the same bits as Megatron's own. Under `--moe-router-fusion` Megatron's are those of Transformer
Engine, the same function, which up to 2.12 are rounded to the type of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_global_lbl.hook import compatibility


def known(score_function: str, dtype: torch.dtype) -> bool:
    """Whether the scores of logits of this type are the function below, computed in float32.

    Args:
        score_function: Megatron's `--moe-router-score-function`.
        dtype: of the logits.
    """
    if score_function == "sigmoid":
        return dtype is torch.float32 or compatibility.takes_sigmoid_in_float32()
    return score_function in ("softmax", "sqrtsoftplus")


def scores_only(logits: Tensor, score_function: str, padding_mask: Tensor | None) -> Tensor | None:
    """[T, E] float32 scores with rows of padding zero, or None if Megatron has to compute them.

    Args:
        logits: [T, E] of the router.
        score_function: as above.
        padding_mask: [T] bool, True for padding, or None.
    """
    if not known(score_function, logits.dtype):
        return None
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    else:
        logits = logits.float()
        scores = torch.sigmoid(logits) if score_function == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return scores if padding_mask is None else scores * (~padding_mask).unsqueeze(-1)
