"""How alike the experts of a layer are, and whether the router prefers those that say more: after "A Closer Look into
Mixture-of-Experts in Large Language Models" (Lo et al., arXiv 2406.18219, sections 4 and 5).

    similarity of weights   cosine between experts, all weight matrices of an expert taken as one vector
    similarity of outputs   cosine between what two experts make of the same token, mean over tokens
    similarity of gates     cosine between rows of the router's weight
    norm against score      per token: an expert's output norm over the token's mean norm, against the rank of its score

Weights and outputs stay where they are: the ranks of an expert-parallel group exchange columns, each sums the products of its
share, and what is added up over the group has E x E numbers. Shape suffixes: E experts, e experts of this rank, T tokens,
H hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_global_lbl.core.collective import Reduction, exchange_columns

CHUNK_COLUMNS = 1 << 20  # per exchange; bounds the copy in float32
CHUNK_TOKENS = 16


def weight_products(
    matrices: list[list[Tensor]], expert_parallel: dist.ProcessGroup, expert_tensor: dist.ProcessGroup
) -> Tensor:
    """[E, E] float64 products of the experts' weights.

    Args:
        matrices: for each weight matrix, this rank's part of it, flat, for each of its e experts.
        expert_parallel: the ranks that have the other experts.
        expert_tensor: the ranks that have the other parts of these experts.
    """
    total_EE: Tensor | None = None
    for experts in matrices:
        for start in range(0, experts[0].numel(), CHUNK_COLUMNS):
            rows_e = torch.stack([weight[start : start + CHUNK_COLUMNS].float() for weight in experts])
            share_E = exchange_columns(rows_e, expert_parallel)
            products_EE = (share_E @ share_E.T).double()
            total_EE = products_EE if total_EE is None else total_EE + products_EE
    assert total_EE is not None
    for group in (expert_parallel, expert_tensor):
        Reduction(total_EE, group).wait()
    return total_EE


def output_products(outputs_eTH: Tensor, expert_parallel: dist.ProcessGroup) -> Tensor:
    """[T, E, E] float32 products of what the experts make of each token.

    Args:
        outputs_eTH: of this rank's experts, whole (summed over expert tensor parallelism); the same tokens on every rank.
        expert_parallel: the ranks that have the other experts.
    """
    parts = []
    experts, tokens, hidden = outputs_eTH.shape
    for start in range(0, tokens, CHUNK_TOKENS):
        chunk_eTH = outputs_eTH[:, start : start + CHUNK_TOKENS].float()
        share = exchange_columns(chunk_eTH.reshape(-1, hidden), expert_parallel)
        share_TEH = share.view(experts * expert_parallel.size(), chunk_eTH.shape[1], -1).transpose(0, 1)
        parts.append(Reduction(share_TEH @ share_TEH.transpose(1, 2), expert_parallel).wait())
    return torch.cat(parts)


def cosines(products: Tensor) -> Tensor:
    """Cosine similarity from products over the last two dimensions; 0 where a vector is zero."""
    norms = norms_of(products)
    cosine = products / (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp(min=torch.finfo(products.dtype).tiny)
    return cosine.clamp(-1, 1)


def norms_of(products: Tensor) -> Tensor:
    """The vectors' norms, from their products over the last two dimensions."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def relative_norms_by_rank(norms_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """[T, E] norms over the token's mean norm, the expert with the highest score first."""
    relative_TE = norms_TE / norms_TE.mean(dim=1, keepdim=True).clamp(min=torch.finfo(norms_TE.dtype).tiny)
    return relative_TE.gather(1, scores_TE.argsort(dim=1, descending=True))


def rank_correlations(x_TE: Tensor, y_TE: Tensor) -> Tensor:
    """[T] Spearman's correlation over the experts, per token; ties are broken by the experts' numbers."""
    ranks = [values.argsort(dim=1, stable=True).argsort(dim=1).double() for values in (x_TE, y_TE)]
    x_TE, y_TE = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    return (x_TE * y_TE).sum(dim=1) / (x_TE.square().sum(dim=1) * y_TE.square().sum(dim=1)).sqrt()
