"""`make demo`, cut short: three real trainings, the table and the pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--out", str(out)]
    command += ["--steps", str(STEPS), "--valid-sequences", "4"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert result.returncode == 0, result.stdout
    return result.stdout, out


def test_prints_progress_and_the_table(demo):
    printed, out = demo
    for expected in ("micro", "global", "window", f"step {STEPS}/{STEPS}", "MaxVio", "specialisation", "overall"):
        assert expected in printed
    assert str(out / "loss.png") in printed and str(out / "experts.png") in printed


def test_results_are_complete_and_plausible(demo):
    _, out = demo
    runs = json.loads((out / "results.json").read_text())
    assert [run["scope"] for run in runs] == ["micro", "global", "window"]
    for run in runs:
        assert [step for step, _ in run["train_loss"]] == list(range(1, STEPS + 1))
        final = run["valid_loss"][str(STEPS)]
        assert len(final) >= 5 and all(3 < loss < 6 for loss in final.values())
        for layers in run["frequencies"].values():
            assert all(abs(sum(layer) - 1) < 1e-9 for layer in layers)
        assert run["lbl_global"] > 0.9 and run["lbl_micro"] > 0.9 and run["max_vio"] > 0
    table = (out / "table.md").read_text()
    assert all(domain in table for domain in runs[0]["frequencies"])


def test_the_scopes_start_equal_and_then_differ(demo):
    """Same model, data and seed: the first step's loss is the same number, the load balance after it is not."""
    runs = json.loads((demo[1] / "results.json").read_text())
    assert len({run["train_loss"][0][1] for run in runs}) == 1
    assert len({run["lbl_global"] for run in runs}) == len(runs)


def test_the_pictures_show_something(demo):
    from matplotlib.image import imread

    for name in ("loss.png", "experts.png"):
        picture = imread(demo[1] / name)
        height, width = picture.shape[:2]
        assert height > 300 and width > 900
        assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).round(2)}) > 20, name


def test_a_failed_training_shows_its_log_and_fails(tmp_path):
    """A batch that the processes cannot share equally: Megatron refuses, and the demo says where the log is."""
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--out", str(tmp_path)]
    command += ["--steps", "1", "--valid-sequences", "4", "--global-batch", "6"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert result.returncode == 1
    assert "ended with exit code" in result.stdout and str(tmp_path / "micro" / "train.log") in result.stdout
