"""The contract's formula in float64, in one process, by plain autograd. Shares no code with the plugin.

A toy model of L layers that every layout of the harness runs too:

    h_0 = x;    a_l = h_{l-1} W_l^T;    router of layer l sees a_l;    h_l = tanh(a_l)

so a router's loss reaches its own weight and every W below it. Layers in `dense` have no router. A last block of multi-token
prediction may be applied several times in a row. The main loss is zero: the gradient is the LBL's alone.
Index names: m micro-batch, d data-parallel rank, t token, i expert, a application.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from order import seen_in_backward

# Sequences of other lengths instead of a mask: by chance, or 2^m tokens in micro-batch m.
LENGTHS = ("ragged", "powers")


@dataclass(frozen=True)
class Problem:
    """One training problem, whatever the layout."""

    scope: str
    dp: int
    micro_batches: int
    steps: int = 1
    per_token: bool = False
    masks: str = "none"  # none | uneven | empty_rank, or one of LENGTHS
    micro_coeff: float = 0.0
    start_iter: int = 0
    group_size: int | None = None
    layers: int = 2
    dense: tuple[int, ...] = ()  # numbers (from 1) of layers without a router
    mtp_applications: int = 0
    ramp_up: tuple[int, ...] = ()  # micro-batches of the first steps, before micro_batches holds
    hidden: int = 16
    experts: int = 8
    topk: int = 2
    groups: tuple[int, int] | None = None  # group-limited top-k: number of groups, groups per token
    seq: int = 8
    batch: int = 2
    coeff: float = 0.02
    coeffs: tuple[float | tuple[float, ...], ...] = ()  # instead, by step, or by step and forward
    together: int = 1  # forwards per micro-batch that one backward follows: chosen and rejected. M counts forwards then
    score: str = "softmax"
    bias: bool = False
    dtype: str = "float32"  # of parameters and inputs; the formula stays float64
    seed: int = 1234
    pipeline: tuple[int, int] = (1, 1)  # stages, model chunks per stage
    combined: bool = False  # forwards and backwards of other micro-batches layer by layer (combined 1F1B)

    @property
    def blocks(self) -> int:
        """Layers, and the block of multi-token prediction as one more."""
        return self.layers + (self.mtp_applications > 0)

    def coeff_at(self, step: int, m: int) -> float:
        of_step = self.coeffs[step] if self.coeffs else self.coeff
        return of_step[m] if isinstance(of_step, tuple) else of_step

    def micro_batches_at(self, step: int) -> int:
        return self.ramp_up[step] if step < len(self.ramp_up) else self.micro_batches

    def stage_and_chunk(self, number: int) -> tuple[int, int]:
        """Pipeline stage and model chunk of a layer (from 1), as Megatron lays them out; multi-token prediction is last."""
        index = (min(number, self.layers) - 1) // self.layers_per_chunk
        return index % self.pipeline[0], index // self.pipeline[0]

    @property
    def layers_per_chunk(self) -> int:
        stages, chunks = self.pipeline
        return self.layers // (stages * chunks)

    def seen(self, step: int, number: int) -> list[set[int]]:
        """By micro-batch: those whose forward of a layer (from 1) has run when its backward runs."""
        M, layers = self.micro_batches_at(step), self.layers_per_chunk
        if self.together > 1:
            return [set(range((m // self.together + 1) * self.together)) for m in range(M)]
        # All layers of a micro-batch have the f of its first backward, which is the last layer's.
        place = *self.stage_and_chunk(number), layers - 1
        return seen_in_backward(M, *place, *self.pipeline, layers if self.combined else 0)


def weights(problem: Problem, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(W_l, router weight) per block at a step, rounded to the problem's dtype: they move between steps, as under an
    optimizer."""
    generator = torch.Generator().manual_seed(problem.seed)
    result = []
    for _ in range(problem.blocks):
        below = torch.randn(problem.hidden, problem.hidden, generator=generator) / problem.hidden**0.5
        router = torch.randn(problem.experts, problem.hidden, generator=generator) * 0.3
        drift = torch.randn(problem.experts, problem.hidden, generator=generator) * 0.05
        result.append((_rounded(problem, below), _rounded(problem, router + step * drift)))
    return result


def _rounded(problem: Problem, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(getattr(torch, problem.dtype)).float()


def expert_bias(problem: Problem) -> torch.Tensor:
    """[E] float32, one per expert: shifts the selection, not the scores."""
    return torch.linspace(-0.2, 0.3, problem.experts)


def inputs(problem: Problem, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, D, S, B, H] float32, each (m, d) from a domain of its own, and padding [M, D, S, B], True for padding."""
    generator = torch.Generator().manual_seed(problem.seed + 7919 * (step + 1))
    shape = (problem.micro_batches_at(step), problem.dp, problem.seq, problem.batch, problem.hidden)
    x = torch.randn(shape, generator=generator)
    x = x + 1.5 * torch.randn(*shape[:2], 1, 1, problem.hidden, generator=generator)
    padding = torch.zeros(shape[:-1], dtype=torch.bool)
    if problem.masks == "ragged":
        # Even, so that two tensor-parallel ranks can share a sequence.
        lengths = 2 * torch.randint(1, problem.seq // 2 + 1, (*shape[:2], 1), generator=generator)
        padding |= torch.arange(problem.seq).view(1, 1, -1, 1) >= lengths.unsqueeze(2)
    elif problem.masks == "powers":
        padding = torch.arange(problem.seq) >= 2 ** torch.arange(shape[0]).unsqueeze(1)
        padding = padding.view(shape[0], 1, -1, 1).expand(shape[:-1]).clone()
    elif problem.masks != "none":
        lengths = torch.randint(1, problem.seq + 1, (*shape[:2], problem.batch), generator=generator)
        padding = torch.arange(problem.seq).view(1, 1, -1, 1) >= lengths.unsqueeze(2)
    if problem.masks == "empty_rank":
        padding[:, problem.dp - 1] = True
    return _rounded(problem, x), padding


def gradients(problem: Problem, selections=None) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The true gradient of (W_l, router weight) per step and block, float64.

    Args:
        selections: [step][block] -> [M, D, S, B, E] bool, what the routers of a low-precision model selected; without it the
            formula selects.
    """
    counted: list[list[dict]] = []  # completed steps, per block
    result = []
    for step in range(problem.steps):
        params = [tuple(w.double().requires_grad_() for w in pair) for pair in weights(problem, step)]
        loss = torch.zeros((), dtype=torch.float64)
        stats = []
        for block, applications in enumerate(_forward(problem, step, params, selections)):
            stats.append(
                {"C": sum(C for C, _, _ in applications), "N": torch.stack([N for _, _, N in applications], -1)}
                if applications
                else {}
            )
            for C_mdi, S_mdi, N_md in applications:
                share = 1 / len(applications)
                loss = loss + share * _layer_loss(problem, step, block, C_mdi, S_mdi, N_md, stats[block], counted)
        flat = [w for pair in params for w in pair]
        grads = torch.autograd.grad(loss, flat, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, flat)]
        result.append([(grads[2 * i], grads[2 * i + 1]) for i in range(problem.blocks)])
        counted.append(stats)
    return result


def sums(problem: Problem, step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per layer, over all ranks' valid tokens: selections [M, E], scores [M, E], tokens [M]; no dense layers. The repetitions
    of multi-token prediction come as more micro-batches."""
    return [tuple(t.sum(1) for t in layer) for layer in sums_of_ranks(problem, step)]


def sums_of_ranks(problem: Problem, step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same by data-parallel rank: [M, D, E], [M, D, E], [M, D]."""
    params = [tuple(w.double() for w in pair) for pair in weights(problem, step)]
    return [tuple(torch.cat(t) for t in zip(*applications)) for applications in _forward(problem, step, params, None)]


def _forward(problem: Problem, step: int, params, selections) -> list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Per block and application of its router (none if dense): selections [M, D, E], scores [M, D, E], tokens [M, D]."""
    x, padding = inputs(problem, step)
    valid = (~padding).double()
    h = x.double()
    result = []
    for block, (below, router) in enumerate(params):
        applications = []
        for _ in range(problem.mtp_applications if block == problem.layers else 1):
            a = h @ below.T
            h = torch.tanh(a)
            if block + 1 in problem.dense:
                continue
            logits = a @ router.T
            scores = logits.softmax(-1)
            if problem.score == "sigmoid":
                scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            if selections is None:
                r = _select(problem, logits.detach())
            else:
                r = selections[step][block].double()
            r = r * valid.unsqueeze(-1)
            C_mdi, S_mdi = r.sum((2, 3)), (scores * valid.unsqueeze(-1)).sum((2, 3))
            applications.append((C_mdi, S_mdi, valid.sum((2, 3))))
        result.append(applications)
    return result


def _select(problem: Problem, logits: torch.Tensor) -> torch.Tensor:
    """r: the top-k of the router's ranking, with an expert bias and within the best groups where the problem has them."""
    ranked = logits.sigmoid() if problem.score == "sigmoid" else logits
    if problem.groups is not None and problem.score == "softmax":
        ranked = logits.softmax(-1)  # --moe-router-pre-softmax: sums over a group rank otherwise than sums of logits
    if problem.bias:
        ranked = ranked + expert_bias(problem).double()
    if problem.groups is not None:
        number, chosen_groups = problem.groups
        by_group = ranked.unflatten(-1, (number, -1))
        group_scores = by_group.topk(problem.topk // chosen_groups, dim=-1).values.sum(-1)
        best = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(chosen_groups, dim=-1).indices, 1.0).bool()
        ranked = by_group.masked_fill(~best.unsqueeze(-1), float("-inf")).flatten(-2)
    return torch.zeros_like(logits).scatter(-1, ranked.topk(problem.topk, dim=-1).indices, 1.0)


def _layer_loss(problem, step, block, C_mdi, S_mdi, N_md, of_step, counted) -> torch.Tensor:
    """The loss of one application of one layer; `of_step` holds the sums over all its applications."""
    E, M, D = problem.experts, N_md.shape[0], problem.dp
    N_step = N_md.sum()
    size = problem.group_size or D
    groups = [range(g, g + size) for g in range(0, D, size)]
    seen = problem.seen(step, block + 1)
    backwards = M / problem.together
    loss = torch.zeros((), dtype=torch.float64)

    def lbl(alpha, C_i, S_i, tokens):
        f = C_i / C_i.sum().clamp(min=1)
        return alpha * E * (f * S_i).sum() / tokens.clamp(min=1)

    if step < problem.start_iter or problem.scope == "micro":
        of_each = [lbl(problem.coeff_at(step, m), C_mdi[m, d], S_mdi[m, d], N_md[m, d]) for m in range(M) for d in range(D)]
        return sum(of_each) / (backwards * D)
    for m in range(M):
        coeff = problem.coeff_at(step, m)
        for group in groups:
            S_i = S_mdi[m, group].sum(0)
            tokens = N_md[m, group].sum()
            if problem.scope == "dp":
                C_i = C_mdi[m, group].sum(0)
            else:
                C_i = of_step["C"][sorted(seen[m])][:, group].sum((0, 1))
            if problem.per_token:
                loss = loss + lbl(coeff, C_i, S_i, N_step)
            else:
                loss = loss + lbl(coeff, C_i, S_i, tokens) / (backwards * len(groups))
    for m in range(M):
        for d in range(D):
            tokens = N_step if problem.per_token else N_md[m, d]
            share = 1 if problem.per_token else backwards * D
            loss = loss + lbl(problem.micro_coeff, C_mdi[m, d], S_mdi[m, d], tokens) / share
    return loss
