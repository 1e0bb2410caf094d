"""What the experts of a real MoE layer specialise in, measured over expert and expert-tensor parallelism, against formulas in
float64 on one process, which know of neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layout import Layout
from specialised import DOMAINS, measure
from truth import Problem

TOKENS = 12  # per rank and domain


def _cosine(x, y):
    return float(x.flatten() @ y.flatten() / (x.norm() * y.norm()))


def _spearman(x, y):
    return float(np.corrcoef([np.argsort(np.argsort(v)) for v in (x.numpy(), y.numpy())])[0, 1])


def _pairs(matrix):
    rows, columns = np.triu_indices(len(matrix), k=1)
    return np.asarray(matrix)[rows, columns]


@pytest.mark.parametrize("layout", [Layout(tp=2, ep=2, etp=2, moe="layer"), Layout(ep=4, moe="layer")], ids=str)
def test_measurement_is_the_formulas(workers, layout):
    problem = Problem("global", 4 // layout.tp, 1)
    ranks = workers.run(measure, 4, problem, layout, TOKENS)
    result = ranks[0][0]
    assert all(rank[0] is None for rank in ranks[1:])
    assert result.layers == ["2"] and result.names == list(DOMAINS) and result.iteration == 5
    assert [domain.loss for domain in result.domains] == [{"lm loss": 0.0}, {"lm loss": 1.0}]

    experts, topk, local = problem.experts, problem.topk, problem.experts // layout.ep
    gate = ranks[0][3].double()
    parts = {place: weights for *_, place, weights in ranks}
    fc1, fc2 = [], []
    for e in range(experts):
        shards = [parts[e // local, t][e % local] for t in range(layout.etp or 1)]
        fc1.append(torch.cat([shard[0] for shard in shards]).double())
        fc2.append(torch.cat([shard[1] for shard in shards], dim=1).double())

    cosines, correlations, norms_by_rank = [], [], []
    for d in range(len(DOMAINS)):
        hidden_of_rank = [rank[1][d][~rank[2][d]].double() for rank in ranks]
        hidden = torch.cat(hidden_of_rank)
        scores = torch.softmax(hidden @ gate.T, dim=1)
        chosen = scores.topk(topk).indices
        assert result.tokens_per_expert[d][0] == torch.bincount(chosen.flatten(), minlength=experts).tolist()
        assert result.domains[d].tokens == len(hidden)
        assert result.score_sums[d][0] == pytest.approx(scores.topk(topk).values.sum(1).mean().item(), rel=1e-6)
        # As many as asked for, at even distances: where padding leaves fewer, some come twice.
        sampled = torch.cat([valid[torch.linspace(0, len(valid) - 1, TOKENS).round().long()] for valid in hidden_of_rank])
        outputs = torch.stack([torch.nn.functional.gelu(sampled @ a.T) @ b.T for a, b in zip(fc1, fc2)], dim=1)
        for of_token, score in zip(outputs, torch.softmax(sampled @ gate.T, dim=1)):
            cosines.append([[_cosine(x, y) for y in of_token] for x in of_token])
            norms = of_token.norm(dim=1)
            correlations.append(_spearman(norms, score))
            norms_by_rank.append((norms / norms.mean())[score.argsort(descending=True)].numpy())

    measured = result.experts[0]
    assert not measured.not_measured
    assert measured.gates["mean"] == pytest.approx(_pairs([[_cosine(x, y) for y in gate] for x in gate]).mean(), abs=1e-6)
    whole = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(fc1, fc2)]
    weights = _pairs([[_cosine(x, y) for y in whole] for x in whole])
    assert measured.weights["mean"] == pytest.approx(weights.mean(), abs=1e-6)
    assert measured.weights["max"] == pytest.approx(weights.max(), abs=1e-6)
    assert measured.sampled_tokens == len(cosines) == 2 * 4 * TOKENS
    assert measured.outputs["mean"] == pytest.approx(_pairs(np.mean(cosines, axis=0)).mean(), abs=1e-6)
    assert measured.outputs["p90"] == pytest.approx(np.quantile(_pairs(np.mean(cosines, axis=0)), 0.9), abs=1e-6)
    np.testing.assert_allclose(measured.norm_by_score_rank, np.mean(norms_by_rank, axis=0), atol=1e-6)
    assert measured.norm_score_correlation == pytest.approx(np.mean(correlations), abs=1e-6)
