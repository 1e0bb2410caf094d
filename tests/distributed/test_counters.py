"""Counts are integers and exact, and under pipeline parallelism they hold every micro-batch whose forward has run."""

from __future__ import annotations

import dataclasses

import harness
import numpy as np
import pytest
from compare import assembled_selections, check, run_ranks
from layout import Layout
from truth import Problem

from megatron_global_lbl.metrics import read


@pytest.mark.core
def test_exact_after_600_micro_batches_in_bf16(workers, tmp_path):
    """Upstream's float counters are cast to bf16 with the model and stop counting at 256 micro-batches (D1)."""
    problem = Problem("global", 2, 600, layers=1, seq=4, batch=1, dtype="bfloat16")
    ranks = run_ranks(workers, problem, Layout(), {"scope": "global", "metrics_dir": str(tmp_path)}, router_dtype="fp32")
    selections = assembled_selections(problem, ranks)[0]
    (run,) = read(tmp_path)
    assert run.layers == ["0"] and run.tokens.tolist() == [601 / 2 * problem.dp * problem.seq]  # the mean of 1 to 600
    for load, selection in zip(run.load([0])[0], selections, strict=True):
        counts = selection.flatten(0, 3).sum(0)
        np.testing.assert_allclose(load, counts / counts.float().mean(), rtol=1e-3)  # float16
        max_vio = counts.max() / counts.float().mean() - 1
        np.testing.assert_allclose(run.metrics["max_vio"][0, 0], max_vio, rtol=1e-6)


def test_gradient_after_300_micro_batches_in_bf16(workers):
    """Beyond the 256 at which a bf16 counter sticks."""
    problem = Problem("global", 2, 300, layers=1, seq=4, batch=1, hidden=64, dtype="bfloat16")
    check(workers, problem, router_dtype="fp32")


# By stage, chunk and micro-batch m: the micro-batches that f holds in the backward of m, from the schedules' description.
PIPELINES = {
    "1F1B, 2 stages": (
        Layout(pp=2),
        {
            (0, 0): [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (1, 0): [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}],
        },
    ),
    "1F1B, 4 stages": (
        Layout(pp=4),
        {
            (0, 0): [{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (1, 0): [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (2, 0): [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (3, 0): [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}],
        },
    ),
    "interleaved, 2 stages of 2 chunks": (
        Layout(pp=2, chunks=2),
        {
            (0, 0): [{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (0, 1): [{0, 1}, {0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (1, 0): [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}],
            (1, 1): [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}],
        },
    ),
}


def counted_tokens(problem, layout, register):
    """{layer key: [number of valid tokens in f, by micro-batch]} of this rank."""
    from megatron_global_lbl.core.chunk import MicroBatch

    tokens: dict[str, list[int]] = {}
    original = MicroBatch._work_out

    def _work_out(self):
        original(self)
        for layer, counts_E in zip(self.chunk.layers, self.chunk.counts_LE):
            tokens.setdefault(layer.info.key, []).append(int(counts_E.sum()) // problem.topk)

    MicroBatch._work_out = _work_out
    try:
        harness.run(problem, layout, register)
    finally:
        MicroBatch._work_out = original
    return tokens


@pytest.mark.core
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("name", PIPELINES)
def test_micro_batches_in_f_under_pipeline_parallelism(workers, name, recompute):
    """Micro-batch m has 2^m valid tokens, so the number of tokens in f tells which micro-batches it holds."""
    layout, expected = PIPELINES[name]
    layout = dataclasses.replace(layout, recompute=recompute)
    layers = layout.pp * layout.chunks
    problem = Problem("global", 1, 4, layers=layers, seq=8, batch=1, masks="powers", pipeline=(layout.pp, layout.chunks))
    ranks = workers.run(counted_tokens, layout.pp, problem, layout, {"scope": "global"})
    for number in range(1, layers + 1):
        stage, chunk = problem.stage_and_chunk(number)
        seen = [{m for m in range(4) if tokens >> m & 1} for tokens in ranks[stage][str(number - 1)]]
        assert seen[:4] == expected[stage, chunk], f"layer {number}"
