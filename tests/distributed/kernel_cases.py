"""The kernels of core/fused against the formula in float64, with nothing of Megatron: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of the norm. What the type of the logits cannot hold is rounded away; the sums are float32.
GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SUM_ERROR = 1e-6
SCALE = 0.25


class Case(NamedTuple):
    tokens: int
    experts: int
    topk: int
    score_function: str
    dtype: torch.dtype
    padded: bool


def scores(logits: Tensor, score_function: str) -> Tensor:
    """[T, E] float64."""
    x = logits.double()
    if score_function == "softmax":
        return x.softmax(-1)
    a = x.sigmoid() if score_function == "sigmoid" else torch.nn.functional.softplus(x, threshold=1e9).sqrt()
    return a / (a.sum(-1, keepdim=True) + 1e-20)


def check_kernels(case: Case, device: str) -> None:
    """Exact counts, summed scores and the logits' gradient.

    Raises:
        AssertionError: one of them is not the formula's.
    """
    from megatron_global_lbl.core.fused import forward

    generator = torch.Generator().manual_seed(1 + case.tokens + case.experts)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    logits = (4 * random(case.tokens, case.experts)).to(case.dtype)
    logits[: case.tokens // 8] *= 6  # saturated
    selection = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(case.topk).indices, True)
    padding = (random(case.tokens) > 0.5) if case.padded else None
    valid = torch.ones(case.tokens, 1, device=device) if padding is None else (~padding).float().unsqueeze(1)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    counts_E = torch.full((case.experts,), -1, dtype=torch.int32, device=device)
    sums_E = torch.full((case.experts,), -1.0, device=device)
    forward.count_into(counts_E, sums_E, logits, selection, padding, score_function=case.score_function, ticket=ticket)
    assert counts_E.equal((selection * valid).sum(0).int()), f"{case}: counts"
    assert ticket.item() == 0
    exact = logits.double().requires_grad_()
    exact_scores = scores(exact, case.score_function) * valid
    _require_close(sums_E, exact_scores.sum(0), 10 * SUM_ERROR, f"{case}: sums")
    gradient_E, incoming = random(case.experts).abs(), (0.1 * random(case.tokens, case.experts)).to(case.dtype)
    (exact_scores * gradient_E.double() * SCALE).sum().backward()
    assert exact.grad is not None
    for what, comes_in in {"gradient": incoming, "gradient of the loss": torch.zeros_like(incoming)}.items():
        out = forward.add_to_gradient(logits, padding, gradient_E, SCALE, comes_in, score_function=case.score_function)
        assert out.dtype is case.dtype
        _require_close(out, comes_in.double() + exact.grad, GRADIENT_ERROR[case.dtype], f"{case}: {what}")


def check_rows(experts: int, device: str) -> None:
    """The gradient rows of all layers, against `score_gradient` in float64.

    Raises:
        AssertionError: they differ.
    """
    from megatron_global_lbl.core.fused import forward
    from megatron_global_lbl.core.loss import score_gradient

    generator = torch.Generator().manual_seed(experts)
    counts_RE = torch.randint(0, 50, (3, experts), generator=generator)
    counts_RE[1] = 0  # a layer that did not run
    own_RE = torch.randint(0, 9, (3, experts), generator=generator).int()
    own_RE[1] = 0
    factors = torch.tensor([[0.5], [1.0], [2.0]])
    for counts in (counts_RE, counts_RE.int()):
        for own in (None, own_RE):
            for factor in (0.25, factors):
                tokens = 1.0 if own is None else own.sum(1, keepdim=True)
                exact = score_gradient(tokens_per_expert=counts, num_tokens=tokens, dtype=torch.float64) * factor
                there = [x.to(device) if isinstance(x, Tensor) else x for x in (counts, own, factor)]
                _require_close(forward.gradient_rows(*there).cpu(), exact, 1e-6, f"{experts} experts")


def _require_close(actual: Tensor, true: Tensor, error: float, what: str) -> None:
    difference, norm = float((actual.double() - true).norm()), float(true.norm())
    assert difference <= error * norm + 1e-12, f"{what}: {difference / max(norm, 1e-300):.1e}"
