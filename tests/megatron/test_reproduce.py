"""`examples/reproduce`, one real training: a balance loss of the experiments, then the plugin's scope, measured at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from reproduce import data, trainings
from reproduce.settings import Run, Setting

from demo.prepare import write_indexed_dataset


def test_a_run_leaves_its_result_and_is_not_trained_again(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    domains = []
    for name, alphabet in (("digits", b"0123456789"), ("letters", b"abcdefgh")):
        text = alphabet * 800
        write_indexed_dataset(str(folder / f"{name}_train"), [text] * 4)
        write_indexed_dataset(str(folder / f"{name}_valid"), [text], most=4 * 128 + 1)
        domains.append({"name": name, "stem": name})
    index = {"sequence_length": data.SEQUENCE_LENGTH, "digest": "d", "domains": domains}
    (folder / data.INDEX).write_text(json.dumps(index))
    run = Run(Setting(scope="global", over="sequences:1", batch=4, micro_batch=4, steps=3, start_iter=2), 0)
    code = trainings.train_all([run], size="cpu", data=folder, out=tmp_path, jobs=1, limit=None)
    assert code == 0, (tmp_path / "logs" / f"{run.name}.log").read_text()[-3000:]
    found = json.loads(trainings.result_path(tmp_path, run).read_text())
    assert Setting(**found["setting"]) == run.setting and found["steps"] == 3 and found["versions"]["megatron-core"]
    assert set(found["valid_loss"]) == {"digits", "letters"} and all(1 < loss < 6 for loss in found["valid_loss"].values())
    for domain in found["frequencies"]:
        assert len(domain) == 2 and all(len(layer) == 64 and abs(sum(layer) - 1) < 0.01 for layer in domain)
    assert len(found["max_vio_first"]) == 3 and 0 < found["contrast"] < 1
    trainings.train_all([run], size="cpu", data=folder, out=tmp_path, jobs=1, limit=None)
    assert "1 runs, 1 of them done before" in capsys.readouterr().out
