"""`benchmarks/gpu.py`: a stage that crashes or hangs ends alone and keeps what it has; the report shows what is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu

STAGE = """
import os, sys, time
path = sys.argv[sys.argv.index("--json") + 1]
open(path, "w").write('{"checks": [{"name": "first", "passed": true, "detail": ""}], "data": {}}')
print("said before the end", flush=True)
{last}
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A tree whose stages hang, crash and end well; every stage may take a second."""
    folder = tmp_path / "benchmarks" / "on_gpu"
    folder.mkdir(parents=True)
    for name, last in {"tests": "time.sleep(600)", "gloo": "os.abort()", "nccl": ""}.items():
        (folder / f"stage_{name}.py").write_text(STAGE.replace("{last}", last))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 0)
    monkeypatch.setattr(gpu, "CPU_FACTOR", 1)
    monkeypatch.setattr(gpu, "LIMITS", {"tests": (1, 1), "gloo": (20, 20), "nccl": (20, 20)})
    return tmp_path


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return gpu.main()


def test_a_stage_that_does_not_end_well_ends_alone(stages, monkeypatch, capsys):
    assert run(monkeypatch, "--cpu", "--out", stages / "out") == 1
    results = json.loads((stages / "out" / "results.json").read_text())["stages"]
    assert {name: stage["ended"] for name, stage in results.items()} == {
        "tests": "time limit",
        "gloo": "with exit code -6",
        "nccl": "well",
    }
    assert all(stage["checks"][0]["name"] == "first" for stage in results.values())
    assert results["gloo"]["log"] == ["said before the end"]
    capsys.readouterr()
    assert run(monkeypatch, "--report", stages / "out" / "results.json") == 0
    report = capsys.readouterr().out
    assert report == (stages / "out" / "report.md").read_text() and "Ended: time limit." in report


def test_only_what_was_asked_for_and_no_failure(stages, monkeypatch):
    assert run(monkeypatch, "--cpu", "--out", stages / "out", "--stages", "nccl") == 0
    assert run(monkeypatch, "--cpu", "--out", stages / "out", "--stages", "nccl", "--budget", "0.001") == 1, "was not begun"


@pytest.mark.parametrize("arguments", [["--stages", "kernel", "--out", "x"], ["--budget", "0", "--out", "x"], []])
def test_bad_input(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert "allowed" in capsys.readouterr().err or not arguments


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_no_gpu_is_said_once(stages, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", stages / "out")
    assert "no CUDA device" in capsys.readouterr().err
    assert not (stages / "out").exists()
