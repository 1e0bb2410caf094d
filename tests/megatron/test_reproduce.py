"""`examples/reproduce`, real trainings of a few steps, measured at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from megatron.core.transformer.moe import moe_utils

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from reproduce import data, trainings
from reproduce.experiments import changed
from reproduce.settings import Run, Setting

from demo.prepare import write_indexed_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains of text."""
    folder = tmp_path_factory.mktemp("data")
    domains = []
    for name, alphabet in (("digits", b"0123456789"), ("letters", b"abcdefgh")):
        text = alphabet * 800
        write_indexed_dataset(str(folder / f"{name}_train"), [text] * 4)
        write_indexed_dataset(str(folder / f"{name}_valid"), [text], most=4 * 128 + 1)
        domains.append({"name": name, "stem": name})
    index = {"sequence_length": data.SEQUENCE_LENGTH, "digest": "d", "domains": domains}
    (folder / data.INDEX).write_text(json.dumps(index))
    return folder


def trained(setting: Setting, folder: Path, out: Path) -> dict:
    """The result of a run."""
    run = Run(setting, 0)
    code = trainings.train_all([run], size="cpu", data=folder, out=out, jobs=1, limit=None)
    assert code == 0, (out / "logs" / f"{run.name}.log").read_text()[-3000:]
    return json.loads(trainings.result_path(out, run).read_text())


def test_a_run_leaves_its_result_and_is_not_trained_again(folder, tmp_path, capsys):
    setting = Setting(scope="global", over="sequences:1", batch=4, micro_batch=4, steps=3, start_iter=2)
    found = trained(setting, folder, tmp_path)
    assert Setting.stored(found["setting"]) == setting and found["steps"] == 3 and found["versions"]["megatron-core"]
    assert set(found["valid_loss"]) == {"digits", "letters"} and all(1 < loss < 6 for loss in found["valid_loss"].values())
    for domain in found["frequencies"]:
        assert len(domain) == 2 and all(len(layer) == 64 and abs(sum(layer) - 1) < 0.01 for layer in domain)
    assert len(found["max_vio_first"]) == 3 and 0 < found["contrast"] < 1 < found["max_vio_within_sequences"] < 32
    trainings.train_all([Run(setting, 0)], size="cpu", data=folder, out=tmp_path, jobs=1, limit=None)
    assert "1 runs, 1 of them done before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("bias", Setting(alpha=0.0, score="sigmoid", bias_rate=0.01, batch=4, micro_batch=4, steps=3)),
        ("quantile", Setting(alpha=0.0, loss="quantile_balancing", quantile_ema=0.5, batch=4, micro_batch=4, steps=3)),
    ],
)
def test_a_group_that_is_the_step_is_megatrons_own_method(kind, own, folder, tmp_path):
    """And a smaller group is not, so the stand-in is at work."""
    if kind == "quantile" and not hasattr(moe_utils, "qb_dual_update"):
        pytest.skip("Megatron-Core before 0.19.2 has no quantile balancing")
    expected, whole, single = (trained(changed(own, over=over), folder, tmp_path) for over in (None, f"{kind}:4", f"{kind}:1"))
    assert whole["valid_loss"] == expected["valid_loss"] and whole["max_vio_first"] == expected["max_vio_first"]
    assert single["max_vio_first"] != expected["max_vio_first"]


def test_the_hinge_trains(folder, tmp_path):
    setting = Setting(over="hinge:10", alpha=0.1, batch=4, micro_batch=4, steps=3)
    found = trained(setting, folder, tmp_path)
    plain = trained(changed(setting, over=None, scope="global"), folder, tmp_path)
    assert found["train_loss"] != plain["train_loss"] or found["valid_loss"] != plain["valid_loss"]
