"""docs/scaling.md shows what benchmarks/scaling_model.py computes, and the model holds at its corners."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_model as model  # noqa: E402


def test_the_document_shows_the_models_output():
    document = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert model.table() in document, "run python benchmarks/scaling_model.py and put its output into docs/scaling.md"


def test_window_hides_behind_a_stages_forward():
    """What the document says of it: nothing is added, in any row."""
    rows = list(model.compared())
    assert rows
    assert all(model.added(*row, slowdown).window == 0.0 for row in rows for slowdown in (1.0, model.SLOW_CLUSTER))


def test_latency_is_what_nccl_logged():
    """NVIDIA/nccl#1453: 16 H100 on two nodes."""
    assert model.all_reduce(16, 8) == pytest.approx(25.200924, rel=1e-3)
    assert model.all_reduce(16, 4096) == pytest.approx(25.874907, rel=1e-3)
    assert model.all_reduce(1, 4096) == 0.0


def test_waiting_in_the_backward():
    # One layer of 100: the experts' forward and backward, 50 + 100, hide a latency of 150 and no more.
    assert model.overlapped_wait(1, 100.0, 150.0) == 0.0
    assert model.overlapped_wait(1, 100.0, 160.0) == pytest.approx(10.0)
    # No compute to hide behind: all of it shows, once per layer.
    assert model.overlapped_wait(4, 0.0, 10.0) == pytest.approx(40.0)
    hides = model.layer_time_that_hides(48, 25.0)
    assert model.overlapped_wait(48, hides, 25.0) == 0.0 < model.overlapped_wait(48, hides - 1.0, 25.0)
