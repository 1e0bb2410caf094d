"""`make demo`, cut short: two real trainings, what their experts specialise in, the table, the picture and the report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo.launch import Launch, RunFailedError, Training
from demo.megatron_args import Run, Size
from demo.prepare import dataset_paths

ROOT = Path(__file__).parents[2]
RUNS = ["micro-0.1", "global-0.1"]
STEPS = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--out", str(out), "--coefficients", "0.1"]
    command += ["--steps", str(STEPS), "--valid-sequences", "16"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert result.returncode == 0, result.stdout
    return result.stdout, out


def test_prints_progress_and_the_table(demo):
    printed, out = demo
    for expected in (*RUNS, "starts", "done", "held-out loss", "contrast of domains", "favourite expert", "MaxVio"):
        assert expected in printed
    assert str(out / "report" / "report.html") in printed and str(out / "experts.png") in printed
    assert "Warning" not in printed


def test_results_are_complete_and_plausible(demo):
    _, out = demo
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [f"{run['scope']}-{run['coefficient']}" for run in runs] == RUNS
    for run in runs:
        assert [step for step, _ in run["train_loss"]] == list(range(1, STEPS + 1))
        assert 1 / 16 <= run["favourite"] <= 1 / 2 and 0 < run["contrast"] < 1 and run["max_vio"] > 0
        assert 3 < run["loss"] < 6  # log(257) is 5.5
    table = (out / "table.md").read_text()
    assert table.startswith("| scope, coefficient | micro, 0.1 | global, 0.1 |\n") and f"| {runs[0]['loss']:.3f} |" in table


def test_the_scopes_start_equal_and_then_differ(demo):
    """Same model, data and seed: the first step's loss is the same number, the last one's is not."""
    micro, whole = json.loads((demo[1] / "results.json").read_text())["runs"]
    assert micro["train_loss"][0] == whole["train_loss"][0] and micro["train_loss"][-1] != whole["train_loss"][-1]


def test_pictures_and_report(demo):
    from matplotlib.image import imread

    picture = imread(demo[1] / "experts.png")
    height, width = picture.shape[:2]
    assert height > 400 and width > 1400
    assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).round(2)}) > 20
    page = (demo[1] / "report" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in RUNS)


def test_no_alarm_but_that_of_micro(demo):
    """What the training itself warns of: that `micro` counts over one sequence, and nothing else."""
    alarms = {name: [a for a in (demo[1] / name / "train.log").read_text().splitlines() if "!!" in a] for name in RUNS}
    assert alarms["global-0.1"] == []
    assert all("Balance BSZ 1 (scope micro)" in alarm for alarm in alarms["micro-0.1"])


def test_pipeline_stages_measure_the_same(demo, tmp_path):
    """A checkpoint in the format that can be loaded in another layout: two pipeline stages, a layer each."""
    from megatron_global_lbl.specialise.result import read

    any_layout = ["--ckpt-format", "torch_dist"]
    training = Training(Run("global", 0.1), Size(STEPS, 16), dataset_paths(demo[1] / "data"), tmp_path / "run", any_layout)
    training.wait()
    one = read(training.folder)
    training.evaluate(["--pipeline-model-parallel-size", "2"], ranks=2)
    (training.folder / "specialisation.json").unlink()
    training.wait()
    two = read(training.folder)
    assert two.tokens_per_expert == one.tokens_per_expert and two.layers == one.layers == ["0", "1"]
    assert [domain.loss for domain in two.domains] == [pytest.approx(domain.loss, rel=1e-5) for domain in one.domains]
    for here, there in zip(one.experts, two.experts):
        assert there.weights["pair"] == here.weights["pair"]
        assert there.weights["mean"] == pytest.approx(here.weights["mean"], abs=1e-6)


def test_a_failed_rank_ends_the_others_and_shows_the_log(tmp_path, monkeypatch):
    """Rank 1 fails while rank 0 would wait for it for minutes."""
    (tmp_path / "fails.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1': raise SystemExit('no luck')\ntime.sleep(300)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch = Launch("fails", [], tmp_path / "train.log", 2)
    began = time.monotonic()
    with pytest.raises(RunFailedError, match=r"no luck(.|\n)*ended with exit code 1.*train.log"):
        while not launch.ended():
            time.sleep(0.1)
    assert time.monotonic() - began < 60
    assert all(process.poll() is not None for process in launch._processes)
