"""The kernels of core/fused against the formula in float64, with nothing of Megatron: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of the norm. What the type of the logits cannot hold is rounded away; the sums are float32.
GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SUM_ERROR = 1e-6
FACTOR, SCALE = 2.5, 0.25


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
    from megatron_global_lbl.core.fused import launch
    from megatron_global_lbl.settings import Scope

    generator = torch.Generator().manual_seed(1 + case.tokens + case.experts)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    logits = (4 * random(case.tokens, case.experts)).to(case.dtype)
    logits[: case.tokens // 8] *= 6  # saturated
    selection = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(case.topk).indices, True)
    padding = (random(case.tokens) > 0.5) if case.padded else None
    valid = torch.ones(case.tokens, 1, device=device) if padding is None else (~padding).float().unsqueeze(1)
    step_C = torch.arange(case.experts + 1, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    before = random(case.experts)
    step_sums_E = before.clone()
    counts, sums_E = launch.count(
        logits,
        selection,
        padding,
        score_function=case.score_function,
        copies=2,
        ticket=ticket,
        step_C=step_C,
        scope=Scope.WINDOW,
        add_sums_to=step_sums_E if case.padded else None,
    )
    expected = (selection * valid).sum(0).long()
    assert counts[0].equal(expected.int()) and counts[1].equal(expected.int()), f"{case}: counts"
    assert (step_C - torch.arange(case.experts + 1, device=device)).tolist() == [*expected.tolist(), 1], f"{case}: step"
    assert ticket.item() == 0
    exact = logits.double().requires_grad_()
    exact_scores = scores(exact, case.score_function) * valid
    _require_close(sums_E - before.double() * case.padded, exact_scores.sum(0), 10 * SUM_ERROR, f"{case}: sums")
    gradient_E, incoming = random(case.experts).abs(), (0.1 * random(case.tokens, case.experts)).to(case.dtype)
    (exact_scores * gradient_E.double() * FACTOR * SCALE).sum().backward()
    assert exact.grad is not None
    scale = torch.tensor([SCALE], device=device) if case.padded else SCALE
    for what, comes_in in {"gradient": incoming, "gradient of the loss": torch.zeros_like(incoming)}.items():
        out = launch.add_to_gradient(logits, padding, gradient_E, FACTOR, scale, comes_in, score_function=case.score_function)
        assert out.dtype is case.dtype
        _require_close(out, comes_in.double() + exact.grad, GRADIENT_ERROR[case.dtype], f"{case}: {what}")


def _require_close(actual: Tensor, true: Tensor, error: float, what: str) -> None:
    difference, norm = float((actual.double() - true).norm()), float(true.norm())
    assert difference <= error * norm + 1e-12, f"{what}: {difference / max(norm, 1e-300):.1e}"
