"""The measures of layers that differ, and one number for a model."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_global_lbl.metrics.measures import OF_TOKENS, load, measures, over_layers, summary

EXPERTS, TOPK = np.array([4, 8, 6]), np.array([1, 2, 3])


def padded():
    """Counts and score sums of three layers, zeros (and for scores anything) beyond a layer's own experts."""
    random = np.random.default_rng(0)
    counts_LE = random.integers(0, 5, (3, 8)).astype(float)
    counts_LE[1, 2] = 0
    scores_LE = random.random((3, 8)) * 10
    for layer, experts in enumerate(EXPERTS):
        counts_LE[layer, experts:], scores_LE[layer, experts:] = 0, np.nan
    return counts_LE, scores_LE


def rest(layers):
    return {
        "extras_LX": np.arange(1.0, 1 + 3 * layers).reshape(layers, 3),
        "lbl_sums_L": np.arange(2.0, 2 + layers),
        "micro_batches_L": np.full(layers, 2.0),
    }


def test_layers_of_other_sizes_are_measured_as_if_alone():
    counts_LE, scores_LE = padded()
    together = measures(counts_LE=counts_LE, score_sums_LE=scores_LE, topk=TOPK, experts=EXPERTS, **rest(3))
    loads_LE = load(counts_LE, EXPERTS)
    for layer, (experts, topk) in enumerate(zip(EXPERTS, TOPK)):
        own = slice(layer, layer + 1), slice(experts)
        others = {name: value[layer : layer + 1] for name, value in rest(3).items()}
        alone = measures(counts_LE=counts_LE[own], score_sums_LE=scores_LE[own], topk=int(topk), **others)
        for name, value in alone.items():
            assert together[name][layer] == pytest.approx(value[0], rel=1e-12), name
        np.testing.assert_allclose(loads_LE[layer, :experts], load(counts_LE[own])[0])
        assert np.isnan(loads_LE[layer, experts:]).all()


def test_a_layer_that_did_not_run_is_not_known():
    counts_LE, scores_LE = padded()
    counts_LE[1] = scores_LE[1] = 0
    found = measures(counts_LE=counts_LE, score_sums_LE=scores_LE, topk=TOPK, experts=EXPERTS, **rest(3))
    known = {name: np.isfinite(value).tolist() for name, value in found.items() if name not in ("lbl_micro", *OF_TOKENS)}
    assert all(value == [True, False, True] for value in known.values()), known
    assert np.isnan(load(counts_LE, EXPERTS)[1]).all()


def test_dead_experts_of_a_model_are_a_sum():
    """2 dead experts in 60 layers are 2; every other measure is a mean over the layers that are known."""
    dead_L, vio_L = np.zeros(60), np.ones(60)
    dead_L[[3, 7]], vio_L[5], dead_L[9] = 1, np.nan, np.nan
    assert over_layers("dead", dead_L) == 2 and over_layers("max_vio", vio_L) == 1
    assert np.isnan(over_layers("dead", np.full(3, np.nan)))
    found = summary({"dead": dead_L, "max_vio": vio_L}, detailed=False)
    assert (found["dead"], found["dead_worst"], found["max_vio"]) == (2, 1, 1)


def test_the_busiest_expert_parallel_rank():
    """Against a loop over ranks that hold experts in order."""
    counts_LE = np.array([[8.0, 0, 1, 3], [1, 1, 1, 1]])
    found = measures(counts_LE=counts_LE, score_sums_LE=counts_LE, topk=1, expert_parallel=2, **rest(2))
    for layer, counts_E in enumerate(counts_LE):
        ranks = [counts_E[:2].sum(), counts_E[2:].sum()]
        assert found["overload"][layer] == pytest.approx(max(ranks) / np.mean(ranks))
    assert found["effective"][1] == pytest.approx(4)
