"""The contract's formula in float64, in one process, by plain autograd. Shares no code with the plugin.

A toy model of L layers that every layout of the harness runs too:

    h_0 = x;    a_l = h_{l-1} W_l^T;    router of layer l sees a_l;    h_l = tanh(a_l)

so a router's loss reaches its own weight and every W below it. The main loss is zero: the gradient is the LBL's alone.
Index names: m micro-batch, d data-parallel rank, t token, i expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Problem:
    """One training problem, whatever the layout."""

    scope: str
    dp: int
    micro_batches: int
    steps: int = 1
    window_steps: int = 16
    per_token: bool = False
    masks: str = "none"  # none | uneven | empty_rank
    micro_coeff: float = 0.0
    start_iter: int = 0
    group_size: int | None = None
    layers: int = 2
    hidden: int = 16
    experts: int = 8
    topk: int = 2
    seq: int = 8
    batch: int = 2
    coeff: float = 0.02
    score: str = "softmax"
    bias: bool = False
    seed: int = 1234
    # Micro-batches whose forward has run when the backward of m runs, by stage; None: no pipeline, so 1..m.
    seen: tuple = field(default=None)  # type: ignore[assignment]


def weights(problem: Problem, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(W_l, router weight) per layer at a step, float32: they move between steps, as under an optimizer."""
    generator = torch.Generator().manual_seed(problem.seed)
    result = []
    for _ in range(problem.layers):
        below = torch.randn(problem.hidden, problem.hidden, generator=generator) / problem.hidden**0.5
        router = torch.randn(problem.experts, problem.hidden, generator=generator) * 0.3
        drift = torch.randn(problem.experts, problem.hidden, generator=generator) * 0.05
        result.append((below, router + step * drift))
    return result


def expert_bias(problem: Problem) -> torch.Tensor:
    """[E] float32, one per expert: shifts the selection, not the scores."""
    return torch.linspace(-0.2, 0.3, problem.experts)


def inputs(problem: Problem, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, D, S, B, H] float32, each (m, d) from a domain of its own, and padding [M, D, S, B], True for padding."""
    generator = torch.Generator().manual_seed(problem.seed + 7919 * (step + 1))
    shape = (problem.micro_batches, problem.dp, problem.seq, problem.batch, problem.hidden)
    x = torch.randn(shape, generator=generator)
    x = x + 1.5 * torch.randn(*shape[:2], 1, 1, problem.hidden, generator=generator)
    padding = torch.zeros(shape[:-1], dtype=torch.bool)
    if problem.masks != "none":
        lengths = torch.randint(1, problem.seq + 1, (*shape[:2], problem.batch), generator=generator)
        padding = torch.arange(problem.seq).view(1, 1, -1, 1) >= lengths.unsqueeze(2)
    if problem.masks == "empty_rank":
        padding[:, problem.dp - 1] = True
    return x, padding


def gradients(problem: Problem) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The true gradient of (W_l, router weight) per step and layer, float64."""
    counted: list[list[dict]] = []  # completed steps, per layer
    result = []
    for step in range(problem.steps):
        params = [tuple(w.double().requires_grad_() for w in pair) for pair in weights(problem, step)]
        x, padding = inputs(problem, step)
        valid = (~padding).double()
        h = x.double()
        loss = torch.zeros((), dtype=torch.float64)
        stats = []
        for layer, (below, router) in enumerate(params):
            a = h @ below.T
            h = torch.tanh(a)
            logits = a @ router.T
            scores = logits.softmax(-1)
            if problem.score == "sigmoid":
                scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            ranked = logits.sigmoid() if problem.score == "sigmoid" else logits
            if problem.bias:
                ranked = ranked + expert_bias(problem).double()
            chosen = ranked.detach().topk(problem.topk, dim=-1).indices
            r = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * valid.unsqueeze(-1)
            C_mdi = r.sum((2, 3)).detach()
            S_mdi = (scores * valid.unsqueeze(-1)).sum((2, 3))
            N_md = valid.sum((2, 3))
            stats.append({"C": C_mdi, "N": N_md})
            loss = loss + _layer_loss(problem, step, layer, C_mdi, S_mdi, N_md, counted)
        flat = [w for pair in params for w in pair]
        grads = torch.autograd.grad(loss, flat, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, flat)]
        result.append([(grads[2 * i], grads[2 * i + 1]) for i in range(problem.layers)])
        counted.append(stats)
    return result


def _layer_loss(problem, step, layer, C_mdi, S_mdi, N_md, counted) -> torch.Tensor:
    E, M, D = problem.experts, problem.micro_batches, problem.dp
    N_step = N_md.sum()
    size = problem.group_size or D
    groups = [range(g, g + size) for g in range(0, D, size)]
    loss = torch.zeros((), dtype=torch.float64)

    def lbl(alpha, C_i, S_i, tokens):
        f = C_i / C_i.sum().clamp(min=1)
        return alpha * E * (f * S_i).sum() / tokens.clamp(min=1)

    if step < problem.start_iter or problem.scope == "micro":
        return sum(lbl(problem.coeff, C_mdi[m, d], S_mdi[m, d], N_md[m, d]) for m in range(M) for d in range(D)) / (M * D)
    for m in range(M):
        for group in groups:
            S_i = S_mdi[m, group].sum(0)
            tokens = N_md[m, group].sum()
            if problem.scope == "dp":
                C_i = C_mdi[m, group].sum(0)
            elif problem.scope == "global":
                seen = list(problem.seen[layer][m]) if problem.seen is not None else list(range(m + 1))
                C_i = C_mdi[seen][:, group].sum((0, 1))
            else:
                past = counted[-problem.window_steps :]
                if not past:
                    continue  # f is uniform: no gradient
                C_i = sum(s[layer]["C"][:, group].sum((0, 1)) for s in past)
                mean = sum(s[layer]["N"][:, group].sum() for s in past) / sum(s[layer]["N"][:, group].numel() for s in past)
                tokens = len(group) * mean
            if problem.per_token:
                loss = loss + lbl(problem.coeff, C_i, S_i, N_step)
            else:
                loss = loss + lbl(problem.coeff, C_i, S_i, tokens) / (M * len(groups))
    for m in range(M):
        for d in range(D):
            tokens = N_step if problem.per_token else N_md[m, d]
            share = 1 if problem.per_token else M * D
            loss = loss + lbl(problem.micro_coeff, C_mdi[m, d], S_mdi[m, d], tokens) / share
    return loss
