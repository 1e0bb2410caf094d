"""The report shows what benchmarks/scaling_model.py computes, and the model holds at its corners."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_model as model  # noqa: E402


def test_the_newest_report_shows_the_models_output():
    newest = max((ROOT / "benchmarks").glob("*-scaling-model.md"))
    assert model.table() in newest.read_text("utf-8"), (
        f"run python benchmarks/scaling_model.py and put its output into {newest}"
    )


def test_one_all_reduce_per_micro_batch_is_hidden():
    """What the report and docs/internals.md say: nothing is added, in any row."""
    rows = list(model.compared())
    assert rows
    assert all(model.added(*row, slowdown).ours == 0.0 for row in rows for slowdown in (1.0, model.SLOW_CLUSTER))


def test_it_is_exposed_with_few_enough_tokens():
    training = dataclasses.replace(model.TRAININGS[0], tokens=8)
    cost = model.added(training, 64, 1.0)
    assert cost.ours == pytest.approx(training.micro_batches * (cost.latency - training.hides)) and cost.ours > 0


def test_latency_is_what_nccl_logged():
    """NVIDIA/nccl#1453: 16 H100 on two nodes."""
    assert model.all_reduce(16, 8) == pytest.approx(25.200924, rel=1e-3)
    assert model.all_reduce(16, 4096) == pytest.approx(25.874907, rel=1e-3)
    assert model.all_reduce(1, 4096) == 0.0
