"""Layers that run in some micro-batches, on some ranks only, or in another order on each: text and pictures, for example."""

from __future__ import annotations

import pytest
import several
import torch
import truth
from compare import compare_exact
from layout import Layout
from several import Spec
from truth import Problem

# By micro-batch and rank: the layers that run, in their order.
ORDERS = {
    "another order on each rank": [[(0, 1), (1, 0)], [(1, 0), (0, 1)], [(0, 1), (1, 0)]],
    "each micro-batch its own layer": [[(0,), (1,)], [(1,), (0,)], [(0, 1), (1,)]],
    "a rank without a layer": [[(0, 1), (0,)], [(1, 0), (0,)], [(0, 1), (0,)]],
    "a rank without any": [[(0, 1), ()], [(1,), ()], [(0, 1), (1, 0)]],
    "a layer that nobody runs": [[(0,), (0,)], [(0,), (0,)], [(), (0,)]],
}
PROBLEM = Problem("global", 2, 3, 2, masks="uneven")


def in_orders(a, orders, handle=None):
    import torch.distributed as dist

    of_rank = [of_batch[dist.get_rank()] for of_batch in orders]
    for _ in range(a.problem.steps):
        a.begin()
        for m, layers in enumerate(of_rank):

            def forward(h, padding, layers=layers):
                h = h.detach().requires_grad_()
                for layer in layers:
                    h = a.toy.blocks[layer](h, padding)
                return h

            a.toy.forward = forward
            a.micro_batch(m)
        a.end()
    return handle.metrics() if handle is not None and handle.settings.observes else None


def expected(problem: Problem, orders, step: int) -> list[tuple[torch.Tensor, ...]]:
    """[layer] (W, router) gradient of the contract's formula in float64."""
    params = [tuple(w.double().requires_grad_() for w in pair) for pair in truth.weights(problem, step)]
    x, padding = truth.inputs(problem, step)
    M, E = problem.micro_batches, problem.experts
    C_MLE = torch.zeros(M, problem.layers, E, dtype=torch.float64)
    S_MLE = [[torch.zeros(E, dtype=torch.float64) for _ in params] for _ in range(M)]
    N_ML = torch.zeros(M, problem.layers, dtype=torch.float64)
    for m, of_batch in enumerate(orders):
        for d, layers in enumerate(of_batch):
            h, valid = x[m, d].double(), (~padding[m, d]).double().unsqueeze(-1)
            for layer in layers:
                a = h @ params[layer][0].T
                logits = a @ params[layer][1].T
                C_MLE[m, layer] += (truth._select(problem, logits.detach()) * valid).sum((0, 1))
                S_MLE[m][layer] = S_MLE[m][layer] + (logits.softmax(-1) * valid).sum((0, 1))
                N_ML[m, layer] += valid.sum()
                h = torch.tanh(a)
    loss = torch.zeros((), dtype=torch.float64)
    for m in range(M):
        for layer in range(problem.layers):
            C_E = C_MLE[m, layer] if problem.scope == "dp" else C_MLE[: m + 1, layer].sum(0)
            f_E = C_E / C_E.sum().clamp(min=1)
            loss = loss + problem.coeff * E * (f_E * S_MLE[m][layer]).sum() / N_ML[m, layer].clamp(min=1) / M
    flat = [w for pair in params for w in pair]
    grads = torch.autograd.grad(loss, flat, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, flat)]
    return [(grads[2 * i], grads[2 * i + 1]) for i in range(problem.layers)]


def run(workers, scope: str, orders, register: dict) -> list[dict]:
    spec = Spec(Problem(**{**vars(PROBLEM), "scope": scope}))
    ranks = workers.run(several.run, 2, in_orders, (spec,), Layout(), register, True, (orders,))
    assert [rank["refused"] for rank in ranks] == [None, None]
    return ranks


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("scope", ["dp", "global"])
def test_the_gradient_is_the_formula(workers, scope, name):
    problem = Problem(**{**vars(PROBLEM), "scope": scope})
    for rank in run(workers, scope, ORDERS[name], {"scope": scope, "metrics": "brief"}):
        for step, by_layer in enumerate(rank["grads"][0]):
            true = expected(problem, ORDERS[name], step)
            for number, pair in by_layer.items():
                for actual, of_formula in zip(pair, true[number - 1], strict=True):
                    compare_exact(actual, of_formula, f"{name}, step {step}, layer {number}")


@pytest.mark.parametrize("name", ORDERS)
def test_metrics_beside_megatrons_own_loss(workers, name):
    """Scope `micro` is bit-identical, and the metrics are the same on every rank."""
    plain = run(workers, "micro", ORDERS[name], {})
    observed = run(workers, "micro", ORDERS[name], {"scope": "micro", "metrics": "brief"})
    for one, other in zip(plain, observed):
        for of_step, of_other in zip(one["grads"][0], other["grads"][0], strict=True):
            assert all(a.equal(b) for number, pair in of_step.items() for a, b in zip(pair, of_other[number], strict=True))
    assert observed[0]["value"] == observed[1]["value"] and observed[0]["value"]["moe_lbl/lbl_global"] > 0
