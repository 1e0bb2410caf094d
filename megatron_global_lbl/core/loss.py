"""The mathematics of the load-balancing loss (LBL). Imports neither Megatron nor torch.distributed: no collective here.

    LBL = alpha * E * sum_i f_i * p_i                                  (Qiu et al., arXiv 2501.11873, eq. 2; GShard, Switch)
    f_i = C_i / sum_j C_j     share of the balance batch's selections that went to expert i; carries no gradient
    p_i = mean_t s[t, i]      mean score of expert i over the tokens whose gradient is taken

f comes from integers that may count far more tokens than `scores` holds: choosing that batch is all this plugin does.
Given f, the loss is linear in the scores: d LBL / d s[t, i] = alpha * E * f_i / tokens, the same for every token. So the
backward needs E numbers and no tensor of size [tokens, experts].

Shape suffixes: T tokens on this rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score_gradient(
    *, tokens_per_expert: Tensor, num_tokens: float | Tensor, coeff: float | Tensor = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """d LBL / d s[t, i], the same for every token t.

    Args:
        tokens_per_expert: [..., E] integer counts over the balance batch, of one or several layers.
        num_tokens: number of tokens that p is a mean over; a tensor ([..., 1] or a scalar) stays on its device.
        coeff: alpha; a tensor ([..., 1]) where layers differ.
        dtype: of the result, float32 or float64.

    Returns:
        [..., E], alpha * E * f_i / num_tokens; zeros when nothing was counted.
    """
    counts = tokens_per_expert.detach()
    if dtype is not torch.float32:
        counts = counts.to(dtype)
    # In floating point: the product of two large integers would overflow.
    tokens = num_tokens.to(dtype) if isinstance(num_tokens, Tensor) else float(num_tokens)
    # Integers times and divided by a float32 give float32, without a cast of their own.
    divisor = (counts.sum(dim=-1, keepdim=True) * tokens).clamp(min=1)
    return counts / divisor * (coeff * counts.shape[-1])


def load_balancing_loss(
    *,
    scores: Tensor,
    tokens_per_expert: Tensor,
    coeff: float = 1.0,
    num_tokens: int | Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The load-balancing loss of one MoE layer, alpha * E * sum_i f_i * p_i.

    A pure function of this process's tensors. Summing the results over ranks that each pass their own `scores` and the
    same `tokens_per_expert` and `num_tokens` gives the loss of the whole batch.

    Args:
        scores: [T, E] router scores for the auxiliary loss (Megatron: softmax, or sigmoid normalised over experts). The
            gradient flows through them.
        tokens_per_expert: [E] integer selections per expert, counted over the balance batch. No gradient.
        coeff: alpha. With 1.0 a perfectly balanced router gives 1.0.
        num_tokens: tokens that p is a mean over; default: the valid tokens of `scores`.
        padding_mask: [T] bool, True for padding (Megatron's convention); those rows count neither in p nor in its mean.

    Returns:
        A scalar of the scores' dtype.

    Raises:
        ValueError: shapes that do not fit together, counts that are not integers.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; allowed: [tokens, experts]")
    if tokens_per_expert.shape != scores.shape[1:]:
        raise ValueError(
            f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}; allowed: [{scores.shape[1]}], as scores has"
        )
    if tokens_per_expert.is_floating_point() or tokens_per_expert.is_complex():
        raise ValueError(f"tokens_per_expert has dtype {tokens_per_expert.dtype}; allowed: an integer type (exact counts)")
    if padding_mask is not None:
        if padding_mask.shape != scores.shape[:1] or padding_mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)} and dtype {padding_mask.dtype}; "
                f"allowed: [{scores.shape[0]}], torch.bool"
            )
        scores = scores.masked_fill(padding_mask.unsqueeze(1), 0)
    if num_tokens is None:
        num_tokens = scores.shape[0] if padding_mask is None else (~padding_mask).sum()
        num_tokens = max(num_tokens, 1) if isinstance(num_tokens, int) else num_tokens.clamp(min=1)
    dtype = torch.float64 if scores.dtype is torch.float64 else torch.float32
    gradient_E = score_gradient(tokens_per_expert=tokens_per_expert, num_tokens=num_tokens, coeff=coeff, dtype=dtype)
    return (scores.sum(dim=0) * gradient_E.to(scores.dtype)).sum()
