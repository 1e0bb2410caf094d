"""`make demo`, cut short: two real trainings, what their experts specialise in, the table, the picture and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCOPES = ["micro", "global"]
STEPS = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "examples" / "demo" / "run.py"), "--out", str(out)]
    command += ["--steps", str(STEPS), "--valid-sequences", "4", "--processes", "2"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert result.returncode == 0, result.stdout
    return result.stdout, out


def test_prints_progress_and_the_table(demo):
    printed, out = demo
    for expected in (*SCOPES, f"step {STEPS}/{STEPS}", "MaxVio", "specialisation", "contrast"):
        assert expected in printed
    assert str(out / "report" / "report.html") in printed and str(out / "experts.png") in printed


def test_results_are_complete_and_plausible(demo):
    _, out = demo
    runs = json.loads((out / "results.json").read_text())
    assert [run["scope"] for run in runs] == SCOPES
    for run in runs:
        assert [step for step, _ in run["train_loss"]] == list(range(1, STEPS + 1))
        assert all(1 / 8 <= share <= 1 / 2 for share in run["specialisation"].values())
        assert run["lbl_global"] > 0.9 and run["lbl_micro"] > 0.9 and run["max_vio"] > 0
    assert all(domain in (out / "table.md").read_text() for domain in runs[0]["specialisation"])


def test_the_scopes_start_equal_and_then_differ(demo):
    """Same model, data and seed: the first step's loss is the same number, the load balance after it is not."""
    runs = json.loads((demo[1] / "results.json").read_text())
    assert len({run["train_loss"][0][1] for run in runs}) == 1
    assert len({run["lbl_global"] for run in runs}) == len(runs)


def test_pictures_and_report(demo):
    from matplotlib.image import imread

    picture = imread(demo[1] / "experts.png")
    height, width = picture.shape[:2]
    assert height > 300 and width > 900
    assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).round(2)}) > 20
    page = (demo[1] / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("The checkpoint of iteration 3, evaluated on python (1,024 tokens)") == len(SCOPES)


def test_pipeline_stages_measure_the_same(demo, tmp_path):
    """The same training, saved in the format that can be loaded in another layout than its own, expert parallelism: with two
    pipeline stages each has one layer, and one has the loss."""
    sys.path.insert(0, str(ROOT / "examples"))
    from megatron_global_lbl.specialise.result import read

    from demo.launch import RunFiles, specialise, train
    from demo.megatron_args import Size
    from demo.prepare import dataset_paths

    size = Size(steps=STEPS, valid_sequences=4, processes=2)
    data = demo[1] / "data"
    paths, files = dataset_paths(data), RunFiles(tmp_path)
    any_layout = ["--ckpt-format", "torch_dist"]
    train("global", size, paths, files, data=data, more=any_layout)
    elsewhere = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "1"]
    elsewhere += ["--eval-global-batch-size", "1", "--eval-iters", "4"]
    specialise(size, paths, files, data=data, more=[*any_layout, *elsewhere])
    one, two = read(demo[1] / "global"), read(tmp_path)
    assert two.tokens_per_expert == one.tokens_per_expert and two.layers == one.layers == ["0", "1"]
    assert [domain.loss for domain in two.domains] == [pytest.approx(domain.loss, rel=1e-5) for domain in one.domains]
    for here, there in zip(one.experts, two.experts):
        assert there.weights["pair"] == here.weights["pair"]
        assert there.weights["mean"] == pytest.approx(here.weights["mean"], abs=1e-6)


def test_a_failed_launch_shows_its_log(tmp_path):
    sys.path.insert(0, str(ROOT / "examples"))
    from demo.launch import RunFailedError, launch

    with pytest.raises(RunFailedError, match=r"No module named no_such_module(.|\n)*ended with exit code 1.*train.log"):
        launch("no_such_module", [], tmp_path / "train.log", 1, lambda _: None)
