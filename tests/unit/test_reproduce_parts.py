"""`examples/reproduce`: the runs and their arguments, what is not trained again, tables and pictures from results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from reproduce import data, experiments, figures, results, trainings
from reproduce.counting import Counting
from reproduce.experiments import EXPERIMENTS, GLOBAL, GPU_EXPERIMENTS, MICRO
from reproduce.experts import _Products
from reproduce.run import RESULTS, queue_of
from reproduce.settings import Run, Setting, arguments, plugin_flags
from reproduce.tables import TABLES

from megatron_global_lbl.settings import Settings

INDEX = {"sequence_length": 128, "digest": "d", "domains": [{"name": "c++", "stem": "cpp"}]}


def test_runs_have_names_of_their_own_and_come_once():
    runs = queue_of(list(EXPERIMENTS), seeds=2)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.,=-]+", name) for name in names)
    assert [run.seed for run in runs[:12]] == [0] * 6 + [1] * 6  # all settings of a seed before the next seed


@pytest.mark.parametrize("name", [*EXPERIMENTS, *GPU_EXPERIMENTS])
def test_arguments_say_what_a_setting_says(name, tmp_path):
    for setting in (EXPERIMENTS | GPU_EXPERIMENTS)[name]():
        flags = plugin_flags(setting)
        values = {flag[len("--moe-lbl-") :].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2])}
        assert Settings.create(**values).scope.value == setting.scope
        words = arguments(
            Run(setting, 2), size="cpu" if name in EXPERIMENTS else "gpu", data=tmp_path, index=INDEX, out=tmp_path
        )
        given = dict(zip(words, words[1:]))
        assert given["--seed"] == "1236" and float(given["--moe-aux-loss-coeff"]) == setting.alpha
        assert int(given["--micro-batch-size"]) * setting.ranks <= int(given["--global-batch-size"]) == setting.batch
        assert given.get("--reproduce-count") == setting.over


def test_a_run_with_a_result_is_not_trained_again(tmp_path, capsys):
    run = Run(Setting(), 0)
    path = trainings.result_path(tmp_path, run)
    path.parent.mkdir()
    path.write_text("kept")
    assert trainings.train_all([run], size="cpu", data=tmp_path, out=tmp_path, jobs=1, limit=None) == 0
    assert path.read_text() == "kept" and "1 of 1 runs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no data in"):  # without it, it would have been started
        trainings.train_all([Run(Setting(), 1)], size="cpu", data=tmp_path, out=tmp_path, jobs=1, limit=None)


def _result(setting: Setting, seed: int, loss: float, digest: str = "d", version: str = "1") -> dict:
    """What a run of two domains, two layers and four experts leaves."""
    return {
        "setting": setting.__dict__,
        "seed": seed,
        "data": digest,
        "seconds": 1.0,
        "domains": ["a", "b"],
        "machine": {"processor": "p", "cores": 1},
        "versions": {"torch": version},
        "valid_loss": {"a": loss, "b": loss + 1},
        "frequencies": [[[0.7, 0.1, 0.1, 0.1]] * 2, [[0.1, 0.1, 0.1, 0.7]] * 2],
        "contrast": 0.5,
        "lbl_within_sequences": 1.2,
        "starved_experts": 0.25,
        "max_vio": [2.0] * 5,
        "max_vio_first": [3.0] * 160,
        "autocorrelation": [0.5, -0.25],
    }


def test_tables_and_pictures_come_from_the_results(tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    for seed in (0, 1):
        for setting, loss in ((MICRO, 2.0), (GLOBAL, 1.9 - seed / 10)):
            (out / f"{setting.name}{seed}.json").write_text(json.dumps(_result(setting, seed, loss)))
    other = _result(GLOBAL, 0, 1.0, version="2")  # without a partner on its machine
    (out / "other.json").write_text(json.dumps(other))
    assert results.gather(out, kept) == 5 == results.gather(out, kept)  # the second time adds nothing
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- begin balance-bsz -->\nold\n<!-- end balance-bsz -->\nafter\n")
    figures.make(kept, tmp_path / "images", document)
    text = document.read_text()
    # Of seeds 0 and 1: -0.1 and -0.2, mean and standard deviation.
    assert "-0.150 ± 0.071 (2 of 2)" in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n") and "not run" in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"reproduce-bsz.png", "reproduce-specialisation.png"}


def test_stand_ins_train_as_the_flags_do():
    """In the results that are kept: `check`, pair by pair."""
    kept, settings = results.read(RESULTS), experiments.check()
    for stand_in, flags in zip(settings[::2], settings[1::2]):
        assert len(kept[stand_in]) >= 3 and kept[stand_in].keys() == kept[flags].keys()
        for pair, result in kept[stand_in].items():
            for name in ("train_loss", "valid_loss", "max_vio_first"):
                assert result[name] == kept[flags][pair][name], (stand_in.name, flags.name, pair)


def test_every_table_of_the_document_exists():
    named = re.findall(r"<!-- begin (\S+) -->", figures.DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(named) == sorted(TABLES)


def test_results_of_other_data_are_not_compared(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"{seed}.json").write_text(json.dumps(_result(MICRO, seed, 2.0, digest=str(seed))))
    with pytest.raises(SystemExit, match="2 different data"):
        results.read(tmp_path)


def test_the_products_of_stacked_experts_are_linear_layers_bit_by_bit():
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 0, 5]
    rows = torch.randn(8, 6, generator=generator, requires_grad=True)
    weight = torch.randn(3, 4, 6, generator=generator, requires_grad=True)
    output = torch.cat([functional.linear(part, w) for part, w in zip(rows.split(sizes), weight)])
    of_output = torch.randn(8, 4, generator=generator)
    expected = torch.autograd.grad(output, (rows, weight), of_output)
    ours = _Products.apply(rows, weight, sizes)
    assert torch.equal(ours, output)
    assert all(map(torch.equal, torch.autograd.grad(ours, (rows, weight), of_output), expected))


def _formula(scores_TE, map_TE, counts_E):
    """E * sum_i f_i p_i in float64."""
    f_E = counts_E.double() / counts_E.sum()
    return (scores_TE.double().mean(0) * f_E).sum().item() * len(counts_E)


def test_balance_losses_of_the_experiments_count_what_they_say():
    generator = torch.Generator().manual_seed(0)
    scores_TBE = torch.rand(4, 3, 5, generator=generator)  # 3 sequences of 4 tokens
    map_TBE = torch.zeros(4, 3, 5, dtype=torch.bool).scatter_(2, scores_TBE.topk(2).indices, True)
    scores, maps = scores_TBE.view(12, 5), map_TBE.view(12, 5)
    of_sequences = [_formula(scores_TBE[:, b], map_TBE[:, b], map_TBE[:, b].sum(0)) for b in range(3)]
    ours = Counting("sequences:1").loss(0, scores, maps, 1.0, sequence_length=4)
    assert ours.item() == pytest.approx(sum(of_sequences) / 3)
    # As many tokens as three sequences have are all of them, in any order.
    whole = _formula(scores, maps, maps.sum(0))
    assert Counting("shuffled:3").loss(0, scores, maps, 1.0, sequence_length=4).item() == pytest.approx(whole)
    assert Counting("shuffled:1").loss(0, scores, maps, 1.0, sequence_length=4).item() != pytest.approx(sum(of_sequences) / 3)
    late = Counting("delayed:2:2")
    steps = [torch.roll(maps, shift, dims=1) for shift in range(5)]
    found = [late.loss(0, scores, step, 1.0, sequence_length=4).item() for step in steps]
    due = [None, None, steps[0].sum(0), steps[0].sum(0) + steps[1].sum(0), steps[1].sum(0) + steps[2].sum(0)]
    assert found == pytest.approx([0 if counts is None else _formula(scores, maps, counts) for counts in due])
    with pytest.raises(SystemExit, match="--reproduce-count delayed:1: unknown"):
        Counting("delayed:1")


def test_a_folder_without_data_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="no data in"):
        data.index_of(tmp_path)
